"""Draws with matplotlib into inline SVG whose colours and typeface are those of the page.

Each colour of a plot becomes a CSS variable, so that one drawing is right in light mode, in dark
mode and on paper. Text stays text: it can be searched, copied and read aloud.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mmdefense.plots.base import Panel
from mmdefense.plots.colors import GRID, INK, MUTED, PAPER, SERIES

__all__ = ["svg_markup"]

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)},
}
_STYLE: Any = {  # its type in matplotlib is a literal of three hundred keys
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "mmdefense",  # the same record gives the same page, byte for byte
    "text.color": INK,
    "text.parse_math": False,  # a layer or a class may be called "$x"
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_LOCK = threading.Lock()  # matplotlib's settings are one dict for all threads


def svg_markup(panel: Panel, prefix: str) -> Markup:
    """Return an inline ``<svg>`` of what a panel draws, whose ids start with ``prefix``."""
    buffer = io.StringIO()
    with _LOCK, matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=panel.size, layout="constrained")
        panel.draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(buffer.getvalue(), prefix, panel.describe())


def _inline(svg: str, prefix: str, alt: str) -> Markup:
    """Cut a standalone SVG file down to an element of an HTML page."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', body)
    assert view is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    opening = f'<svg class="plot" role="img" aria-label="{escape(alt)}" {view.group()}>'
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: opening, body))
