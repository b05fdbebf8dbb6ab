"""Which units a trigger changes, and how well a defense's order of units finds them.

Both need the true trigger: they judge a defense after the fact, and none may choose by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mmdefense.data.batch import Batch, batches
from mmdefense.errors import BadInputError
from mmdefense.kernels.hooks import mode
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.protocol import TaskAdapter

__all__ = ["neuron_coverage_ratio", "trigger_activated_change"]

B = TypeVar("B", bound=Batch)


def trigger_activated_change(
    adapter: TaskAdapter[B],
    triggered: TriggeredSamples[B],
    layers: Sequence[str] | None = None,
    batch_size: int = 256,
) -> dict[str, Tensor]:
    """Return the TAC of each unit: mean over samples of ``|a(x triggered) - a(x clean)|``.

    ``a`` is the activation pooled to one value per unit, as the adapter gives it; BackdoorBench
    sums the differences of all positions instead.

    Args:
        adapter: The model to look at; it is not changed.
        triggered: Triggered inputs and their clean twins.
        layers: Layers of the adapter's unit groups; none takes all.
        batch_size: Samples per forward pass.

    Returns:
        For each layer a tensor of shape ``(U,)``, on the CPU.

    References:
        Zheng, Tang, Li, Liu. *Data-free Backdoor Removal based on Channel Lipschitzness* (CLP).
        ECCV 2022. arXiv:2208.03111
    """
    names = list(layers) if layers is not None else [g.layer for g in adapter.unit_groups()]
    pairs = zip(
        batches(triggered.samples, batch_size), batches(triggered.clean, batch_size), strict=True
    )
    totals: dict[str, Tensor] = {}
    with mode(adapter.model, train=False):
        for attacked, clean in pairs:
            after, before = adapter.features(attacked, names), adapter.features(clean, names)
            for name in names:
                change = (after[name] - before[name]).abs().double().sum(0)
                totals[name] = totals.get(name, torch.zeros_like(change)) + change
    return {name: (total / len(triggered)).float().cpu() for name, total in totals.items()}


def neuron_coverage_ratio(order: Tensor, change: Tensor, fraction: float) -> float:
    """Return the share of the units with the largest TAC that an order puts first, in ``[0, 1]``.

    Both tops hold ``fraction`` of all units, at least one; chance gives ``fraction``. TSBD plots
    this ratio (Fig. 4) without a formula; the overlap of equal-sized tops is our reading.

    Args:
        order: All units, the one to remove first in front, shape ``(U,)``.
        change: TAC of each unit, shape ``(U,)``; of several layers, concatenated.
        fraction: Size of the tops, in ``(0, 1]``.

    Raises:
        BadInputError: If ``order`` is no permutation of the units or ``fraction`` out of range.

    References:
        Lin, Liu, Wei, Li, Xiong. *Unveiling and Mitigating Backdoor Vulnerabilities based on
        Unlearning Weight Changes and Backdoor Activeness* (TSBD). NeurIPS 2024. arXiv:2405.20291
    """
    if not 0 < fraction <= 1:
        raise BadInputError(f"fraction must lie in (0, 1], got {fraction}")
    every = torch.arange(len(change), device=order.device)
    if order.shape != every.shape or not torch.equal(order.sort().values, every):
        raise BadInputError(
            f"order must hold each of the {len(change)} units once, got {len(order)} entries"
        )
    count = max(1, round(fraction * len(change)))
    first = set(order[:count].tolist())
    return len(first & set(change.topk(count).indices.tolist())) / count
