"""Scoring, ranking and pruning of units, for any architecture with unit groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Batch, Samples, batches
from mmdefense.kernels.hooks import mode
from mmdefense.protocol import TaskAdapter, UnitGroup
from mmdefense.runtime.memory import in_parts

__all__ = [
    "gradient_norms",
    "kth_smallest",
    "mask_out",
    "mean_activations",
    "parameters_by_name",
    "prune",
    "pruning_masks",
    "rank",
    "relative_change",
    "select_sub_weights",
    "unit_rows",
    "weight_change",
    "zero",
]

B = TypeVar("B", bound=Batch)

Unit = tuple[int, int]
"""Index of a group, and index of a unit within it."""


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters by name; a shared one has an entry for each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def unit_rows(tensor: Tensor, axis: int, group: UnitGroup) -> Tensor:
    """View a parameter-shaped tensor as one row per unit, ``(U, -1)``; a copy if necessary."""
    return tensor.movedim(axis, 0).reshape(group.size, -1)


def _weights(group: UnitGroup, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, int]]:
    """Yield the weight matrices of a group, without biases and norms, each with its axis."""
    return ((name, axis) for name, axis in group.axes.items() if tensors[name].ndim > 1)


def _sums(tensors: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
    """Return the sum over the weights of each unit, shape ``(U,)``.

    In float64, so that a ranking does not depend on the order of summation.
    """
    rows = [unit_rows(tensors[name], axis, group) for name, axis in _weights(group, tensors)]
    return torch.stack([row.sum(1, dtype=torch.float64) for row in rows]).sum(0)


def weight_change(change: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> list[Tensor]:
    """Return each unit's weight change: the sum of the change of its weights.

    Args:
        change: Absolute change ``|after - before|`` by parameter name.
        groups: G unit groups.

    Returns:
        G tensors of shape ``(U,)``. This is the NWC of TSBD (L1, biases and norms left out).
    """
    return [_sums(change, group) for group in groups]


def gradient_norms(gradients: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> list[Tensor]:
    """Return the L2 norm of the gradient of each unit's weights, G tensors of shape ``(U,)``."""
    squares = {name: gradient.square() for name, gradient in gradients.items()}
    return [_sums(squares, group).sqrt() for group in groups]


def mean_activations(
    adapter: TaskAdapter[B], samples: Samples[B], groups: Sequence[UnitGroup], batch_size: int = 256
) -> list[Tensor]:
    """Return the mean pooled activation of each unit in eval mode, G tensors of shape ``(U,)``."""
    layers = [group.layer for group in groups]
    total: dict[str, Tensor] = {}
    with mode(adapter.model, train=False):
        for batch in batches(samples, batch_size):
            found = in_parts(lambda b: adapter.features(b, layers), batch, "reading", adapter.model)
            for layer, values in (pair for each in found for pair in each.items()):
                total[layer] = total.get(layer, 0) + values.double().sum(0)
    return [total[layer] / len(samples) for layer in layers]


def rank(scores: Sequence[Tensor], *, descending: bool) -> list[Unit]:
    """Return all units of all groups sorted by score; ties keep their order."""
    flat = torch.cat([score.detach().cpu() for score in scores])
    groups = torch.cat([torch.full((len(s),), g) for g, s in enumerate(scores)])
    units = torch.cat([torch.arange(len(s)) for s in scores])
    order = flat.argsort(descending=descending, stable=True)
    return list(zip(groups[order].tolist(), units[order].tolist(), strict=True))


