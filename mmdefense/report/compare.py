"""Several purifications side by side on one page, and the page of one from its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.outputs import (
    PAGE,
    PAGE_MARK,
    PLOTS,
    RECORD,
    SCAN,
    check_replaceable_file,
)
from mmdefense.checkpoints.runs import write_atomically
from mmdefense.errors import BadInputError
from mmdefense.findings import ScanRecord
from mmdefense.plots.layers_compared import LayersCompared
from mmdefense.report.archive import read_plots
from mmdefense.report.findings import read_scan
from mmdefense.report.formats import DASH, duration, percent, points
from mmdefense.report.page import provenance, render_page, template
from mmdefense.report.panels import shown_plots
from mmdefense.report.record import PurificationRecord, read_record
from mmdefense.report.verdict import MARKS, remarks, verdict
from mmdefense.tabular import Table, Value

__all__ = [
    "Entry",
    "compare",
    "comparison_page",
    "comparison_table",
    "purification_record",
    "rebuild",
]


@dataclass(frozen=True)
class Entry:
    """One line of a table that compares.

    Attributes:
        name: What is compared.
        values: One per purification, as shown; a dash where there is none.
    """

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the values are not all the same."""
        return len(set(self.values)) > 1


def rebuild(out: str | Path, page: str | Path | None = None) -> Path:
    """Make the page of an output again from its record, plots and scan, as far as they are there.

    A scan is what ``mmdefense scan --format json`` wrote, kept as ``scan.json`` with the model.

    Args:
        out: The folder that a purification made.
        page: Where to write the page; by default where the output has its own.

    Returns:
        Where it was written.

    Raises:
        BadInputError: If there is no record, a file of it cannot be read, or the page would take
            the place of another file.
    """
    folder = Path(out)
    target = folder / PAGE
    if page is not None:
        target = Path(page)
        check_replaceable_file(target, PAGE_MARK)
    record, archive = purification_record(folder), folder / PLOTS
    plots = read_plots(archive) if archive.is_file() else []
    render_page(record, plots, target, _scan(folder / SCAN))
    return target


def compare(outs: Sequence[str | Path], page: str | Path) -> None:
    """Write one page that holds several outputs side by side.

    Args:
        outs: The folders that purifications made.
        page: Where to write the page.

    Raises:
        BadInputError: If one of them has no record, or the page would take the place of another
            file.
    """
    check_replaceable_file(Path(page), PAGE_MARK)
    html = comparison_page([purification_record(Path(out)) for out in outs], _names(outs))
    write_atomically(Path(page), lambda file: file.write(html.encode()))


def comparison_table(outs: Sequence[str | Path]) -> Table:
    """Return several outputs as a table, a row each; rates are fractions.

    Raises:
        BadInputError: If one of them has no record.
    """
    rows: list[dict[str, Value]] = []
    for name, out in zip(_names(outs), outs, strict=True):
        record = purification_record(Path(out))
        guard, attack = record.guard, record.attack
        row: dict[str, Value] = {"output": name, "defense": record.defense.name}
        for field in ("metric", "before", "after", "drop", "drop_low", "drop_high", "bound"):
            row[field] = getattr(guard, field)
        row |= {"verdict": guard.verdict, "state": guard.state}
        if attack is not None:
            row |= {"asr_before": attack.before.asr, "asr_after": attack.after.asr}
        pruned = sum(layer.pruned for layer in record.layers)
        rows.append({**row, "units_pruned": pruned, "seconds": record.seconds, **record.measured})
    return Table(rows)


def purification_record(folder: Path) -> PurificationRecord:
    """Return the record of an output.

    Raises:
        BadInputError: If it has none, or one of another kind.
    """
    record = read_record(folder / RECORD)
    if not isinstance(record, PurificationRecord):
        raise BadInputError(f"{folder / RECORD} must be the record of a purification")
    return record


