"""Numbers as a person reads them: rates in percent, with one decimal, and times in words."""

from __future__ import annotations

import math

__all__ = ["DASH", "MINUS", "duration", "number", "percent", "points"]

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(rate: float | None) -> str:
    """Return a rate in percent without the sign, for a column that has it; a dash for none."""
    return f"{100 * rate:.1f}" if rate is not None and _known(rate) else DASH


def percent(rate: float | None) -> str:
    """Return a rate in percent with the sign, for a sentence."""
    return f"{number(rate)}%" if _known(rate) else "not measured"


def points(rate: float | None, *, signed: bool = False) -> str:
    """Return a difference of rates in percentage points, with a true minus sign."""
    if rate is None or not _known(rate):
        return DASH
    text = f"{100 * rate:+.1f}" if signed else f"{100 * rate:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", MINUS)


def duration(seconds: float) -> str:
    """Return a time: tenths of seconds below a minute, then minutes, then hours."""
    if not _known(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
