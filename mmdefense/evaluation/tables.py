"""The cells of a grid as a table: mean and spread over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from mmdefense import registry
from mmdefense.evaluation.grid import Cell
from mmdefense.metrics.backdoor import Rates
from mmdefense.metrics.definitions import heading
from mmdefense.report.formats import number
from mmdefense.report.record import Row

__all__ = ["markdown"]

_COLUMNS = ("acc", "asr", "ra", "der")


def markdown(cells: Iterable[Cell]) -> str:
    """Return the table of a grid as Markdown: rates in percent, mean and standard deviation.

    If the victims' tasks have different metrics, each is named with its victim.

    Args:
        cells: In the order of the table; those that differ only in their seeds are averaged.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    metrics: dict[str, str] = {}
    cells = list(cells)
    for cell, victim in zip(cells, _victims(cells), strict=True):
        groups.setdefault((victim, cell.row.defense), []).append(cell.row)
        metrics[victim] = _metric(cell)
    mixed = len(set(metrics.values())) > 1
    metric = "task metric" if mixed else heading(next(iter(metrics.values()), "accuracy"))
    retuned = any(cell.row.after.retuned is not None for cell in cells)
    columns = (*_COLUMNS, "retuned") if retuned else _COLUMNS
    rates = [metric, "ASR", "RA", "DER", *(["ASR after retuning"] if retuned else [])]
    head = ["victim", "defense", *rates, "seconds", "beats its baseline"]
    lines = ["| " + " | ".join(head) + " |", f"|---|---|{'---:|' * (len(rates) + 1)}---|"]
    shown = ""
    for (victim, defense), rows in groups.items():
        if victim != shown:
            shown = victim
            before = f"*before*, {metrics[victim]}" if mixed else "*before*"
            lines.append(
                _line([victim, before, *_rates([r.before for r in rows], columns), "", ""])
            )
        beats = _beats(rows, groups.get((victim, rows[0].baseline)))
        guard = "; ".join(
            f"{what} in {count} of {len(rows)}"
            for what, count in (
                ("guard violated", sum(row.violated for row in rows)),
                ("guard not decidable", sum(bool(row.undecided) for row in rows)),
                ("another state than the final one", sum(bool(row.instead) for row in rows)),
            )
            if count
        )
        seconds = f"{fmean(row.seconds for row in rows):.1f}"
        after = _rates([row.after for row in rows], columns)
        twins = [row.retuned_twin for row in rows]
        twin = "" if set(twins) == {None} else f"clean twin after retuning: {_mean(twins)}"
        note = "; ".join(part for part in (rows[0].note, beats, guard, twin) if part)
        lines.append(_line([victim, defense, *after, seconds, note]))
    return "\n".join(lines) + "\n"


def _victims(cells: Sequence[Cell]) -> list[str]:
    """Return the victim of each cell, with its views and clean data if the cells differ in them."""
    axes = [
        [f", {cell.views} views" for cell in cells],
        [f", {100 * float(cell.case.get('clean', 0)):g} % {cell.kind}" for cell in cells],
    ]
    varied = [axis for axis in axes if len(set(axis)) > 1]
    return ["".join(texts) for texts in zip([c.row.victim for c in cells], *varied, strict=True)]


def _metric(cell: Cell) -> str:
    """Return the metric of a cell's task; accuracy if the task is not installed."""
    task = str(cell.case.get("task"))
    known = task in registry.names("tasks")
    return str(registry.load("tasks", task).metric) if known else "accuracy"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rates(rates: Sequence[Rates], columns: Sequence[str]) -> list[str]:
    return [_mean([getattr(rate, field) for rate in rates]) for field in columns]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return number(None)
    spread = f" ± {100 * stdev(known):.1f}" if len(known) > 1 else ""
    return f"{number(fmean(known))}{spread}"


def _beats(rows: Sequence[Row], baseline: Sequence[Row] | None) -> str:
    """Return whether the mean DER is above that of plain fine-tuning with the same budget."""
    own, other = ([r.after.der for r in part if r.after.der is not None]
                  for part in (rows, baseline or ()))  # fmt: skip
    if not own or not other:
        return ""
    return "yes" if fmean(own) > fmean(other) else "no"
