"""How far each unit moves as clean data is unlearned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmdefense.plots.base import Numbers, Plot, as_array
from mmdefense.plots.colors import AFTER
from mmdefense.plots.panels import Curve, Curves

__all__ = ["WeightChange"]


@dataclass(frozen=True, eq=False)
class WeightChange(Plot):
    """The neuron weight change (NWC) of every unit, largest first.

    Attributes:
        change: NWC of each unit during clean unlearning, any shape and order.
        reset: How many of the units that changed most the defense reinitialised.
    """

    change: Numbers
    reset: int | None = None

    title = "Neuron weight change"
    caption = (
        "How far each unit moved while clean data was unlearned; units in descending order. "
        "Units at the left are suspects: a backdoor's neurons tend to change most. A flat curve "
        "singles out none."
    )

    def panels(self) -> list[Curves]:
        """Return the change over the rank of the unit."""
        values = np.sort(as_array(self.change).ravel())[::-1]
        return [
            Curves(
                [Curve("NWC", np.arange(1, len(values) + 1), values, AFTER)],
                "unit, by rank",
                "weight change (NWC)",
                mark=self.reset,
                mark_label="reinitialised up to here",
                filled=True,
            )
        ]
