"""How active each unit is on clean data."""

from __future__ import annotations

from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.panels import Histogram

__all__ = ["Activeness"]


@dataclass(frozen=True, eq=False)
class Activeness(Plot):
    """The gradient norm of every unit on clean data, before and after.

    Attributes:
        before: Gradient norm of each unit of the given model, any shape.
        after: The same of the returned model.
    """

    before: Numbers
    after: Numbers | None = None

    title = "Neuron activeness"
    caption = (
        "Gradient norm of each unit on clean data, on a logarithmic scale; zeros stand in the "
        "first bin. A backdoored model has more units that are very active; purified, the tail at "
        "the right should be shorter."
    )

    def panels(self) -> list[Histogram]:
        """Return a histogram of the norms."""
        series = {"before": self.before} | ({} if self.after is None else {"after": self.after})
        return [Histogram(series, "gradient norm per unit", log=True)]
