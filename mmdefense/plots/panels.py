"""The kinds of panel that plots are made of: curves, histogram, bars, interval and scatter.

Each is a small dataclass of numbers that can say what it shows and draw itself on a pair of axes.
Another kind is another :class:`~mmdefense.plots.base.Panel`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdefense.errors import BadInputError
from mmdefense.plots.base import WIDTH, Array, Panel, as_array, say
from mmdefense.plots.colors import AFTER, ATTACK, BEFORE, INK, MUTED, PAPER, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LABEL", "Bars", "Curve", "Curves", "Histogram", "Interval", "Scatter", "tick"]

LABEL = 28
"""Letters of the name of a bar; ours."""
_MINUS = "\N{MINUS SIGN}"
_CURVE_POINTS, _SCATTER_POINTS = 400, 1200  # ours; keep a page small
_LINE = 46  # letters of a legend side by side, its signs included
_LABEL_BOX: Any = {"boxstyle": "round,pad=0.15", "fc": PAPER, "ec": "none", "alpha": 0.75}


@dataclass(frozen=True, eq=False)
class Curve:
    """One line of a :class:`Curves`.

    Attributes:
        name: For the legend.
        x: Shape ``(N,)``.
        y: Shape ``(N,)``; NaN leaves a gap.
        color: One of :mod:`mmdefense.plots.colors`; by default the next of the series.
    """

    name: str
    x: Any
    y: Any
    color: str = ""

    def __post_init__(self) -> None:
        x, y = as_array(self.x).ravel(), as_array(self.y).ravel()
        if len(x) != len(y) or not len(x):
            raise BadInputError(
                f"curve {self.name!r} must have as many x as y values and at least one, "
                f"got {len(x)} and {len(y)}"
            )
        keep = _thin(len(x), _CURVE_POINTS)
        object.__setattr__(self, "x", x[keep])
        object.__setattr__(self, "y", y[keep])


@dataclass(frozen=True, eq=False)
class Curves(Panel):
    """Lines over a common axis.

    Attributes:
        curves: The lines.
        xlabel: Name and unit of the horizontal axis.
        ylabel: Name and unit of the vertical axis.
        percent: The axes whose values are fractions to be shown in percent: ``"x"``, ``"y"``,
            ``"xy"`` or none of them.
        mark: A value of x to mark with a vertical line.
        mark_label: What stands beside that line.
        filled: Whether the area below each line is filled.
        log: Whether the vertical axis is logarithmic; it then spans at most six decades.
    """

    curves: Sequence[Curve]
    xlabel: str
    ylabel: str
    percent: str = ""
    mark: float | None = None
    mark_label: str = ""
    filled: bool = False
    log: bool = False

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches; each line of the legend adds to it."""
        return _with_legend([_short(curve.name) for curve in self.curves])

    def describe(self) -> str:
        """Return the first, last and extreme values of each line."""
        px, py = "x" in self.percent, "y" in self.percent
        said = [f"Line chart of {self.ylabel} against {self.xlabel}."]
        for curve in self.curves:
            said.append(
                f"{curve.name}: {_show(curve.y[0], py)} at {_show(curve.x[0], px)}, "
                f"{_show(curve.y[-1], py)} at {_show(curve.x[-1], px)}, "
                f"{_range_in_words(curve.y, py)}."
            )
        if self.mark is not None:
            said.append(f"{self.mark_label or 'Marked'} at {_show(self.mark, px)}.")
        return say(self.title, *said)

    def draw(self, axes: Axes) -> None:
        """Draw on a pair of axes."""
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        for number, curve in enumerate(self.curves):
            color = curve.color or SERIES[number % len(SERIES)]
            dash = ("-", "--", ":", "-.")[number % 4]  # colour is never the only difference
            axes.plot(curve.x, curve.y, dash, color=color, label=_short(curve.name))
            if len(curve.x) == 1:
                axes.plot(curve.x, curve.y, "o", color=color, markersize=4)
            if self.filled:
                axes.fill_between(curve.x, curve.y, color=color, alpha=0.22, linewidth=0)
        if "y" in self.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_ylim(-0.03, 1.03)
        if "x" in self.percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        elif all((curve.x == np.round(curve.x)).all() for curve in self.curves):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if self.mark is not None:
            axes.axvline(self.mark, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            left = self.mark < float(np.mean(axes.get_xlim()))
            axes.annotate(
                _short(self.mark_label),
                (self.mark, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4 if left else -4, -2),
                textcoords="offset points",
                ha="left" if left else "right",
                va="top",
                fontsize=9,
                bbox=_LABEL_BOX,
            )
        if self.log:
            self._stretch(axes)
        axes.margins(x=0.02)
        axes.set(xlabel=_wrapped(self.xlabel), ylabel=_wrapped(self.ylabel, 34))
        _legend(axes)

    def _stretch(self, axes: Axes) -> None:
        """Make the vertical axis logarithmic, from what is above zero."""
        from matplotlib.ticker import LogLocator

        values = np.concatenate([curve.y for curve in self.curves])
        seen = values[np.isfinite(values) & (values > 0)]
        if not len(seen):
            return
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(max(seen.min(), seen.max() * 1e-6) / 2, seen.max() * 2)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_major_formatter(tick)
        axes.yaxis.set_minor_formatter(lambda *_: "")


@dataclass(frozen=True, eq=False)
class Histogram(Panel):
    """How often values occur, one outline per series.

    Attributes:
        series: Values by name, any shape; what is not finite is left out.
        xlabel: Name and unit of the values.
        ylabel: What is counted.
        bins: Number of bins.
        log: Whether the bins are even on a logarithmic scale; values must then be positive, and
            zeros are counted in the first bin.
    """

    series: dict[str, Any]
    xlabel: str
    ylabel: str = "units"
    bins: int = 32
    log: bool = False

    def __post_init__(self) -> None:
        arrays = {name: as_array(values).ravel() for name, values in self.series.items()}
        arrays = {name: values[np.isfinite(values)] for name, values in arrays.items()}
        if not arrays or not all(map(len, arrays.values())):
            raise BadInputError(f"a histogram of {self.xlabel} needs a finite value in each series")
        object.__setattr__(self, "series", arrays)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches; each line of the legend adds to it."""
        return _with_legend([_short(name) for name in self.series])

    def describe(self) -> str:
        """Return the median and range of each series."""
        said = [f"Histogram of {self.xlabel}."]
        for name, values in self.series.items():
            said.append(
                f"{name}: {len(values)} {self.ylabel}, median {np.median(values):.3g}, "
                f"{_range_in_words(values)}."
            )
        return say(self.title, *said)

    def _edges(self) -> Array:
        values = np.concatenate(list(self.series.values()))
        positive = values[values > 0]
        if self.log and len(positive) and positive.min() < positive.max():
            return np.geomspace(positive.min(), positive.max(), self.bins + 1)
        return np.histogram_bin_edges(values, bins=self.bins)

    def draw(self, axes: Axes) -> None:
        """Draw on a pair of axes."""
        from matplotlib.ticker import MaxNLocator

        edges = self._edges()
        colors = (BEFORE, AFTER) if len(self.series) == 2 else SERIES
        for (name, values), color in zip(self.series.items(), colors, strict=False):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
            axes.stairs(counts, edges, fill=True, alpha=0.28, color=color, linewidth=0)
            axes.stairs(counts, edges, color=color, label=_short(name))
        if self.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(tick)
            axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(visible=False, axis="x")
        axes.set(xlabel=_wrapped(self.xlabel), ylabel=_wrapped(self.ylabel, 34))
        _legend(axes)


@dataclass(frozen=True, eq=False)
class Bars(Panel):
    """One horizontal bar per label, with its value written out.

    Attributes:
        labels: What the bars stand for, top first.
        values: Shape ``(N,)``; not finite is shown as "not measured".
        xlabel: Name and unit of the values.
        errors: Standard error of each value, shape ``(N,)``; what is not finite is not shown.
    """

    labels: Sequence[str]
    values: Any
    xlabel: str
    errors: Any = None

    def __post_init__(self) -> None:
        values = as_array(self.values).ravel()
        errors = np.full(len(values), np.nan) if self.errors is None else as_array(self.errors)
        if len(values) != len(self.labels) or not len(values):
            raise BadInputError(
                f"bars must have a value per label and at least one, got {len(self.labels)} labels "
                f"and {len(values)} values"
            )
        if errors.shape != values.shape:
            raise BadInputError(f"bars of {len(values)} values got {errors.size} errors")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "errors", errors)

    def describe(self) -> str:
        """Return all values."""
        bars = zip(self.labels, self.values, self.errors, strict=True)
        return say(
            self.title,
            f"Bar chart of {self.xlabel}.",
            "; ".join(f"{label}: {_with_error(value, error)}" for label, value, error in bars)
            + ".",
        )

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches."""
        return WIDTH, 0.6 + 0.25 * max(2, len(self.values))

    def draw(self, axes: Axes) -> None:
        """Draw on a pair of axes."""
        from matplotlib.ticker import MaxNLocator

        names = [_short(label, LABEL) for label in self.labels]
        places = np.arange(len(names))
        colors = [BEFORE if name == "before" else AFTER for name in names]
        axes.barh(places, np.nan_to_num(self.values, posinf=0, neginf=0), 0.62, color=colors)
        texts = list(map(_with_error, self.values, self.errors))
        for place, value, text in zip(places, self.values, texts, strict=True):
            start = value if np.isfinite(value) else 0.0
            axes.annotate(
                text,
                (start, place),
                xytext=(3 if start >= 0 else -3, 0),
                textcoords="offset points",
                ha="left" if start >= 0 else "right",
                va="center",
                fontsize=9,
            )
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.margins(x=0.08 + 0.035 * max(map(len, texts)))  # room for the texts in narrow panels
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(tick)
        axes.set_xlabel(_wrapped(self.xlabel))


@dataclass(frozen=True)
class Interval(Panel):
    """A value with its confidence interval against a bound.

    Attributes:
        value: The estimate.
        low: Lower end of its interval.
        high: Upper end.
        bound: The line that should not be crossed.
        xlabel: Name and unit.
    """

    value: float
    low: float
    high: float
    bound: float
    xlabel: str

    def describe(self) -> str:
        """Return the numbers."""
        return say(
            self.title,
            f"{self.xlabel}: {_show(self.value)}, interval {_show(self.low)} to "
            f"{_show(self.high)}, bound {_show(self.bound)}.",
        )

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches."""
        return WIDTH, 1.05

    def draw(self, axes: Axes) -> None:
        """Draw on a pair of axes."""
        from matplotlib.ticker import MaxNLocator

        axes.plot([self.low, self.high], [0, 0], color=AFTER, linewidth=3, alpha=0.55)
        axes.plot([self.value], [0], "o", color=AFTER, markersize=6)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.axvline(self.bound, color=ATTACK, linewidth=1.4, linestyle=(0, (3, 2)))
        axes.annotate(
            "bound",
            (self.bound, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            color=ATTACK,
        )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-1, 1.6)
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(tick)
        axes.set_xlabel(_wrapped(self.xlabel))


@dataclass(frozen=True, eq=False)
class Scatter(Panel):
    """Points of a plane by group; its axes have no unit and no ticks.

    Attributes:
        points: Shape ``(N, 2)``.
        groups: Group of each point, shape ``(N,)``, whole numbers.
        names: Name of each group; its number where there is none.
        crossed: Points to be drawn as dark crosses, bool ``(N,)``; none draws no crosses.
        crossed_name: What the crosses are.
    """

    points: Any
    groups: Any
    names: Sequence[str] = ()
    crossed: Any = None
    crossed_name: str = "triggered samples"

    def __post_init__(self) -> None:
        points, groups = as_array(self.points), as_array(self.groups).astype(int)
        crossed = as_array(np.zeros(len(groups)) if self.crossed is None else self.crossed) > 0
        if points.ndim != 2 or points.shape[1] != 2 or not len(points):
            raise BadInputError(f"points must have shape (N, 2), got {points.shape}")
        if not len(points) == len(groups) == len(crossed):
            raise BadInputError(
                f"points, groups and crossed must have one length, got {len(points)}, "
                f"{len(groups)} and {len(crossed)}"
            )
        keep = _thin(len(points), _SCATTER_POINTS)
        object.__setattr__(self, "points", points[keep])
        object.__setattr__(self, "groups", groups[keep])
        object.__setattr__(self, "crossed", crossed[keep])

    def describe(self) -> str:
        """Return how many points each kind has."""
        plain = int((~self.crossed).sum())
        count = len(np.unique(self.groups[~self.crossed]))
        said = f"Scatter plot of {plain} points in {count} groups"
        crosses = f", and {int(self.crossed.sum())} {self.crossed_name} as crosses"
        return say(self.title, said + (crosses if self.crossed.any() else "") + ".")

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches."""
        return WIDTH, 3.2

    def draw(self, axes: Axes) -> None:
        """Draw on a pair of axes."""
        present = np.unique(self.groups[~self.crossed])
        for number, group in enumerate(present):
            x, y = self.points[(self.groups == group) & ~self.crossed].T
            color = SERIES[number % len(SERIES)]
            shape = "os^D"[number // len(SERIES) % 4]  # beyond the colours there are
            axes.plot(x, y, shape, color=color, markersize=3.4, markeredgewidth=0, alpha=0.75)
        if self.crossed.any():
            x, y = self.points[self.crossed].T
            name = _short(self.crossed_name)
            axes.plot(x, y, "x", color=INK, markersize=3.8, markeredgewidth=0.9, label=name)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), handletextpad=0.2)
        if len(present) <= 20:
            self._name_groups(axes, present)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    def _name_groups(self, axes: Axes, present: NDArray[np.int64]) -> None:
        for group in present:
            x, y = np.median(self.points[(self.groups == group) & ~self.crossed], axis=0)
            name = self.names[group] if 0 <= group < len(self.names) else str(group)
            axes.text(
                x, y, _short(name, 14), ha="center", va="center", weight="bold", bbox=_LABEL_BOX
            )


