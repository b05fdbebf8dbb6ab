"""How many of the units that a trigger changes most each order of pruning puts first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.panels import Curve, Curves

__all__ = ["UnitCoverage"]


@dataclass(frozen=True, eq=False)
class UnitCoverage(Plot):
    """The neuron coverage ratio of several orders of units.

    Attributes:
        fractions: Share of all units, ``(F,)`` in ``(0, 1]``.
        ratios: For each order the share of the units with the largest TAC that it puts among the
            first, ``(F,)`` in ``[0, 1]``, by name.
    """

    fractions: Numbers
    ratios: Mapping[str, Numbers]

    title = "Coverage of the units that the trigger changes"
    caption = (
        "Of the share of units with the largest trigger-activated change (TAC), how many an order "
        "prunes among as many units (TSBD, arXiv:2405.20291, Fig. 4). A random order lies on the "
        "diagonal. TAC needs the true trigger: it judges an order, and no defense sees it."
    )

    def panels(self) -> list[Curves]:
        """Return a line for each order."""
        curves = [Curve(name, self.fractions, values) for name, values in self.ratios.items()]
        return [Curves(curves, "units", "coverage", percent="xy")]
