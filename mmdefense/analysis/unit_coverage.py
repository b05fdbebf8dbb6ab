"""Which orders of units put first what a trigger changes most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mmdefense.data.batch import Samples
from mmdefense.defenses.anp import ANP
from mmdefense.defenses.base import Purifying
from mmdefense.defenses.clp import lipschitz_bounds
from mmdefense.defenses.rnp import RNP
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


def unit_scores(
    adapter: TaskAdapter[Any],
    clean: Samples[Any],
    run: Run,
    settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Return what orders of the defenses here rank all units by, the largest pruned first.

    ``"fine-pruning"`` is the least mean activation on clean data, ``"NWC"`` TSBD's neuron weight
    change, ``"CLP"`` the Lipschitz bound in standard deviations of its layer, ``"ANP"`` and
    ``"RNP"`` the least mask, and ``"random"`` a random order.

    Args:
        adapter: The model; it is left as it is.
        clean: Clean samples.
        run: Seed and progress.
        settings: Of ANP and RNP, such as a smaller number of updates, by their name.

    Returns:
        By name a tensor ``(U,)`` over all unit groups.
    """
    groups = adapter.unit_groups()
    activation = torch.cat(mean_activations(adapter, clean, groups)).cpu()
    change = torch.cat(weight_change(unlearning_change(adapter, clean, run), groups)).cpu()
    drawn = torch.rand(len(change), generator=run.generator("random order"))
    bounds = [lipschitz_bounds(adapter.model, group) for group in groups]
    outlying = [((each - each.mean()) / each.std()).nan_to_num(0) for each in bounds]
    found = {"fine-pruning": -activation, "NWC": change, "CLP": torch.cat(outlying).cpu()}
    for name, kind in (("ANP", ANP), ("RNP", RNP)):
        work = Purifying(adapter.fork(), clean, clean, run.part(name))
        masks = kind(seed=run.seed, **settings.get(name, {})).masks(work, groups)
        found[name] = -torch.cat([mask.detach() for mask in masks]).cpu()
    return {**found, "random": drawn}


def unit_coverage(
    adapter: TaskAdapter[Any],
    triggered: TriggeredSamples[Any],
    scores: Mapping[str, Tensor],
    fractions: Sequence[float] = FRACTIONS,
    layers: Sequence[str] | None = None,
) -> Coverage:
    """Measure the coverage by several orders (:func:`mmdefense.metrics.tac.neuron_coverage_ratio`).

    Args:
        adapter: The model; it is left as it is.
        triggered: Triggered test samples and their clean twins.
        scores: By name of the order, what it ranks all units by, ``(U,)``, the largest first.
        fractions: Shares of the units to compare.
        layers: Whose units are compared; none takes all layers. The activations of layers differ in
            scale, which TAC and the orders take over.
    """
    groups = adapter.unit_groups()
    by_layer = trigger_activated_change(adapter, triggered)
    change = torch.cat([by_layer[group.layer] for group in groups])
    taken = torch.cat([torch.full((g.size,), layers is None or g.layer in layers) for g in groups])
    ratios = {}
    for name, values in scores.items():
        order = values[taken].argsort(descending=True, stable=True)
        ratios[name] = tuple(neuron_coverage_ratio(order, change[taken], f) for f in fractions)
    return Coverage(tuple(fractions), ratios)
