"""The colours of all plots, as a page has them in light mode; in dark mode it exchanges them."""

from __future__ import annotations

__all__ = ["AFTER", "ATTACK", "BEFORE", "GRID", "INK", "MUTED", "PAPER", "SERIES"]

INK, MUTED, GRID, PAPER = "#1c1e21", "#5b616a", "#e2e0d9", "#fdfcf9"
SERIES = (
    "#1f5fa8",
    "#c2410c",
    "#0b7a5b",
    "#7a46a8",
    "#94690a",
    "#0b7285",
    "#b32d68",
    "#5c7a12",
    "#8c564b",
    "#4f6bd8",
    "#e0457b",
    "#2f9e8f",
    "#c77d0a",
    "#9b59d0",
    "#3f9c35",
    "#d6594c",
    "#4a90b8",
    "#a07d5a",
    "#8a8f2a",
    "#b05fb5",
)
AFTER, ATTACK, BEFORE = SERIES[0], SERIES[1], MUTED  # ACC and "after" are blue, ASR is orange
