"""The three phases of pruning: nothing happens, the backdoor goes, the task goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmdefense.data.batch import Samples
from mmdefense.kernels.pruning_curve import head_activations, pruning_curve
from mmdefense.kernels.units import rank
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.plots.pruning_curve import PruningPhases
from mmdefense.protocol import HeadAdapter

__all__ = ["Phases", "pruning_phases"]

_STEP = 0.05
"""Ours: a rate that fell by so much has left its phase."""


@dataclass(frozen=True)
class Phases:
    """ACC and ASR while the features before the output layer are pruned, most dormant first.

    Attributes:
        fractions: Share of the features pruned, from 0 to 1.
        acc: ACC at each, in ``[0, 1]``.
        asr: ASR at each.
    """

    fractions: tuple[float, ...]
    acc: tuple[float, ...]
    asr: tuple[float, ...]

    @property
    def backdoor_falls(self) -> float:
        """Share of the features from which on the ASR is 5 points below its start; 1 if never."""
        return self._fallen(self.asr)

    @property
    def task_falls(self) -> float:
        """Share of the features from which on the ACC is 5 points below its start; 1 if never."""
        return self._fallen(self.acc)

    def asr_before_the_task_falls(self) -> float:
        """Return the least ASR while the ACC is within 5 points of its start."""
        kept = [
            asr for acc, asr in zip(self.acc, self.asr, strict=True) if acc >= self.acc[0] - _STEP
        ]
        return min(kept)

    def plot(self) -> PruningPhases:
        """Return the plot, with a mark where the task begins to fall."""
        return PruningPhases(self.fractions, self.acc, self.asr, self.task_falls)

    def _fallen(self, rates: tuple[float, ...]) -> float:
        low = [f for f, rate in zip(self.fractions, rates, strict=True) if rate < rates[0] - _STEP]
        return low[0] if low else 1.0


def pruning_phases(
    adapter: HeadAdapter[Any],
    clean: Samples[Any],
    test: Samples[Any],
    triggered: TriggeredSamples[Any],
) -> Phases:
    """Measure ACC and ASR after each pruned feature, in the order of fine-pruning.

    Args:
        adapter: A model whose output layer is linear; it is left as it is.
        clean: Clean samples, whose mean activation gives the order.
        test: Clean test samples.
        triggered: Triggered test samples.
    """
    order = [unit for _, unit in rank([head_activations(adapter, clean)], descending=False)]
    counts = list(range(len(order) + 1))
    acc = pruning_curve(adapter, test, order, counts)
    asr = pruning_curve(adapter, triggered.samples, order, counts)
    fractions = tuple(count / len(order) for count in counts)
    return Phases(fractions, tuple(acc.tolist()), tuple(asr.tolist()))
