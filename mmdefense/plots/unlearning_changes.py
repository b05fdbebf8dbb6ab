"""How far units move when clean data is unlearnt, against how far when poisoned data is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmdefense.errors import BadInputError
from mmdefense.plots.base import WIDTH, Numbers, Panel, Plot, as_array, say
from mmdefense.plots.colors import AFTER
from mmdefense.plots.panels import Histogram, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ActivenessCompared", "Points", "UnlearningChanges"]


@dataclass(frozen=True, eq=False)
class Points(Panel):
    """Pairs of positive values on logarithmic axes.

    Attributes:
        x: Shape ``(N,)``.
        y: Shape ``(N,)``.
        xlabel: Name and unit of x.
        ylabel: Name and unit of y.
    """

    x: Any
    y: Any
    xlabel: str
    ylabel: str

    def __post_init__(self) -> None:
        x, y = as_array(self.x).ravel(), as_array(self.y).ravel()
        if len(x) != len(y) or not len(x):
            raise BadInputError(f"points need as many x as y values, got {len(x)} and {len(y)}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches."""
        return WIDTH, 3.2

    def describe(self) -> str:
        """Return how many points there are, and of what."""
        return say(self.title, f"{len(self.x)} points of {self.ylabel} against {self.xlabel}.")

    def draw(self, axes: Axes) -> None:
        """Draw on a pair of axes; what is not positive is left out."""
        from matplotlib.ticker import LogLocator

        axes.plot(self.x, self.y, "o", color=AFTER, markersize=3.4, markeredgewidth=0, alpha=0.6)
        axes.set_xscale("log", nonpositive="mask")
        axes.set_yscale("log", nonpositive="mask")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
            axis.set_major_formatter(tick)
            axis.set_minor_formatter(lambda *_: "")
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)


@dataclass(frozen=True, eq=False)
class UnlearningChanges(Plot):
    """The neuron weight change of every unit under clean and under poison unlearning.

    Attributes:
        clean: NWC of each unit when clean data is unlearnt, ``(U,)``.
        poison: NWC of each unit when poisoned data is unlearnt, ``(U,)``.
        correlation: Pearson's coefficient of the two.
    """

    clean: Numbers
    poison: Numbers
    correlation: float

    title = "Neuron weight change under clean and poison unlearning"

    @property
    def caption(self) -> str:
        """What the points are, and their correlation."""
        return (
            "Each point is a unit; on both axes the L1 norm of how far its weights move (TSBD, "
            f"arXiv:2405.20291, Fig. 1). Pearson correlation {self.correlation:.2f}."
        )

    def panels(self) -> list[Points]:
        """Return the points."""
        return [Points(self.clean, self.poison, "NWC, clean data", "NWC, poisoned data")]


@dataclass(frozen=True, eq=False)
class ActivenessCompared(Plot):
    """The gradient norm of every unit in several models.

    Attributes:
        norms: Gradient norm of each unit by name of the model, ``(U,)`` each.
    """

    norms: Mapping[str, Numbers]

    title = "Neuron activeness of several models"
    caption = (
        "Mean gradient norm of each unit over the updates of one epoch of clean unlearning (TSBD, "
        "arXiv:2405.20291, Fig. 1), on a logarithmic scale."
    )

    def panels(self) -> list[Histogram]:
        """Return a histogram of the norms."""
        return [Histogram(dict(self.norms), "gradient norm per unit", log=True)]
