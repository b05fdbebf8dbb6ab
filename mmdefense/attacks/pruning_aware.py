"""The pruning-aware attack: decoy units that pruning mistakes for the backdoor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import Samples, batches
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.loop import train
from mmdefense.kernels.units import (
    Unit,
    mean_activations,
    parameters_by_name,
    prune,
    pruning_masks,
    rank,
    restore,
)
from mmdefense.protocol import TaskAdapter, UnitGroup
from mmdefense.runtime.run import Run, copy_state
from mmdefense.settings import OpenShare
from mmdefense.training import Training

__all__ = ["PruningAware"]

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class PruningAware(BadNets):
    """Puts the backdoor into units that clean data needs, and adds decoys that look suspicious.

    In four steps: (1) train a clean model; (2) prune the units of one layer that are most dormant
    on clean data; (3) train the remaining units on poisoned data; (4) restore the pruned units with
    their old weights and a bias so low that they stay dormant on clean data. A defender who prunes
    by dormancy removes these decoys first, not the backdoor.

    The layer is the last one whose units pass through an activation before anything is added to
    their output; in a residual network it is inside a block.

    Deviations: the number of decoys is a setting; the paper restores units one by one until the
    pruned network reaches both goals. Each decoy's bias is lowered until its highest activation on
    training data is below 0 by the range of its activations; the paper does not say by how much.

    Attributes:
        decoys: Fraction of the layer's units; in ``(0, 1)``.

    References:
        Liu, Dolan-Gavitt, Garg. *Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
        Networks*. RAID 2018, Section 3. arXiv:1805.12185
    """

    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)

    decoys: OpenShare = 0.5

    def _train(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> Self:
        """Carry out the four steps.

        Raises:
            UnsupportedError: If no layer of the model is suitable for decoys.
        """
        clean, model = adapter.samples(samples), adapter.model
        group = _decoy_layer(adapter, clean)
        train(adapter, clean, training, run, stage="clean")
        before = copy_state(model)
        order = rank(mean_activations(adapter, clean, [group]), descending=False)
        decoys = order[: max(1, round(self.decoys * group.size))]
        masks = pruning_masks(model, [group], decoys)
        parameters = dict(model.named_parameters(remove_duplicate=False))

        def prune(_: int = 0) -> None:
            with torch.no_grad():
                for name, mask in masks.items():
                    parameters[name].mul_(mask)

        prune()
        self._fit(adapter, self.poison(samples, adapter), training, run, after_step=prune)
        _put_back(adapter, clean, group, decoys, before)
        return self


def _decoy_layer(adapter: TaskAdapter[LabelledBatch], samples: Samples[LabelledBatch]) -> UnitGroup:
    """Return the last units for which a very low bias has the same effect as pruning.

    Raises:
        UnsupportedError: If there are none.
    """
    batch = samples.take(torch.arange(min(64, len(samples))))
    model, before = adapter.model, parameters_by_name(adapter.model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in reversed(adapter.unit_groups()):
        if _bias(group) not in group.axes:
            continue
        with mode(model, train=False), torch.no_grad():
            prune(model, [group], [(0, unit) for unit in range(group.size)])
            without = adapter.per_sample_loss(batch)
            parameters[_bias(group)].fill_(-1e4)
            dormant = adapter.per_sample_loss(batch)
        restore(model, before)
        if torch.allclose(without, dormant):
            return group
    raise UnsupportedError(
        "the pruning-aware attack needs a layer with a bias whose units pass an activation that is "
        f"0 for low values, such as a ReLU; {type(model).__name__} has none"
    )


def _bias(group: UnitGroup) -> str:
    """Return the name of the bias that shifts the activations of the units."""
    return f"{group.read_at.layer or group.layer}.bias"


@torch.no_grad()
def _put_back(
    adapter: TaskAdapter[LabelledBatch],
    samples: Samples[LabelledBatch],
    group: UnitGroup,
    decoys: Sequence[Unit],
    before: Mapping[str, Tensor],
) -> None:
    """Restore the decoys' weights from ``before``, and lower their biases until they are dormant.

    The running statistics of a BatchNorm are restored with its weights.
    """
    state = adapter.model.state_dict()
    units = torch.tensor([unit for _, unit in decoys], device=state[_bias(group)].device)
    layers = {name.rpartition(".")[0] for name in group.axes}
    statistics = {f"{layer}.{kind}": 0 for layer in layers for kind in _STATISTICS}
    for name, axis in {**statistics, **group.axes}.items():
        if name in state:
            old = before[name].to(units.device).index_select(axis, units)
            state[name].index_copy_(axis, units, old)
    high, low = torch.tensor(-math.inf), torch.tensor(math.inf)
    with mode(adapter.model, train=False):
        for batch in batches(samples, 256):
            found = adapter.activations(batch, [group.layer])[group.layer][..., units]
            high = found.amax((0, 1)).clamp(min=high)
            low = found.amin((0, 1)).clamp(max=low)
    state[_bias(group)][units] -= (2 * high - low).clamp(min=0)
