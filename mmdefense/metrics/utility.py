"""Whether a model works on the clean data that it is given with; nothing else can be judged before.

The utility of the given model is a measurement of how the data was read. Near chance, or where a
purification raises it far beyond its error, labels, pixels or words are not those that the model
was trained on, and everything that is measured with them is wrong, the guard's drop included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmdefense.data.batch import Samples
from mmdefense.errors import BadInputError, LowUtilityError
from mmdefense.kernels.hooks import mode
from mmdefense.notes import note
from mmdefense.prepared import Prepared
from mmdefense.protocol import TaskAdapter, traits

__all__ = ["check_raise", "check_utility", "near_chance"]

_UNLIKE = "the data is probably not read as it was in training"
_Z = 1.645  # one-sided 95 %
_ABOVE = 0.05  # ours: the share of the way from chance to perfect that must be exceeded
_LUCK = 0.05  # ours: where a guess is right about all samples as often, nothing can be told
_FIRST = 32  # samples whose losses are looked at
_RAISE = 0.1  # ours: a raise of the task metric that a purification does not bring about
_RAISE_SHARE = 0.25  # ours: the same as a share of what was missing to a perfect score


def check_utility(prepared: Prepared[Any], *, accept: bool = False) -> str:
    """Refuse a model whose task metric on clean samples is near chance, unless it is accepted.

    Args:
        prepared: The model and the samples.
        accept: Whether such a model is taken all the same, with a note.

    Returns:
        What was accepted, as a sentence; empty where the model works.

    Raises:
        LowUtilityError: With the likely causes.
        BadInputError: If the model's loss is NaN or infinite.
    """
    adapter, samples, found = prepared.adapter, prepared.samples, prepared.scores
    chance = near_chance(found, samples.strata(), adapter.chance)
    if chance is None:
        return ""
    name = traits(adapter).score_name
    what = (
        f"the model's {name} is {float(found.mean()):.3f} on {len(found):,} clean "
        f"samples, near chance ({chance:.3f})"
    )
    if damaged := _not_finite(adapter, samples):
        raise BadInputError(f"{what}: {damaged}; the model itself is broken")
    return _accepted(what, accept, f"{what}: {_UNLIKE}; {_causes(adapter)}")


def _accepted(what: str, accept: bool, refusal: str) -> str:
    """Return what is accepted, and tell the user; or refuse."""
    if not accept:
        raise LowUtilityError(refusal)
    note(f"low utility is accepted: {what}; {_UNLIKE}")
    return what


def _not_finite(adapter: TaskAdapter[Any], samples: Samples[Any]) -> str:
    """Return how many of the first losses are NaN or infinite, in words; empty if none is."""
    batch = samples.take(torch.arange(min(_FIRST, len(samples))))
    with torch.no_grad(), mode(adapter.model, train=False):
        losses = adapter.per_sample_loss(batch)
    damaged = int((~losses.isfinite()).sum())
    return f"its loss is NaN or infinite for {damaged} of {len(losses)} samples" if damaged else ""


def near_chance(found: Tensor, classes: Tensor | None, chance: float) -> float | None:
    """Return the level of chance that scores do not clearly exceed; none where they do.

    So few samples that a guess may well be right about all of them tell nothing. Clearly is by 5 %
    of what is missing to a perfect score, and by more than the error of the mean.

    Args:
        found: Each sample's share of the task metric, shape ``(N,)``.
        classes: The class of each sample, shape ``(N,)``, where there are such.
        chance: The task metric of a model that has learnt nothing.
    """
    if chance ** len(found) > _LUCK:
        return None
    if _not_above(found, chance):
        return chance
    recalls = [] if classes is None else _recalls(found, classes.to(found.device))
    if len(recalls) < 2:
        return None
    # The right class alone, for each sample the same one: a constant output, or labels that are
    # renumbered behind the first. It may exceed 1 / K, but never one class in those present.
    constant = 1 / len(recalls)
    mean, others = sum(recalls) / len(recalls), sorted(recalls)[:-1]
    one_alone = sum(others) / len(others) <= chance
    return constant if one_alone and mean <= constant + _ABOVE * (1 - constant) else None


def _not_above(found: Tensor, chance: float) -> bool:
    error = float(found.double().std()) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return float(found.mean()) <= chance + max(_ABOVE * (1 - chance), _Z * error)


def _recalls(found: Tensor, classes: Tensor) -> list[float]:
    return [float(found[classes == one].mean()) for one in torch.unique(classes)]


def check_raise(
    adapter: TaskAdapter[Any], before: float, after: float, margin: float, *, accept: bool = False
) -> str:
    """Refuse a purification that raised the task metric far beyond its error, unless accepted.

    Args:
        adapter: The given model.
        before: Its task metric on held-out samples.
        after: That of the purified model.
        margin: Half-width of the interval of the difference.
        accept: Whether it is taken all the same, with a note.

    Returns:
        What was accepted, as a sentence; empty where it was raised no further than its error.

    Raises:
        LowUtilityError: With the likely causes.
    """
    least = max(_RAISE, _RAISE_SHARE * (1 - before))
    if after - before - margin <= least:
        return ""
    name = traits(adapter).score_name
    what = (
        f"the purification raised the {name} from {before:.3f} to {after:.3f} on "
        "held-out samples, so the given model did not know what it has learnt now"
    )
    refusal = f"{what}: {_UNLIKE}; nothing was written; {_causes(adapter)}"
    return _accepted(what, accept, refusal)


def _causes(adapter: TaskAdapter[Any]) -> str:
    return (
        f"check {traits(adapter).misreadings}; if the model is known to be this weak on this "
        "data, give --accept-low-utility (in Python accept_low_utility=True)"
    )
