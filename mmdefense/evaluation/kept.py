"""Victims in a store: each is trained once, by whichever process comes first."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmdefense.errors import DivergenceError
from mmdefense.evaluation.victims import Victim, restore_victim, train_and_describe
from mmdefense.evaluation.zoo import zoo_victim
from mmdefense.metrics.backdoor import Rates
from mmdefense.protocol import Case
from mmdefense.report.encoding import build
from mmdefense.runtime.run import Progress
from mmdefense.store import Entry, Identity, Store

__all__ = ["kept_victim", "restored", "trained"]


def kept_victim(
    store: Store, identity: Identity, case: Case, seed: int, progress: Progress, device: str = "cpu"
) -> Victim | None:
    """Return the victim of a case from the store; it is trained first if it is missing.

    A victim that was just trained is read back as well, so that every process sees the same one.

    Args:
        store: The store.
        identity: What the victim depends on.
        case: The victim to train.
        seed: Seed of the weights, the poisoned samples and the training.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
        device: The device to compute on.

    Returns:
        None while another process trains it.

    Raises:
        DivergenceError: If its training has failed, now or earlier.
    """
    entry = trained(store, identity, case, seed, progress, device)
    if entry is None:
        return None
    if entry.status == "failed":
        raise DivergenceError(f"the victim could not be trained: {entry.error}")
    return restored(case, seed, store.content(entry), store.tensors(entry), device)


def restored(
    case: Case, seed: int, content: Mapping[str, Any], tensors: Mapping[str, Tensor], device: str
) -> Victim:
    """Return a victim from its JSON values and its tensors in a store."""
    before: Rates = build(Rates, content["before"], f"victim {case.name}/{seed}")
    return restore_victim(case, seed, tensors, before, device)


def trained(
    store: Store, identity: Identity, case: Case, seed: int, progress: Progress, device: str
) -> Entry | None:
    """Train a victim unless it is in the store; return its entry, or that of its failure.

    A victim of the zoo is loaded instead.

    Returns:
        None while another process trains it.
    """
    if found := store.find(identity):
        return found
    with store.claim(identity) as mine:
        if not mine:
            return None
        if found := store.find(identity):
            return found
        if "weights" in identity.parts:
            return store.put(identity, *zoo_victim(case.name))
        states = store.work(identity)
        try:
            entry = store.put(
                identity, *train_and_describe(case, seed, progress, device, states.folder)
            )
        except OSError:
            raise
        except Exception as error:  # one victim that diverges does not end a grid
            entry = store.fail(identity, error)
        shutil.rmtree(states.folder, ignore_errors=True)
        return entry
