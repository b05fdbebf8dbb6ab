"""A grid as one page to sort and filter: it opens from disk and needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from mmdefense.checkpoints.runs import write_atomically
from mmdefense.report.page import template

__all__ = ["leaderboard", "write_leaderboard"]

_AXES = ("task", "case", "net", "attack", "defense", "views", "clean", "kind")
_NAMES = {"clean": "share of clean data", "kind": "kind of clean data"}
_FILTERS = ("task", "attack", "net", "defense", "views", "clean", "kind")
_COLUMNS = (
    ("case", "Victim", "text"),
    ("defense", "Defense", "text"),
    ("acc_after", "ACC %", "rate"),
    ("asr_after", "ASR %", "rate"),
    ("ra_after", "RA %", "rate"),
    ("der", "DER %", "rate"),
    ("asr_retuned", "ASR after retuning %", "rate"),
    ("asr_retuned_twin", "Clean twin after retuning %", "rate"),
    ("seconds", "Seconds", "seconds"),
    ("views", "Views", "text"),
    ("clean", "Clean %", "rate"),
    ("kind", "Clean data", "text"),
)
"""Key, heading and kind of each column; one that is the same in all rows is named once above."""

_RATES = ("acc_after", "asr_after", "ra_after", "der", "acc_before", "asr_before", "seconds")
_RETUNED = ("asr_retuned", "asr_retuned_twin")
_MEASURED = (*_RATES, *_RETUNED)
"""What has a column where it was measured for some cell."""


def write_leaderboard(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write the page of a grid, atomically, and return its path; see :func:`leaderboard`."""
    text = leaderboard(rows)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def leaderboard(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the page of measured cells as HTML.

    Args:
        rows: A row for each cell, rates as fractions; ``record`` is a link to its record.
    """
    script = files("mmdefense.report").joinpath("templates/leaderboard.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = list(_groups(rows))
    varied = {axis for axis in _AXES if len({group[axis] for group in groups}) > 1}
    varied |= {"case", "defense"}
    hidden = {axis for axis in _AXES if axis not in varied}
    hidden |= {name for name in _MEASURED if all(group[name] is None for group in groups)}
    # '<' would end the element that holds the data
    data = json.dumps(groups).replace("<", "\\u003c")
    return template("leaderboard.html.j2").render(
        groups=groups,
        filters=[axis for axis in _FILTERS if axis in varied],
        columns=[column for column in _COLUMNS if column[0] not in hidden],
        same=[f"{name}: {shown}" for name, shown in _same(groups, varied)],
        data=Markup(data),
        script=Markup(script),
        digest=digest,
    )


def _same(groups: Sequence[Mapping[str, Any]], varied: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield what all rows have in common, each with what it is called."""
    for axis in ("task", "views", "clean", "kind"):
        if groups and axis not in varied:
            value = groups[0][axis]
            shown = f"{100 * value:g} %" if isinstance(value, float) else str(value)
            yield _NAMES.get(axis, axis), shown


def _groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one row for the seeds of a cell: means and standard deviations."""
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(tuple(row.get(axis) for axis in _AXES), []).append(row)
    for key, seeds in cells.items():
        seeds = sorted(seeds, key=lambda row: int(row["seed"]))
        yield {
            **dict(zip(_AXES, key, strict=True)),
            **{name: _mean(seeds, name) for name in _MEASURED},
            "records": [[str(row["seed"]), row["record"]] for row in seeds],
        }


def _mean(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    known = [float(row[name]) for row in rows if row[name] is not None]
    if not known:
        return None
    spread = {"sd": stdev(known)} if len(known) > 1 else {}
    return {"mean": fmean(known), **spread}