def _thin(count: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` even indices of ``count``, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def tick(value: float, _: float = 0) -> str:
    """Return the label of a tick at ``value``."""
    return f"{value:g}".replace("-", _MINUS)


def _columns(names: Sequence[str]) -> int:
    """Return how many names of a legend have room side by side; more would squeeze the axes out."""
    return max(1, min(len(names), 3, _LINE // (max(map(len, names)) + 7)))


def _with_legend(names: Sequence[str]) -> tuple[float, float]:
    """Return the size in inches of a panel with a legend of such names above it."""
    rows = -(-len(names) // _columns(names)) if names else 0
    return WIDTH, 2.4 + 0.19 * max(0, rows - 1)


def _legend(axes: Axes) -> None:
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
            ncols=_columns(names),
            columnspacing=1.4,
        )


def _wrapped(label: str, width: int = 48) -> str:
    """Return the name of an axis in lines that fit beside it."""
    return "\n".join(textwrap.wrap(label, width))


def _short(text: str, most: int = 34) -> str:
    """Return ``text`` with its middle cut out where it is long."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def _show(value: float, percent: bool = False) -> str:
    if not np.isfinite(value):
        return "not measured"
    if percent:
        return f"{100 * value:.1f}%"
    return (f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}").replace("-", _MINUS)


def _with_error(value: float, error: float) -> str:
    return _show(value) + (f" ± {error:.2g}" if np.isfinite(error) else "")


def _range_in_words(values: Array, percent: bool = False) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no finite value"
    return f"from {_show(finite.min(), percent)} to {_show(finite.max(), percent)}"
