"""What pruning costs, unit by unit."""

from __future__ import annotations

from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.colors import AFTER, ATTACK
from mmdefense.plots.panels import Curve, Curves

__all__ = ["PruningCurve"]


@dataclass(frozen=True, eq=False)
class PruningCurve(Plot):
    """What pruning costs and, where the attack is known, what it buys.

    Attributes:
        fractions: Share of the units pruned, ``(N,)`` in ``[0, 1]``.
        accuracy: Hold-out accuracy at each, ``(N,)`` in ``[0, 1]``.
        chosen: The fraction that the defense chose.
        asr: Attack success rate at each, ``(N,)``; not seen by the defense.
    """

    fractions: Numbers
    accuracy: Numbers
    chosen: float | None = None
    asr: Numbers | None = None

    title = "Pruning curve"

    @property
    def caption(self) -> str:
        """How to read it, and whether the defense saw the ASR."""
        seen = " The ASR was added afterwards: the defense chose by accuracy alone."
        return (
            "Units are pruned in the defense's order, from left to right. A backdoor is separable "
            "where the ASR falls long before the accuracy does."
            f"{'' if self.asr is None else seen}"
        )

    def panels(self) -> list[Curves]:
        """Return the curves over the share of units that are pruned."""
        curves = [Curve("hold-out accuracy", self.fractions, self.accuracy, AFTER)]
        if self.asr is not None:
            curves.append(Curve("ASR (lower is better)", self.fractions, self.asr, ATTACK))
        return [
            Curves(
                curves,
                "units pruned",
                "rate",
                percent="xy",
                mark=self.chosen,
                mark_label="chosen",
            )
        ]
