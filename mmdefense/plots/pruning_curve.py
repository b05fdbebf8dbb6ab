"""What pruning costs, unit by unit, and where the attack is known what it takes away."""

from __future__ import annotations

from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.colors import AFTER, ATTACK
from mmdefense.plots.panels import Curve, Curves

__all__ = ["PruningCurve", "PruningPhases"]


@dataclass(frozen=True, eq=False)
class PruningCurve(Plot):
    """What pruning costs.

    Attributes:
        fractions: Share of the units pruned, ``(N,)`` in ``[0, 1]``.
        accuracy: Hold-out accuracy at each, ``(N,)`` in ``[0, 1]``.
        chosen: The fraction that the defense chose.
    """

    fractions: Numbers
    accuracy: Numbers
    chosen: float | None = None

    title = "Pruning curve"
    caption = "Units are pruned in the defense's order, from left to right."

    def panels(self) -> list[Curves]:
        """Return the curve over the share of units that are pruned."""
        curves = [Curve("hold-out accuracy", self.fractions, self.accuracy, AFTER)]
        return [
            Curves(
                curves,
                "units pruned",
                "hold-out accuracy",
                percent="xy",
                mark=self.chosen,
                mark_label="chosen",
            )
        ]


@dataclass(frozen=True, eq=False)
class PruningPhases(Plot):
    """ACC and ASR on test samples while units are pruned; no defense sees either.

    Attributes:
        fractions: Share of the units pruned, ``(N,)`` in ``[0, 1]``.
        acc: ACC at each, ``(N,)`` in ``[0, 1]``.
        asr: ASR at each, ``(N,)`` in ``[0, 1]``.
        task_falls: Share from which on the ACC is 5 points lower.
    """

    fractions: Numbers
    acc: Numbers
    asr: Numbers
    task_falls: float

    title = "Phases of pruning"
    caption = (
        "Test rates, as units are pruned in the order of their mean activation on clean data, the "
        "least active first (Fine-Pruning, arXiv:1805.12185). A backdoor is separable where the "
        "ASR falls long before the ACC does."
    )

    def panels(self) -> list[Curves]:
        """Return the curves over the share of units that are pruned."""
        curves = [
            Curve("ACC", self.fractions, self.acc, AFTER),
            Curve("ASR", self.fractions, self.asr, ATTACK),
        ]
        return [
            Curves(
                curves,
                "units pruned",
                "rate",
                percent="xy",
                mark=self.task_falls,
                mark_label="ACC 5 points lower",
            )
        ]
