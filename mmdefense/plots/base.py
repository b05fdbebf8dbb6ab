"""What a plot is: its data, a title, a caption, and panels that draw themselves.

A new kind is one module: a frozen dataclass of :class:`Plot` whose fields are numbers, texts,
arrays, tensors, or lists, tuples and dicts of them. A defense adds one to ``work.plots``; the page
shows it, and the archive beside the page keeps its fields.
"""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdefense.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["WIDTH", "Array", "Numbers", "Panel", "Plot", "as_array", "say"]

WIDTH = 3.6
"""Inches; ours: at the width of a phone, 9.5 pt are then 12 px."""

Array: TypeAlias = NDArray[np.float64]
Numbers: TypeAlias = Tensor | NDArray[Any] | Sequence[float]
"""What the data of a plot may be given as."""


@dataclass(frozen=True, eq=False)
class Panel(ABC):
    """What one pair of axes shows.

    Attributes:
        title: Heading of this panel; may be empty.
    """

    title: str = field(default="", kw_only=True)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches at 9.5 pt text; narrow, to be read on a phone."""
        return WIDTH, 2.4

    @abstractmethod
    def describe(self) -> str:
        """Return what the panel shows, in words, for a reader who cannot see it."""

    @abstractmethod
    def draw(self, axes: Axes) -> None:
        """Draw on a pair of matplotlib's axes."""


@dataclass(frozen=True, eq=False, repr=False)
class Plot(Shown, ABC):
    """Data for a reader to look at, and how it is shown.

    Attributes:
        of: Whose data it is, such as the name of a defense; stands after the title.
    """

    of: str = field(default="", kw_only=True)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = Shown.__repr__  # type: ignore[method-assign]  # before a dataclass makes one

    @property
    @abstractmethod
    def title(self) -> str:
        """What is shown."""

    @property
    @abstractmethod
    def caption(self) -> str:
        """How to read it, and what it does not say."""

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width of a page."""
        return False

    @property
    def heading(self) -> str:
        """The title, and whose data it is."""
        return f"{self.title}: {self.of}" if self.of else self.title

    @abstractmethod
    def panels(self) -> Sequence[Panel]:
        """Return what stands side by side; nothing where there is nothing to show."""

    def draw(self, axes: Axes | None = None) -> Axes:
        """Draw on a pair of axes, in a notebook for example; several panels share its place.

        Args:
            axes: Of matplotlib; by default pyplot's current ones.

        Returns:
            The axes.
        """
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.gca()
        panels = self.panels()
        if len(panels) == 1:
            panels[0].draw(axes)
        else:
            axes.set_axis_off()
            for number, panel in enumerate(panels):
                width = 1 / len(panels)
                part = axes.inset_axes((width * (number + 0.25), 0.1, width * 0.7, 0.8))
                panel.draw(part)
                if panel.title:
                    part.set_title(panel.title)
        above = axes.get_legend()
        lines = 0 if above is None else len(above.get_texts())
        axes.set_title(self.heading, pad=6.0 + 14 * lines)
        return axes

    def _repr_html_(self) -> str:
        """Return a picture with the caption below it, for a notebook."""
        from matplotlib.figure import Figure

        sizes = [panel.size for panel in self.panels()]
        if not sizes:
            return super()._repr_html_()
        width, height = sum(width for width, _ in sizes), max(height for _, height in sizes)
        figure, picture = Figure(figsize=(1.4 * width, 1.4 * height)), io.BytesIO()
        self.draw(figure.add_subplot())
        figure.savefig(picture, format="png", bbox_inches="tight")
        return (
            f'<figure><img alt="{escape(self.heading)}" src="data:image/png;base64,'
            f'{base64.b64encode(picture.getvalue()).decode()}">'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


def as_array(values: Any) -> Array:
    """Return a tensor on any device, an array or a sequence as float64; none becomes NaN."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def say(*sentences: str) -> str:
    """Join sentences, the first of which is a title without a full stop and may be empty."""
    first, *rest = sentences
    return " ".join([f"{first}."] * bool(first) + [sentence for sentence in rest if sentence])
