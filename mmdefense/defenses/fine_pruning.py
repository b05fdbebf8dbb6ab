"""Pruning and fine-pruning: prune units that are dormant on clean data, then fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmdefense.defenses.base import Defense, Purifying
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.defenses.tsbd import unlearning_change
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.loop import mean_score, train
from mmdefense.kernels.pruning_curve import head_activations, pruning_curve
from mmdefense.kernels.units import (
    Unit,
    mean_activations,
    parameters_by_name,
    prune,
    pruning_masks,
    rank,
    restore,
    weight_change,
)
from mmdefense.plots.pruning_curve import PruningCurve
from mmdefense.protocol import HeadAdapter, TaskAdapter, UnitGroup
from mmdefense.settings import Count, Share

__all__ = ["FinePruning", "Pruning"]


@dataclass(frozen=True, kw_only=True)
class Pruning(Defense):
    """Prune dormant units, most dormant first, until held-out accuracy drops.

    ``layers="last"`` prunes the input features of the output layer, which every classifier has,
    ranked by the mean magnitude of their clean activation; the whole curve of accuracy against
    pruned units takes one pass. (The paper prunes the filters of the last convolution; each feature
    is the output of one such filter unless a shortcut joins in between. BackdoorBench ranks the
    same features by signed mean.) ``layers="all"`` ranks the units of all groups together.

    Attributes:
        layers: ``"last"``, ``"all"``, or ``"auto"``: ``"last"`` if the model ends in a linear
            layer, as classifiers do, else ``"all"``.
        order: ``"activation"``, ascending; or ``"weight-change"``, TSBD's neuron weight change,
            descending (with ``layers="all"`` only).
        max_pruning_drop: Largest drop of held-out accuracy from pruning, in ``[0, 1]``;
            BackdoorBench's 0.1, there on test data. Pruning stops before the first larger drop.
        points: Number of points of the curve.
        max_share: Largest fraction of units to prune.

    References:
        Liu, Dolan-Gavitt, Garg. *Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
        Networks*. RAID 2018. arXiv:1805.12185
    """

    layers: Literal["auto", "last", "all"] = "auto"
    order: Literal["activation", "weight-change"] = "activation"
    max_pruning_drop: Share = 0.1
    points: Count = 100
    max_share: Share = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order == "weight-change" and self.layers == "last":
            raise BadInputError("order 'weight-change' must go with layers 'all', got 'last'")

    def _run(self, work: Purifying[Any]) -> None:
        _, curve = self._prune(work)
        _show(work, curve)

    def _prune(self, work: Purifying[Any]) -> tuple[dict[str, Tensor], PruningCurve]:
        """Prune units in place; return the masks that keep them at zero, by parameter."""
        head = self._head(work.adapter)
        if head is None:
            groups, order = self._all(work)
            counts = self._counts(len(order))
            curve = self._curve_by_evaluation(work, groups, order, counts)
        else:
            groups = [head.head_group()]
            order = rank([head_activations(head, work.fit)], descending=False)
            counts = self._counts(len(order))
            ranks = [unit for _, unit in order]
            curve = pruning_curve(head, work.holdout, ranks, counts).tolist()
        before = curve[0]
        kept = 0
        for count, score in zip(counts, curve, strict=False):
            if before - score > self.max_pruning_drop:
                break
            kept = count
        model = work.adapter.model
        prune(model, groups, order[:kept])
        share = kept / len(order)
        work.run.report("prune", kept, len(order), pruned=share)
        fractions = [count / len(order) for count in counts[: len(curve)]]
        return pruning_masks(model, groups, order[:kept]), PruningCurve(fractions, curve, share)

    def _head(self, adapter: TaskAdapter[Any]) -> HeadAdapter[Any] | None:
        """Return the adapter if only its last layer is pruned, and None if all layers are.

        Raises:
            UnsupportedError: If ``layers`` is ``"last"``, and the adapter cannot read that layer.
        """
        if self.layers == "last":
            if isinstance(adapter, HeadAdapter):
                return adapter
            raise UnsupportedError(
                f"pruning the last layer needs a HeadAdapter; {type(adapter).__name__} is not one; "
                "use layers='all'"
            )
        if (
            self.layers == "all"
            or self.order == "weight-change"
            or not isinstance(adapter, HeadAdapter)
        ):
            return None
        try:
            adapter.head_weights()
        except UnsupportedError:
            return None
        return adapter

    def _counts(self, total: int) -> list[int]:
        """Return numbers of units from 0 to ``max_share`` of ``total``, ascending and distinct."""
        most = int(self.max_share * total)
        return sorted({round(most * point / self.points) for point in range(self.points + 1)})

    def _all(self, work: Purifying[Any]) -> tuple[list[UnitGroup], list[Unit]]:
        groups = list(work.adapter.unit_groups())
        if self.order == "weight-change":
            change = unlearning_change(work.adapter, work.fit, work.run)
            return groups, rank(weight_change(change, groups), descending=True)
        # Layers differ in scale, so activations are divided by the mean of their layer.
        scores = [s.abs() for s in mean_activations(work.adapter, work.fit, groups)]
        relative = [s / s.mean().clamp(min=1e-30) for s in scores]
        return groups, rank(relative, descending=False)

    def _curve_by_evaluation(
        self,
        work: Purifying[Any],
        groups: Sequence[UnitGroup],
        order: Sequence[Unit],
        counts: Sequence[int],
    ) -> list[float]:
        """Evaluate after each count, until one costs too much, then roll back."""
        adapter = work.adapter
        given = parameters_by_name(adapter.model)
        curve: list[float] = []
        for start, stop in zip([0, *counts], counts, strict=False):
            prune(adapter.model, groups, order[start:stop])
            curve.append(mean_score(adapter, work.holdout))
            work.run.report("curve", stop, counts[-1])
            if curve[0] - curve[-1] > self.max_pruning_drop:
                break
        restore(adapter.model, given)
        return curve


def _show(work: Purifying[Any], curve: PruningCurve) -> None:
    work.plots.append(curve)
    if not curve.chosen:
        work.why_unchanged = "no unit was pruned"


@dataclass(frozen=True, kw_only=True)
class FinePruning(Pruning, RateFindingDefense):
    """Prune, then fine-tune all weights with the pruned units held at zero.

    See :class:`Pruning` for the first part and its reference.
    """

    def _run(self, work: Purifying[Any]) -> None:
        student = self.student(work.adapter)

        def prune() -> dict[str, Any]:
            masks, curve = self._prune(work)
            return {"masks": masks, "curve": [curve.fractions, curve.accuracy, curve.chosen]}

        kept = work.run.once("prune", prune, at_any_rate=True)
        _show(work, PruningCurve(*kept["curve"]))
        parameters = dict(work.adapter.model.named_parameters(remove_duplicate=False))
        held: list[Tensor] = [parameters[name] for name in kept["masks"]]
        keep = [
            mask.to(parameter.device)
            for mask, parameter in zip(kept["masks"].values(), held, strict=True)
        ]

        def hold(_: int) -> None:
            if held:  # empty if nothing was pruned, and foreach rejects an empty list
                with torch.no_grad():
                    torch._foreach_mul_(held, keep)

        hold(0)
        work.run.snapshot("pruned, not fine-tuned", work.adapter.model)
        training = self.training(work.adapter)
        train(student, work.fit, training, work.run, stage="fine-tune", after_step=hold)
