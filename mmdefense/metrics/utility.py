"""Whether a model works on the clean data that it is given with: no remedy is judged otherwise.

The utility of the given model is a measurement of how the data was read. Near chance, or where a
purification raises it far beyond its error, labels, pixels or words are not those that the model
was trained on, and everything that is measured with them is wrong, the guard's drop included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmdefense.batches import Samples
from mmdefense.errors import LowUtilityError
from mmdefense.kernels.loop import scores
from mmdefense.protocol import TaskAdapter

__all__ = ["check_raise", "check_utility", "near_chance"]

_UNLIKE = "the data is probably not read as it was in training"
_Z = 1.645  # one-sided 95 %
_ABOVE = 0.05  # ours: the share of the way from chance to perfect that must be exceeded
_LUCK = 0.05  # ours: where a guess is right about all samples as often, nothing can be told
_RAISE = 0.1  # ours: a raise of the task metric that a purification does not bring about
_RAISE_SHARE = 0.25  # ours: the same as a share of what was missing to a perfect score


def check_utility(
    adapter: TaskAdapter[Any],
    samples: Samples[Any],
    found: Tensor | None = None,
    *,
    accept: bool = False,
) -> None:
    """Refuse a model whose task metric on clean samples is near chance.

    Args:
        adapter: The model.
        samples: Clean samples, as the adapter reads them.
        found: Their scores, shape ``(N,)``, where they are known already.
        accept: Whether such a model is taken all the same; then nothing is measured.

    Raises:
        LowUtilityError: With the likely causes.
    """
    if accept:
        return
    found = scores(adapter, samples) if found is None else found
    chance = near_chance(found, samples.strata(), adapter.chance)
    if chance is None:
        return
    mean = float(found.mean())
    raise LowUtilityError(
        f"the model's {_score_name(adapter)} is {mean:.3f} on {len(found):,} clean samples, near "
        f"chance ({chance:.3f}): {_UNLIKE}; {_causes(adapter)}"
    )


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
) -> None:
    """Refuse a purification that raised the task metric far beyond its error.

    Args:
        adapter: The given model.
        before: Its task metric on held-out samples.
        after: That of the purified model.
        margin: Half-width of the interval of the difference.
        accept: Whether it is taken all the same.

    Raises:
        LowUtilityError: With the likely causes.
    """
    least = max(_RAISE, _RAISE_SHARE * (1 - before))
    if accept or after - before - margin <= least:
        return
    raise LowUtilityError(
        f"the purification raised the {_score_name(adapter)} from {before:.3f} to {after:.3f} on "
        f"held-out samples, so the given model did not know what it has learnt now: {_UNLIKE}; "
        f"nothing was written; {_causes(adapter)}"
    )


def _score_name(adapter: TaskAdapter[Any]) -> str:
    return str(getattr(adapter, "score_name", "accuracy"))


def _causes(adapter: TaskAdapter[Any]) -> str:
    causes = getattr(adapter, "misreadings", "labels, preprocessing")
    return (
        f"check {causes}; if the model is known to be this weak on this data, give "
        "--accept-low-utility (in Python accept_low_utility=True)"
    )
