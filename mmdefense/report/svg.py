"""Draws with matplotlib into inline SVG whose colours and typeface are those of the page.

Each colour here is a stand-in that becomes a CSS variable, so that one drawing is right in light
mode, in dark mode and on paper. Text stays text: it can be searched, copied and read aloud.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["AFTER", "ATTACK", "BEFORE", "GRID", "INK", "MUTED", "PAPER", "SERIES", "draw"]

INK, MUTED, GRID, PAPER = "#fe0001", "#fe0002", "#fe0003", "#fe0004"
SERIES = tuple(f"#fe01{number:02x}" for number in range(1, 9))
AFTER, ATTACK, BEFORE = SERIES[0], SERIES[1], MUTED  # ACC and "after" are blue, ASR is orange

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
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "mmdefense",  # the same record gives the same page, byte for byte
    "text.color": INK,
    "text.parse_math": False,  # a layer or a class may be called "$x"
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_LOCK = threading.Lock()  # matplotlib's settings are one dict for all threads


def draw(
    paint: Callable[[Axes], None], *, prefix: str, alt: str, size: tuple[float, float] = (4.6, 2.7)
) -> Markup:
    """Return an inline ``<svg>`` of what ``paint`` puts on a pair of axes.

    Args:
        paint: Draws on the axes it is given, in the colours of this module.
        prefix: Makes the ids inside the drawing unique on the page.
        alt: What a reader who cannot see the drawing is told.
        size: Width and height in inches at 9 pt text; the page scales it.
    """
    buffer = io.StringIO()
    with _LOCK, matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(buffer.getvalue(), prefix, alt)


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
