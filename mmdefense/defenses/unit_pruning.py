"""Pruning of the most suspect units, as many as the utility guard allows (CLP, ANP, RNP)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdefense.defenses.base import Purifying
from mmdefense.defenses.guard import judge
from mmdefense.kernels.loop import scores
from mmdefense.kernels.units import Unit, mask_out, parameters_by_name, rank, restore
from mmdefense.plots.pruning_curve import PruningCurve
from mmdefense.protocol import UnitGroup
from mmdefense.runtime.run import Event

__all__ = ["note_units_without_batch_norm", "prune_by_mask", "prune_within"]

_POINTS = 18  # thresholds from 0 to 0.9 in steps of 0.05, as BackdoorBench sweeps them


def prune_within(
    work: Purifying[Any],
    groups: Sequence[UnitGroup],
    order: Sequence[Unit],
    counts: Iterable[int],
    bound: float,
    prune: Callable[[nn.Module, Sequence[UnitGroup], Sequence[Unit]], None],
) -> None:
    """Prune units in a given order, up to the last count before one that costs too much.

    The cost is measured on all clean samples: the order may be learnt from some of them, but the
    count is not.

    Args:
        work: Its model is pruned in place; its clean samples decide.
        groups: The unit groups.
        order: Suspect units, the most suspect first.
        counts: Numbers of units to try; 0 is skipped.
        bound: The largest allowed drop of the task metric, in ``[0, 1]``.
        prune: Prunes units in place.
    """
    model = work.adapter.model
    tried = sorted({count for count in counts if count})
    total = sum(group.size for group in groups)
    given = parameters_by_name(model)
    before = _all_scores(work)
    curve, pruned, chosen = [float(before.mean())], 0, 0
    most = tried[-1] if tried else 0
    work.run.report("choose units", 0, most)
    for count in tried:
        prune(model, groups, order[pruned:count])
        after, pruned = _all_scores(work), count
        curve.append(float(after.mean()))
        if not judge(before, after, bound, "").passes:
            break
        chosen = count
        work.run.report("choose units", count, most)
    restore(model, given)
    prune(model, groups, order[:chosen])
    work.run.record("prune", 1, 1, pruned=chosen / total)
    fractions = [count / total for count in [0, *tried][: len(curve)]]
    work.plots.append(PruningCurve(fractions, curve, chosen / total))
    if not chosen:
        work.why_unchanged = "no unit was pruned"


def _all_scores(work: Purifying[Any]) -> Tensor:
    return torch.cat([scores(work.adapter, part) for part in (work.holdout, work.fit)])


def prune_by_mask(
    work: Purifying[Any],
    groups: Sequence[UnitGroup],
    masks: Sequence[Tensor],
    threshold: float,
    max_share: float,
    bound: float,
) -> None:
    """Prune the units with the smallest masks; biases are kept, since they were not masked.

    The counts to try are the numbers of units below each of 18 thresholds, evenly spaced up to
    ``threshold``, and 18 counts evenly spaced up to the largest of these.

    Args:
        work: Its model is pruned in place; its clean samples decide.
        groups: The unit groups.
        masks: The mask of each unit, G tensors of shape ``(U,)``.
        threshold: Largest threshold.
        max_share: Largest fraction of the units to prune, in ``[0, 1]``.
        bound: The largest allowed drop of the task metric.
    """
    values = torch.cat([mask.detach().cpu() for mask in masks])
    most = int(max_share * len(values))
    points = range(1, _POINTS + 1)
    below = [int((values < threshold * n / _POINTS).count_nonzero()) for n in points]
    by_number = [round(min(most, below[-1]) * n / _POINTS) for n in points]
    counts = [min(most, count) for count in below] + by_number
    prune_within(work, groups, rank(masks, descending=False), counts, bound, mask_out)


def note_units_without_batch_norm(work: Purifying[Any], groups: Sequence[UnitGroup]) -> None:
    """Note units without the BatchNorm whose weight the papers mask, and what is masked instead."""
    modules = dict(work.adapter.model.named_modules())
    owners = [modules[next(iter(group.outer)).rpartition(".")[0]] for group in groups]
    without = sum(
        group.size
        for group, owner in zip(groups, owners, strict=True)
        if not isinstance(owner, nn.modules.batchnorm._BatchNorm)
    )
    if without:
        total = sum(group.size for group in groups)
        note = (
            f"{without} of {total} units have no BatchNorm, whose weight the paper masks: their "
            "own weights are masked instead"
        )
        work.run.progress(Event("units", 0, 1, note=note))
