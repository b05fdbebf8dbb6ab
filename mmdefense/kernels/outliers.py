"""Outlier detection: which values stand out, and which targets have abnormally cheap triggers.

References:
    [NC] Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao. *Neural Cleanse: Identifying and Mitigating
    Backdoor Attacks in Neural Networks*. IEEE S&P 2019. Here the index is computed from costs: the
    fraction of samples that a trigger misses plus the fraction of an input that it changes. If all
    triggers work, the size decides; if all have the same size, the success. The logarithm of the
    cost is used, since costs differ by factors, and an outlier must cost at most a third of the
    median (both ours): among ten targets an index beyond 2 is common.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from mmdefense.kernels.inversion import Recovered

__all__ = ["CROWD", "MANY", "TargetTrigger", "anomaly_index", "cheapest_triggers", "index_bound"]

INDEX, SHARE, CROWD = 2.0, 1 / 3, 5
"""The anomaly index of an outlier [NC], its cost relative to the median, and the number of targets
needed for an index; the last two are our choice."""
MANY = 64
"""With more targets than this, they are screened first. Our choice."""
CHEAPEST, FLOOR = 1e-3, 0.25
"""Lower bounds of a cost and of the scaled MAD of log costs; less is noise. Our choice."""


def anomaly_index(values: Tensor, *, floor: float = 0.0) -> Tensor:
    """Return ``(x - median) / (1.4826 MAD)`` of each value; zero if the MAD is zero.

    The factor 1.4826 turns the median absolute deviation of normal values into their standard
    deviation. [NC]

    Args:
        values: Shape ``(N,)``.
        floor: Lower bound of ``1.4826 MAD``: differences below it are noise.
    """
    centred = values - values.median()
    scale = (1.4826 * centred.abs().median()).clamp(min=floor)
    return centred / scale if scale > 0 else torch.zeros_like(centred)


@dataclass(frozen=True, kw_only=True)
class TargetTrigger:
    """The cheapest trigger of one family for one target.

    Attributes:
        target: The target.
        row: Its row among the recovered triggers.
        success: Fraction of samples that it sends to the target.
        size: Fraction of an input that it changes.
        index: How far its log cost is below the median over all targets, in scaled median absolute
            deviations; zero if there are too few targets.
        works: Whether its success reaches the threshold within the family's budget.
        is_outlier: Whether it works and no other target is nearly as cheap.
    """

    target: int
    row: int
    success: float
    size: float
    index: float
    works: bool
    is_outlier: bool


def cheapest_triggers(found: Recovered, total: int = 0) -> list[TargetTrigger]:
    """Return the cheapest trigger of a family for each target, in ascending order of targets.

    The cost is the fraction of samples missed plus the fraction of an input changed. Outliers are
    determined by anomaly index and by cost relative to the median.

    Args:
        found: Result of a search.
        total: Number of screened targets, if there was a screening.
    """
    cost = (1 - found.success + found.size).clamp(min=CHEAPEST)
    rows = []
    for target in sorted(set(found.targets.tolist())):
        mine = (found.targets == target).nonzero().flatten()
        rows.append(int(mine[cost[mine].argmin()]))
    costs = cost[rows]
    crowd = len(rows) >= CROWD
    index = -anomaly_index(costs.log(), floor=FLOOR) if crowd else torch.zeros_like(costs)
    far, cheap = index > index_bound(total), costs <= SHARE * costs.median()
    return [
        TargetTrigger(
            target=int(found.targets[row]),
            row=row,
            success=float(found.success[row]),
            size=float(found.size[row]),
            index=float(index[place]),
            works=bool(found.accepted[row]),
            is_outlier=bool(found.accepted[row] & far[place] & cheap[place]),
        )
        for place, row in enumerate(rows)
    ]


def index_bound(total: int) -> float:
    """Return the threshold on the anomaly index when the cheapest of ``total`` targets were chosen.

    By chance, the cheapest of a thousand is further out than the cheapest of ten. In expectation as
    many of ``total`` normal values exceed the threshold as exceed 2 among ten. Our choice.
    """
    normal = NormalDist()
    return normal.inv_cdf(1 - (1 - normal.cdf(INDEX)) * 10 / total) if total > MANY else INDEX
