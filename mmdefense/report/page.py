"""One self-contained HTML page: no network, no script, fit to be read, printed and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from mmdefense.checkpoints.runs import write_atomically
from mmdefense.report.figures import Figure, layer_changes, training_curves
from mmdefense.report.findings import ScanSummary
from mmdefense.report.formats import duration
from mmdefense.report.plots import Interval
from mmdefense.report.record import Guard, PurificationRecord, Record
from mmdefense.report.tables import COLUMNS, lines
from mmdefense.report.verdict import verdict

__all__ = ["figure_contexts", "page", "provenance", "render_page", "template"]


def render_page(
    record: Record, figures: Sequence[Figure], path: Path, scan: ScanSummary | None = None
) -> None:
    """Write the page of ``record`` to ``path``, atomically.

    Args:
        record: What is known; the page also draws its layer changes and training curves.
        figures: Further figures, shown in this order before those.
        path: The HTML file.
        scan: What a scan of the given model found.
    """
    write_atomically(path, lambda file: file.write(page(record, figures, scan).encode()))


def page(record: Record, figures: Sequence[Figure] = (), scan: ScanSummary | None = None) -> str:
    """Return the page of ``record`` as HTML text; the same input gives the same text."""
    shown = [*figures, *_own_figures(record)]
    return template("page.html.j2").render(
        record=record,
        scan=scan,
        scan_fits=scan is not None and scan.is_of(record.model.files_before),
        verdict=verdict(record),
        guard=_guard_plot(record.guard) if isinstance(record, PurificationRecord) else "",
        columns=COLUMNS,
        lines=list(lines(record.rows)),
        figures=figure_contexts(shown),
        settings=list(_settings(record)),
        provenance=list(provenance(record)),
    )


@cache
def template(name: str) -> Template:
    """Return a template of this package; what is put in is escaped."""
    environment = Environment(
        loader=PackageLoader("mmdefense.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _own_figures(record: Record) -> list[Figure]:
    if not isinstance(record, PurificationRecord):
        return []
    own = (layer_changes(record.layers), training_curves(record.history))
    return [figure for figure in own if figure is not None]


def _guard_plot(guard: Guard) -> Markup:
    label = f"drop of hold-out {guard.metric} in percentage points (further left is better)"
    value, low, high, bound = (
        100 * rate for rate in (guard.drop, guard.drop_low, guard.drop_high, guard.bound)
    )
    return Interval(value, low, high, bound, label).markup("guard")


def figure_contexts(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Return what the template of figures needs of each: it, its number and its drawings."""
    return [_figure_context(figure, number) for number, figure in enumerate(figures, 1)]


def _figure_context(figure: Figure, number: int) -> dict[str, Any]:
    panels = [
        (getattr(plot, "title", ""), plot.markup(f"f{number}p{place}"))
        for place, plot in enumerate(figure.plots, 1)
    ]
    return {"number": number, "figure": figure, "panels": panels}


def _settings(record: Record) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each defense that has settings, with them."""
    if isinstance(record, PurificationRecord):
        yield record.defense.name, record.defense.settings
        return
    seen: list[tuple[str, Mapping[str, Any]]] = []
    for row in record.rows:
        if row.settings and (row.defense, row.settings) not in seen:
            seen.append((row.defense, row.settings))
    yield from seen


def provenance(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what identifies model, data and run; what is not known is left out."""
    model, data, origin = record.model, record.data, record.provenance
    entries = [
        ("Model", model.name),
        ("Architecture", model.architecture),
        ("Parameters", f"{model.parameters:,}"),
        ("Weights before (SHA-256)", model.sha256_before),
        ("Weights after (SHA-256)", _after(record)),
        ("Clean data", f"{data.name}, {data.samples:,} samples"),
        ("Data fingerprint", data.fingerprint),
    ]
    if isinstance(record, PurificationRecord):
        entries += [("Paper", record.defense.reference), ("Time", duration(record.seconds))]
    entries += [
        ("Seed", str(origin.seed)),
        ("Device", origin.device),
        ("Created", origin.created),
        ("Command", origin.command),
        ("Versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items())),
    ]
    return ((name, value) for name, value in entries if value)


def _after(record: Record) -> str:
    before, after = record.model.sha256_before, record.model.sha256_after
    return f"{after} (unchanged)" if after == before else after or ""
