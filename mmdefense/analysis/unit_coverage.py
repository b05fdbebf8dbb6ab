"""Which orders of units put first what a trigger changes most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdefense.data.batch import Samples
from mmdefense.defenses.tsbd import unlearning_change
from mmdefense.kernels.units import mean_activations, weight_change
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.metrics.tac import neuron_coverage_ratio, trigger_activated_change
from mmdefense.plots.unit_coverage import UnitCoverage
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run

__all__ = ["Coverage", "unit_coverage", "unit_scores"]

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of all units that are compared; ours."""


@dataclass(frozen=True)
class Coverage:
    """The coverage of the units with the largest TAC by several orders.

    Attributes:
        fractions: Shares of all units.
        ratios: By order, the coverage at each, in ``[0, 1]``.
    """

    fractions: tuple[float, ...]
    ratios: Mapping[str, tuple[float, ...]]

    def plot(self) -> UnitCoverage:
        """Return the plot, a line for each order."""
        return UnitCoverage(self.fractions, self.ratios)


def unit_scores(adapter: TaskAdapter[Any], clean: Samples[Any], run: Run) -> dict[str, Tensor]:
    """Return what orders of the defenses here rank all units by, the largest pruned first.

    ``"fine-pruning"`` is the least mean activation on clean data, ``"NWC"`` TSBD's neuron weight
    change, ``"random"`` a random order.

    Args:
        adapter: The model; it is left as it is.
        clean: Clean samples.
        run: Seed and progress.

    Returns:
        By name a tensor ``(U,)`` over all unit groups.
    """
    groups = adapter.unit_groups()
    activation = torch.cat(mean_activations(adapter, clean, groups)).cpu()
    change = torch.cat(weight_change(unlearning_change(adapter, clean, run), groups)).cpu()
    drawn = torch.rand(len(change), generator=run.generator("random order"))
    return {"fine-pruning": -activation, "NWC": change, "random": drawn}


def unit_coverage(
    adapter: TaskAdapter[Any],
    triggered: TriggeredSamples[Any],
    scores: Mapping[str, Tensor],
    fractions: Sequence[float] = FRACTIONS,
) -> Coverage:
    """Measure the coverage by several orders (:func:`mmdefense.metrics.tac.neuron_coverage_ratio`).

    Args:
        adapter: The model; it is left as it is.
        triggered: Triggered test samples and their clean twins.
        scores: By name of the order, what it ranks all units by, ``(U,)``, the largest first.
        fractions: Shares of all units to compare.
    """
    groups = adapter.unit_groups()
    by_layer = trigger_activated_change(adapter, triggered)
    change = torch.cat([by_layer[group.layer] for group in groups])
    ratios = {
        name: tuple(
            neuron_coverage_ratio(values.argsort(descending=True, stable=True), change, fraction)
            for fraction in fractions
        )
        for name, values in scores.items()
    }
    return Coverage(tuple(fractions), ratios)
