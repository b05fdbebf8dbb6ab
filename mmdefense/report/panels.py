"""Plots as HTML: each kind of panel in its own way, those of charts as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mmdefense.errors import BadInputError
from mmdefense.plots.base import Panel, Plot
from mmdefense.plots.images import ImageGrid
from mmdefense.plots.texts import TextTable
from mmdefense.report.images import image_markup
from mmdefense.report.svg import svg_markup
from mmdefense.report.texts import text_markup

__all__ = ["ShownPlot", "markup", "shown_plots"]


@dataclass(frozen=True)
class ShownPlot:
    """A plot as the template has it.

    Attributes:
        number: Its number on the page, from 1.
        plot: What it is.
        panels: Title and HTML of each panel.
    """

    number: int
    plot: Plot
    panels: tuple[tuple[str, Markup], ...]


def shown_plots(plots: Sequence[Any]) -> list[ShownPlot]:
    """Return plots as HTML.

    Raises:
        BadInputError: If one of them is no plot.
    """
    shown = []
    for number, plot in enumerate(plots, 1):
        if not isinstance(plot, Plot):
            raise BadInputError(
                f"a page shows instances of mmdefense.plots.base.Plot, got {type(plot).__name__}; "
                "wrap the data in a plot of its own kind"
            )
        panels = tuple(
            (panel.title, markup(panel, f"f{number}p{place}"))
            for place, panel in enumerate(plot.panels(), 1)
        )
        shown.append(ShownPlot(number, plot, panels))
    return shown


def markup(panel: Panel, prefix: str) -> Markup:
    """Return a panel as HTML whose ids start with ``prefix``.

    Raises:
        BadInputError: If it is no panel.
    """
    match panel:
        case ImageGrid():
            return image_markup(panel)
        case TextTable():
            return text_markup(panel)
        case Panel():
            return svg_markup(panel, prefix)
    raise BadInputError(
        f"a plot is made of instances of mmdefense.plots.base.Panel, got {type(panel).__name__}"
    )