def _by_group(chosen: Iterable[Unit]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for group, unit in chosen:
        found.setdefault(group, []).append(unit)
    return found


def _indices(group: UnitGroup, units: Sequence[int], device: torch.device) -> Tensor:
    first = torch.tensor(units, device=device) * group.width
    return (first[:, None] + torch.arange(group.width, device=device)).flatten()


def prune(model: nn.Module, groups: Sequence[UnitGroup], chosen: Iterable[Unit]) -> None:
    """Zero every parameter entry of the chosen units, in place.

    Args:
        model: The model to prune.
        groups: Its unit groups.
        chosen: Units, each as the index of its group and its index within it.

    Example:
        >>> groups = adapter.unit_groups()
        >>> prune(model, groups, [(0, 2)])
        >>> model.conv.weight.flatten(1).count_nonzero(1)
        tensor([9, 9, 0, 9])
    """
    parameters = _parameters(model)
    with torch.no_grad():
        for index, units in _by_group(chosen).items():
            group = groups[index]
            for name, axis in group.axes.items():
                where = _indices(group, units, parameters[name].device)
                parameters[name].index_fill_(axis, where, 0)


def mask_out(model: nn.Module, groups: Sequence[UnitGroup], chosen: Iterable[Unit]) -> None:
    """Zero the parameters that the masks of the chosen units multiply, in place; biases stay.

    This is how ANP and RNP prune: for a filter with BatchNorm, only the norm's weight is zeroed. It
    has the effect of zero masks in :class:`~mmdefense.kernels.coordinates.UnitMasks` without
    biases.
    """
    parameters = _parameters(model)
    with torch.no_grad():
        for index, units in _by_group(chosen).items():
            group = groups[index]
            for name, axis in group.outer.items():
                if name.rpartition(".")[2] != "bias":
                    where = _indices(group, units, parameters[name].device)
                    parameters[name].index_fill_(axis, where, 0)


def pruning_masks(
    model: nn.Module, groups: Sequence[UnitGroup], chosen: Iterable[Unit]
) -> dict[str, Tensor]:
    """Return a mask for each parameter of the chosen units: 0 at their entries, else 1."""
    parameters = _parameters(model)
    masks: dict[str, Tensor] = {}
    for index, units in _by_group(chosen).items():
        group = groups[index]
        for name, axis in group.axes.items():
            mask = masks.setdefault(name, torch.ones_like(parameters[name]))
            mask.index_fill_(axis, _indices(group, units, mask.device), 0)
    return masks


def select_sub_weights(
    change: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    chosen: Sequence[Unit],
    share: float,
) -> dict[str, Tensor]:
    """Mark the weights that changed most, pooled over the chosen units.

    The threshold is the smallest of the ``int(share * M)`` largest of the M absolute changes of
    all chosen units together; entries equal to it are marked too.

    Args:
        change: Absolute change by parameter name.
        groups: G unit groups.
        chosen: Units to draw from.
        share: The paper's sub-weight ratio m, in ``(0, 1]``.

    Returns:
        By parameter name, true where a weight is marked; parameters without marked weights are
        omitted.
    """
    if not chosen:
        return {}
    places = [
        (name, axis, _indices(groups[index], units, change[name].device))
        for index, units in _by_group(chosen).items()
        for name, axis in _weights(groups[index], change)
    ]
    rows = [change[name].index_select(axis, where) for name, axis, where in places]
    pool = torch.cat([row.flatten() for row in rows])
    threshold = kth_smallest(pool, len(pool) - max(1, int(share * len(pool))) + 1)
    marked: dict[str, Tensor] = {}
    for (name, axis, where), row in zip(places, rows, strict=True):
        mask = marked.setdefault(name, torch.zeros_like(change[name], dtype=torch.bool))
        mask.index_copy_(axis, where, row >= threshold)
    return marked


def kth_smallest(values: Tensor, k: int, stride: int = 256) -> Tensor:
    """Return the k-th smallest entry, exactly as ``values.kthvalue(k)``, several times faster.

    Two entries of a sorted sample bracket it, and the search continues between them (Floyd, Rivest.
    *Expected Time Bounds for Selection*. CACM 18(3), 1975). If the bracket misses, the result is
    still correct, only slower.

    Args:
        values: Shape ``(M,)``.
        k: Rank, from 1.
        stride: Every ``stride``-th entry is in the sample.
    """
    sample = values[::stride].sort().values
    centre, spread = k * len(sample) // len(values), 3 * math.isqrt(len(sample))
    low = sample[max(0, centre - spread)]
    high = sample[min(len(sample) - 1, centre + spread)]
    below = int((values < low).count_nonzero())
    inside = values.masked_select((low <= values) & (values <= high))
    if not below < k <= below + len(inside):
        inside, below = values, 0
    return inside.kthvalue(k - below).values


def zero(model: nn.Module, marked: Mapping[str, Tensor]) -> None:
    """Set the marked parameter entries to zero, in place."""
    parameters = _parameters(model)
    with torch.no_grad():
        for name, mask in marked.items():
            parameters[name].masked_fill_(mask, 0)


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return a detached copy of all parameters by name."""
    return {name: value.detach().clone() for name, value in _parameters(model).items()}


def restore(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copy parameters back into ``model`` by name, in place."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(parameters[name])


def relative_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Return ``||after - before|| / ||before||`` of each floating-point tensor."""
    change = {}
    for name, old in before.items():
        if old.is_floating_point():
            norm = float(old.double().norm())
            moved = float((after[name].double() - old.double()).norm())
            change[name] = moved / norm if norm else float(moved > 0)
    return change
