"""How active each unit is on clean data."""

from __future__ import annotations

from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot, as_array
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

    @property
    def caption(self) -> str:
        """How to read it, with what is there of zeros and of a model after."""
        zeros = any((as_array(values) == 0).any() for values in self._series().values())
        return (
            "Gradient norm of each unit on clean data, on a logarithmic scale"
            f"{'; zeros stand in the first bin' * zeros}. A backdoored model has more units that "
            "are very active"
            f"{'; purified, the tail at the right should be shorter' * (self.after is not None)}."
        )

    def panels(self) -> list[Histogram]:
        """Return a histogram of the norms."""
        return [Histogram(self._series(), "gradient norm per unit", log=True)]

    def _series(self) -> dict[str, Numbers]:
        return {"before": self.before} | ({} if self.after is None else {"after": self.after})
