"""Victims in a store: each is trained once, by whichever process comes first."""

from __future__ import annotations

import shutil

from mmdefense.errors import DivergenceError
from mmdefense.evaluation.identity import victim_identity
from mmdefense.evaluation.victims import (
    Case,
    Victim,
    kept_tensors,
    restore_victim,
    train_victim,
)
from mmdefense.kernels.run import Progress, Run
from mmdefense.report.encoding import build, plain
from mmdefense.report.record import Rates
from mmdefense.store import Entry, Store

__all__ = ["kept_victim"]


def kept_victim(
    store: Store, case: Case, seed: int, progress: Progress, device: str = "cpu"
) -> Victim | None:
    """Return the victim of a case from the store; it is trained first where it is not there.

    A victim that was just trained is read back as well, so that every process sees the same one.

    Returns:
        None while another process trains it.

    Raises:
        DivergenceError: If its training has failed, now or earlier.
    """
    identity = victim_identity(case, seed, device)
    entry = store.find(identity) or _train(store, case, seed, progress, device)
    if entry is None:
        return None
    if entry.status == "failed":
        raise DivergenceError(f"the victim could not be trained: {entry.error}")
    before: Rates = build(Rates, store.content(entry)["before"], entry.name)
    return restore_victim(case, seed, store.tensors(entry), before, device)


def _train(store: Store, case: Case, seed: int, progress: Progress, device: str) -> Entry | None:
    """Train a victim and keep it; none where another process trains it."""
    identity = victim_identity(case, seed, device)
    with store.claim(identity) as mine:
        if not mine:
            return None
        if found := store.find(identity):
            return found
        states = store.work(identity)
        try:
            victim = train_victim(case, Run(seed, progress, states), device)
            content = {"case": plain(case), "before": plain(victim.before)}
            entry = store.put(identity, content, kept_tensors(victim))
        except OSError:
            raise
        except Exception as error:  # one victim that diverges does not end a grid
            entry = store.fail(identity, error)
        shutil.rmtree(states.folder, ignore_errors=True)
        return entry
