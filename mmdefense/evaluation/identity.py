"""What a measurement depends on: data, settings, seed, device and code, as one identity."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache, lru_cache
from typing import Any

from mmdefense import registry
from mmdefense.defenses.base import Defense
from mmdefense.errors import UnsupportedError
from mmdefense.evaluation.cases import Change
from mmdefense.evaluation.others import foreign_images
from mmdefense.pipeline.identity import code_version, library_versions
from mmdefense.protocol import Case
from mmdefense.report.encoding import plain
from mmdefense.store import Identity

__all__ = ["cell_identity", "data_fingerprint", "loaded", "victim_identity"]

_NOT_MEASURING = {
    *("analysis", "cli", "libraries", "notes", "report", "sandbox", "scanning", "shown", "store"),
}
"""Modules and packages of mmdefense that do not affect measurements."""

_AFTER_VICTIMS = {"defenses", "pipeline"}
"""Packages that no victim depends on."""

_SETS = 4
"""Parts of data sets to keep in memory, such as both parts of two data sets."""


def victim_identity(case: Case, seed: int, device: str = "cpu", weights: str = "") -> Identity:
    """Return what the trained victim of a case depends on.

    That does not include its name, nor the share of clean samples if the victim is trained on these
    as well, so that cells of several shares have one victim.

    Args:
        case: The victim.
        seed: Seed of the weights, the poisoned samples and the training.
        device: The device to compute on.
        weights: SHA-256 of the victim's file, if it is one of the zoo and not trained here.
    """
    described = plain(case)
    for name in ("name", "demo", *(["clean"] if case.seen else [])):
        del described[name]
    return Identity(
        "victim",
        f"{case.name}/{seed}",
        {
            "case": described,
            "seed": seed,
            "data": data_fingerprint(case.task, case.data),
            "device": device.partition(":")[0],
            "code": code_version(*_NOT_MEASURING, *_AFTER_VICTIMS),
            "libraries": library_versions(),
            **({"weights": weights} if weights else {}),
        },
    )


def cell_identity(
    victim: Identity,
    case: Case,
    label: str,
    defense: Defense,
    views: str,
    change: Change | None,
    retune: int = 0,
) -> Identity:
    """Return what the measurement of a defense on a victim depends on.

    Args:
        victim: What the victim depends on.
        case: The victim.
        label: Name of the defense in tables.
        defense: The defense with its settings and the seed, which is also the victim's.
        views: How the clean samples are augmented.
        change: How they differ from the victim's training data, if they do.
        retune: Poisoned samples that the purified model is retuned on.
    """
    return Identity(
        "cell",
        f"{case.name}/{defense.seed}: {label}, {views} views",
        {
            "victim": victim.digest,
            "called": [case.name, label],  # the row has these names
            "defense": f"{type(defense).__module__}:{type(defense).__qualname__}",
            "settings": plain(asdict(defense)),
            "views": views,
            "clean": case.clean,
            "change": change,
            "foreign": _foreign(case.task, case.data) if change == "other" else None,
            "retune": retune,
            "code": code_version(*_NOT_MEASURING),
        },
    )


@cache
def _foreign(task: str, data: str) -> tuple[str, str] | None:
    """Return the name and the hash of the images of other classes; None if there are none."""
    try:
        name, samples = foreign_images(task, data)
    except UnsupportedError:
        return None
    return name, samples.fingerprint()


@cache
def data_fingerprint(task: str, data: str) -> tuple[str, ...]:
    """Return a hash of the train and of the test part of a data set."""
    return tuple(loaded(task, data, split).fingerprint() for split in ("train", "test"))


@lru_cache(maxsize=_SETS)
def loaded(task: str, data: str, split: str) -> Any:
    """Return the ``"train"`` or ``"test"`` part of a data set, in memory."""
    return registry.load("tasks", task)().load(data, split=split).in_memory()