def _scan(path: Path) -> ScanRecord | None:
    """Return what a scan found; none where there is none, or a file of another kind."""
    try:
        return read_scan(path)
    except BadInputError:
        return None


def _names(outs: Sequence[str | Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    paths = [Path(out).absolute().parts for out in outs]
    most = max(map(len, paths))
    for length in range(1, most + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(map(str, outs), 1)]


def comparison_page(records: Sequence[PurificationRecord], names: Sequence[str]) -> str:
    """Return the page of several purifications as HTML text.

    Args:
        records: What is known about each.
        names: What each is called; all different.
    """
    changes = {
        name: {layer.layer: layer.change for layer in record.layers}
        for name, record in zip(names, records, strict=True)
    }
    compared = LayersCompared(changes)
    tables = [
        ("before-after", "Before and after", "", _side_by_side(map(_measured, records))),
        ("settings", "Settings", "code", _side_by_side(map(_settings, records))),
        ("layers", "Weight change, layer by layer", "", _side_by_side(map(_layers, records))),
        (
            "provenance",
            "Provenance",
            "code",
            _side_by_side(dict(provenance(record)) for record in records),
        ),
    ]
    return template("compare.html.j2").render(
        names=names,
        remarks=[part for part in _remarks(records, names) if part[1]],
        plots=shown_plots([compared] if compared.panels() else []),
        tables=[table for table in tables if table[3]],
    )


def _remarks(
    records: Sequence[PurificationRecord], names: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield what is to be said of all, and then of each alone, under a heading each."""
    said = [remarks(record) for record in records]
    common = [line for line in said[0] if all(line in lines for lines in said)]
    yield "Of all", common
    for name, lines in zip(names, said, strict=True):
        yield name, [line for line in lines if line not in common]


def _side_by_side(columns: Iterator[Mapping[str, str]] | Any) -> list[Entry]:
    """Return a line for each name that any column has, in the order in which they come."""
    held = list(columns)
    names = dict.fromkeys(name for column in held for name in column)
    return [Entry(name, tuple(column.get(name, DASH) for column in held)) for name in names]


def _measured(record: PurificationRecord) -> dict[str, str]:
    guard, found = record.guard, verdict(record)
    interval = f"{points(guard.drop_low)} to {points(guard.drop_high)}"
    shown = {
        "Verdict": f"{MARKS[found.level]} {found.label}",
        "Method": record.defense.name,
        f"Hold-out {guard.metric} before": percent(guard.before),
        f"Hold-out {guard.metric} after (higher is better)": percent(guard.after),
        "Drop in points (lower is better)": f"{points(guard.drop)} ({interval})",
        "Largest drop allowed": points(guard.bound),
        "Utility bound": guard.undecided or guard.verdict,
        "State that was returned": guard.state,
    }
    if record.attack is not None:
        before, after = record.attack.before.asr, record.attack.after.asr
        shown |= {"ASR before": percent(before), "ASR after (lower is better)": percent(after)}
    shown |= {
        f"{label} {when}": f"{record.measured[f'{name}_{when}']:.3g}"
        for name, label in (("lambda_max", "λmax"), ("hessian_trace", "Tr(H)"))
        for when in ("before", "after")
        if f"{name}_{when}" in record.measured
    }
    pruned, units = (sum(getattr(x, n) for x in record.layers) for n in ("pruned", "units"))
    search = record.triggers
    if search is not None:
        shown["Triggers found"] = f"{search.found}, of {search.targets} searches"
    if record.layers:
        shown["Units pruned"] = f"{pruned} of {units}"
    return shown | {"Time": duration(record.seconds)}


def _settings(record: PurificationRecord) -> dict[str, str]:
    settings = record.defense.settings.items()
    return {name: "none" if value is None else str(value) for name, value in settings}


def _layers(record: PurificationRecord) -> dict[str, str]:
    return {
        layer.layer: f"{layer.change:.3g}"
        + (f", {layer.pruned} of {layer.units} pruned" if layer.pruned else "")
        for layer in record.layers
    }
