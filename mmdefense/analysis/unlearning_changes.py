"""What unlearning does to units: clean against poisoned data, backdoored against benign model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdefense.data.batch import Samples, batches
from mmdefense.defenses.tsbd import unlearning_change
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.units import gradient_norms, rank, weight_change
from mmdefense.kernels.unlearning import mean_gradient
from mmdefense.plots.unlearning_changes import UnlearningChanges
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run

__all__ = ["Changes", "activeness", "unlearning_changes"]


@dataclass(frozen=True)
class Changes:
    """The neuron weight change (NWC) of each unit under two kinds of unlearning.

    Attributes:
        clean: When clean data is unlearnt, ``(U,)`` over all unit groups.
        poison: When poisoned data is unlearnt, ``(U,)``.
        sizes: Number of units of each layer, in the order of the values.
    """

    clean: Tensor
    poison: Tensor
    sizes: Mapping[str, int]

    @property
    def correlation(self) -> float:
        """Pearson's coefficient of the two over the units, in ``[-1, 1]``."""
        return float(torch.corrcoef(torch.stack([self.clean, self.poison]).double())[0, 1])

    @property
    def rank_correlation(self) -> float:
        """Spearman's coefficient: that of the places in the two orders."""
        places = [values.argsort().argsort().double() for values in (self.clean, self.poison)]
        return float(torch.corrcoef(torch.stack(places))[0, 1])

    def overlap(self, fraction: float) -> float:
        """Return the share of the units with the largest change that both orders put first."""
        count = max(1, round(fraction * len(self.clean)))
        tops = [
            {unit for _, unit in rank([values], descending=True)[:count]}
            for values in (self.clean, self.poison)
        ]
        return len(tops[0] & tops[1]) / count

    def within(self, layer: str) -> Changes:
        """Return the changes of the units of one layer."""
        place = list(self.sizes).index(layer)
        clean, poison = (
            torch.split(values, list(self.sizes.values()))[place]
            for values in (self.clean, self.poison)
        )
        return Changes(clean, poison, {layer: self.sizes[layer]})

    def plot(self) -> UnlearningChanges:
        """Return the plot of one against the other."""
        return UnlearningChanges(self.clean, self.poison, self.correlation)


def unlearning_changes(
    adapter: TaskAdapter[Any],
    clean: Samples[Any],
    poisoned: Samples[Any],
    run: Run,
    *,
    poison_stop: float = 0.05,
    **settings: Any,
) -> Changes:
    """Unlearn clean data from one copy of a model and poisoned data from another.

    Args:
        adapter: The model; it is left as it is.
        clean: Clean samples, unlearnt until the score is at chance.
        poisoned: Triggered samples with the attacker's labels, unlearnt until the ASR is at most
            ``poison_stop``: TSBD's experiment stops at 5 %.
        run: Seed and progress.
        poison_stop: See above.
        **settings: Of the ascent; see :func:`mmdefense.defenses.tsbd.unlearning_change`.
    """
    groups = adapter.unit_groups()
    of_clean = unlearning_change(adapter, clean, run.part("clean"), **settings)
    of_poison = unlearning_change(
        adapter, poisoned, run.part("poison"), stop=poison_stop, **settings
    )
    clean_change, poison_change = (
        torch.cat(weight_change(change, groups)).cpu() for change in (of_clean, of_poison)
    )
    return Changes(clean_change, poison_change, {group.layer: group.size for group in groups})


def activeness(
    adapter: TaskAdapter[Any], clean: Samples[Any], *, lr: float = 1e-3, batch_size: int = 64
) -> dict[str, Tensor]:
    """Return each unit's mean gradient norm over one epoch of clean unlearning, ``(U,)`` by layer.

    The epoch is gradient ascent by SGD with momentum 0.9 on a copy of the model, in train mode.

    Args:
        adapter: The model; it is left as it is.
        clean: Clean samples, in their order.
        lr: Learning rate of the ascent.
        batch_size: Samples per update.
    """
    fork = adapter.fork()
    groups = fork.unit_groups()
    parameters = dict(fork.model.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=0.9)
    total = {group.layer: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    count = 0
    with mode(fork.model, train=True):
        for batch in batches(clean, batch_size):
            gradient = mean_gradient(fork, batch)
            for group, norms in zip(groups, gradient_norms(gradient, groups), strict=True):
                total[group.layer] += norms.cpu()
            for name, parameter in parameters.items():
                parameter.grad = -gradient[name]
            optimizer.step()
            count += 1
    return {layer: norms / count for layer, norms in total.items()}
