"""CLP: pruning of the channels with the largest Lipschitz bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdefense.defenses.base import Defense, Purifying
from mmdefense.defenses.unit_pruning import prune_within
from mmdefense.kernels.units import prune, rank
from mmdefense.protocol import UnitGroup
from mmdefense.settings import Count, Positive

__all__ = ["CLP", "lipschitz_bounds"]


@dataclass(frozen=True, kw_only=True)
class CLP(Defense):
    """Prune the units whose Lipschitz bound stands out in their layer; nothing is trained.

    A unit's bound is the largest singular value of its weights (for a filter, reshaped to input
    channels by kernel positions) times the scale of the following BatchNorm. A unit is suspect if
    its bound exceeds the mean of its layer by ``spread`` standard deviations. In a layer of n units
    no bound can exceed it by more than ``(n - 1) / sqrt(n)``: 3 needs 11 units.

    Ours: suspects are pruned in order of their deviation, as many as the utility guard allows on
    held-out data (the released code prunes all); a filter is paired with the BatchNorm that reads
    its output (there, with the one defined after it); and units without BatchNorm (filters, hidden
    neurons, attention heads) are scored by their weights alone, so that transformers are supported
    as well. A GroupNorm contributes its weight, but not the statistics of its input.

    Attributes:
        spread: The paper's u: 3 on CIFAR-10, 5 on Tiny-ImageNet.
        points: Largest number of pruning counts to try, evenly spaced up to all suspects.

    References:
        Zheng, Tang, Li, Liu. *Data-free Backdoor Removal based on Channel Lipschitzness*.
        ECCV 2022. arXiv:2208.03111
    """

    spread: Positive = 3.0
    points: Count = 20

    def _run(self, work: Purifying[Any]) -> None:
        model = work.adapter.model
        groups = list(work.adapter.unit_groups())
        found = [lipschitz_bounds(model, group) for group in groups]
        # The standard deviation of a layer with one unit is NaN: that unit is not an outlier.
        outlying = [((bounds - bounds.mean()) / bounds.std()).nan_to_num(0) for bounds in found]
        suspects = sum(int((values > self.spread).count_nonzero()) for values in outlying)
        counts = [round(suspects * point / self.points) for point in range(self.points + 1)]
        order = rank(outlying, descending=True)[:suspects]
        prune_within(work, groups, order, counts, self.max_utility_drop, prune)


@torch.no_grad()
def lipschitz_bounds(model: nn.Module, group: UnitGroup) -> Tensor:
    """Return the largest singular value of each unit's weights, times its norm's scale, ``(U,)``.

    A unit with weights in two layers, such as a rank of a low-rank update, gets their product.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    factors = []
    for name, axis in group.axes.items():
        owner, _, kind = name.rpartition(".")
        weight = parameters[name].double().movedim(axis, 0)
        if weight.ndim > 1:
            factors.append(_largest_singular_values(weight, group))
        elif kind != "bias":
            norm: Any = model.get_submodule(owner)
            variance = getattr(norm, "running_var", None)
            scale = 1 if variance is None else (variance.double() + norm.eps).sqrt()
            factors.append(weight.abs() / scale)
    return torch.stack(factors).prod(0)


def _largest_singular_values(weight: Tensor, group: UnitGroup) -> Tensor:
    # For a filter the matrix is input channels by kernel positions; otherwise the unit's rows.
    shape = weight.shape[:2] if weight.ndim > 2 else (group.size, group.width)
    matrices = weight.reshape(*shape, -1)
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    found: Tensor = torch.linalg.eigvalsh(matrices @ matrices.mT)[:, -1].clamp(min=0).sqrt()
    return found
