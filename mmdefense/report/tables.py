"""The results table: its cells, for page and terminal alike, and the terminal's form of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from mmdefense.metrics.backdoor import Rates
from mmdefense.metrics.definitions import heading
from mmdefense.report.formats import number, percent, points
from mmdefense.report.record import Row
from mmdefense.report.verdict import ASR_GOAL, beats_baseline

__all__ = ["COLUMNS", "TableCell", "TableLine", "columns", "lines", "results_table"]

COLUMNS = (
    ("acc", "ACC", "↑", "higher is better"),
    ("asr", "ASR", "↓", "lower is better"),
    ("ra", "RA", "↑", "higher is better"),
    ("der", "DER", "↑", "higher is better"),
    ("retuned", "ASR after retuning", "↓", "lower is better"),
)
"""Field of :class:`Rates`, heading, arrow and its meaning, in the order of the columns.

Those behind the first stand where they were measured for some row.
"""


@dataclass(frozen=True)
class TableCell:
    """A rate in percent, and its change from before in percentage points.

    Attributes:
        value: For example ``"97.1"``, or a dash.
        change: For example ``"−0.4"``; empty where it is not known, none where it has no meaning.
        tone: ``"good"`` or ``"bad"`` where the field has a bar to clear, else empty.
    """

    value: str
    change: str | None = ""
    tone: str = ""


@dataclass(frozen=True)
class TableLine:
    """One line of the table: a victim before, or what a defense made of it.

    Attributes:
        name: The defense, or the victim.
        cells: One per column.
        seconds: Wall-clock time of the defense; empty for a victim.
        is_before: Whether this is a victim before purification.
        notes: What a reader must not overlook.
    """

    name: str
    cells: tuple[TableCell, ...]
    seconds: str = ""
    is_before: bool = False
    notes: tuple[str, ...] = ()


def lines(rows: Sequence[Row]) -> Iterator[TableLine]:
    """Yield the table line by line: each victim, then the defenses that were tried on it."""
    rows, fields = tuple(rows), [field for field, *_ in columns("accuracy", rows)]
    for (victim, before), group in groupby(rows, key=lambda row: (row.victim, row.before)):
        name = f"before: {victim}" if victim else "before"
        # The DER of no change is 0.5 by definition; as a measurement it would mislead.
        yield TableLine(name, _cells(fields, replace(before, der=None)), is_before=True)
        for row in group:
            cells, seconds = _cells(fields, row.after, before), f"{row.seconds:.1f}"
            yield TableLine(row.defense, cells, seconds, notes=_notes(row, rows))


def columns(metric: str, rows: Sequence[Row]) -> tuple[tuple[str, str, str, str], ...]:
    """Return the columns of a table, where another metric may stand in place of the accuracy."""
    every = [rates for row in rows for rates in (replace(row.before, der=None), row.after)]
    (field, _, *rest), *others = COLUMNS
    measured = [
        column for column in others if any(getattr(one, column[0]) is not None for one in every)
    ]
    return ((field, heading(metric), rest[0], rest[1]), *measured)


def results_table(rows: Sequence[Row], title: str = "", metric: str = "accuracy") -> Table:
    """Return the results as a rich table for the terminal, rates in percent.

    Args:
        rows: As in a record.
        title: What stands above it.
        metric: What the task calls what stands where other tables have ACC.
    """
    table = Table(title=escape(title) or None, title_justify="left")
    table.add_column("defense")
    for _, name, arrow, _ in columns(metric, rows):
        table.add_column(f"{name} % {arrow}", justify="right", no_wrap=True)
    table.add_column("seconds ↓", justify="right", no_wrap=True)
    if any(line.notes for line in lines(rows)):
        table.add_column("note")
    for number_, line in enumerate(lines(rows)):
        if line.is_before and number_:
            table.add_section()
        style = "dim" if line.is_before else ""
        cells = [_terminal(cell) for cell in line.cells]
        entries = [escape(line.name), *cells, line.seconds, escape("; ".join(line.notes))]
        table.add_row(*entries[: len(table.columns)], style=style)
    return table


def _cells(
    fields: Sequence[str], rates: Rates, before: Rates | None = None
) -> tuple[TableCell, ...]:
    cells = []
    for field in fields:
        value = getattr(rates, field)
        old = getattr(before, field) if before is not None else None
        change: str | None = points(value - old, signed=True) if None not in {value, old} else ""
        if field == "der":  # it is itself a measure of change
            change = None
        tone = _tone(field, value) if before is not None else ""
        cells.append(TableCell(number(value), change, tone))
    return tuple(cells)


def _tone(field: str, value: float | None) -> str:
    if field != "asr" or value is None:
        return ""
    return "good" if value <= ASR_GOAL else "bad"


def _notes(row: Row, rows: tuple[Row, ...]) -> tuple[str, ...]:
    notes = [row.note] if row.note else []
    if row.violated:
        notes.append("utility bound violated")
    if row.undecided:
        notes.append(f"guard: {row.undecided}")
    if row.instead:
        notes.append(f"the guard took: {row.instead}")
    if row.retuned_twin is not None:
        notes.append(f"clean twin after retuning: {percent(row.retuned_twin)}")
    if beats_baseline(row, rows) is False:
        notes.append(f"does not beat {row.baseline}")
    if any(r.baseline == row.defense and r.victim == row.victim for r in rows):
        notes.append("baseline")
    return tuple(notes)


def _terminal(cell: TableCell) -> str:
    color = {"good": "green", "bad": "red"}.get(cell.tone)
    value = f"[{color}]{cell.value}[/]" if color else cell.value
    return f"{value} [dim]{cell.change:>5}[/]" if cell.change else value
