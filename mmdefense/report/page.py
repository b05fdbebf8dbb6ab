"""One self-contained HTML page: no network, no script, fit to be read, printed and kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from mmdefense.checkpoints.runs import write_atomically
from mmdefense.errors import BadInputError
from mmdefense.findings import Finding, ScanRecord
from mmdefense.metrics.definitions import DEFINITIONS
from mmdefense.plots.base import Array, Plot, as_array
from mmdefense.plots.layer_changes import LayerChanges
from mmdefense.plots.loss_smoothness import spectral_density
from mmdefense.plots.panels import Interval
from mmdefense.plots.training_curves import TrainingCurves
from mmdefense.report.encoding import build
from mmdefense.report.findings import Alike, alike
from mmdefense.report.formats import DASH, duration
from mmdefense.report.images import is_picture
from mmdefense.report.panels import markup, shown_plots
from mmdefense.report.record import GuardInfo, PurificationRecord, Record, SpectrumInfo
from mmdefense.report.tables import columns, lines
from mmdefense.report.verdict import verdict

__all__ = [
    "ScanEntry",
    "page",
    "provenance",
    "render_page",
    "scan_page",
    "template",
    "write_analysis",
]

_LARGEST = 1e30  # ours: an eigenvalue that a chart can still show


def render_page(
    record: Record, plots: Sequence[Plot], path: Path, scan: ScanRecord | None = None
) -> None:
    """Write the page of ``record`` to ``path``, atomically.

    Args:
        record: What is known; the page also draws its layer changes and training curves.
        plots: Further plots, shown in this order before those.
        path: The HTML file.
        scan: What a scan of the given model found that was made apart from the purification.
    """
    write_atomically(path, lambda file: file.write(page(record, plots, scan).encode()))


def page(record: Record, plots: Sequence[Plot] = (), scan: ScanRecord | None = None) -> str:
    """Return the page of ``record`` as HTML text; the same input gives the same text.

    Raises:
        BadInputError: If one of ``plots`` is no plot.
    """
    shown = list(lines(record.rows))
    return template("page.html.j2").render(
        record=record,
        scans=list(_scans(record, scan)),
        verdict=verdict(record),
        guard=_guard_drawing(record.guard) if isinstance(record, PurificationRecord) else "",
        columns=columns(record.metric, record.rows),
        metric=DEFINITIONS.get(record.metric, f"The task's metric, {record.metric}."),
        lines=shown,
        dashes=any(cell.value == DASH for line in shown for cell in line.cells),
        plots=shown_plots([*plots, *_own_plots(record)]),
        settings=list(_settings(record)),
        provenance=list(provenance(record)),
        evaluations=record.evaluations if isinstance(record, PurificationRecord) else (),
    )


def scan_page(scan: ScanRecord) -> str:
    """Return the page of a scan alone, as HTML text."""
    entry = ScanEntry("", scan, scan.findings, drawing=_drawn(scan.findings, "scan"))
    level = "fail" if scan.verdict.level == "high" else "open"  # a scan never passes a model
    return template("scan.html.j2").render(scan=scan, scans=[entry], level=level)


def write_analysis(
    title: str,
    lines: Sequence[str],
    plots: Sequence[Plot],
    path: Path,
    table: Sequence[Sequence[str]] = (),
) -> None:
    """Write the page of an analysis, atomically; missing folders are made.

    Args:
        title: Its heading.
        lines: Sentences below it.
        plots: Shown below the table.
        path: Where it goes.
        table: Its rows, the names of the columns first; none shows no table.
    """
    html = template("analysis.html.j2").render(
        title=title, lines=lines, table=table, plots=shown_plots(plots)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(html.encode()))


_STEERING = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
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
        finalize=_without_steering,
    )
    return environment.get_template(name)


def _without_steering(value: Any) -> Any:
    """Return text with controls and marks of direction escaped: a name shows in its own order."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), value)


@dataclass(frozen=True)
class ScanEntry:
    """A scan as the page shows it.

    Attributes:
        heading: What was scanned, and when.
        scan: The scan.
        findings: Those of its findings that are shown.
        warning: What a reader must not overlook.
        drawing: The spectrum, where the scan has one.
    """

    heading: str
    scan: ScanRecord
    findings: Sequence[Finding]
    warning: str = ""
    drawing: Markup | str = ""

    @property
    def alike(self) -> list[Alike]:
        """The findings, those alike as one."""
        return alike(self.findings)

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Caption and address of the triggers that were found; what is no picture is left out."""
        every = (pair for found in self.findings for pair in found.pictures.items())
        return [(caption, address) for caption, address in every if is_picture(address)]


def _scans(record: Record, kept: ScanRecord | None) -> Iterator[ScanEntry]:
    """Yield the scan of the purification's own, and the behaviour that another one looked at.

    Where the purification scanned files and weights itself, it does not take another's word.
    """
    own = record.scan if isinstance(record, PurificationRecord) else None
    if own is not None:
        yield ScanEntry("The given files and weights, before anything was done", own, own.findings)
    if kept is None:
        return
    more = tuple(
        found for found in kept.findings if own is None or found.id.startswith("behaviour-")
    )
    if more or own is None:
        fits = kept.is_of(record.model.files_before)
        warning = "" if fits else "The scan was of other weights than those that were purified."
        heading = "From scan.json, which lay beside the model"
        yield ScanEntry(heading, kept, more, warning, _drawn(more, "scan"))


def _drawn(findings: Sequence[Finding], prefix: str) -> Markup | str:
    """Return the spectrum that a finding holds as a drawing; empty where none does."""
    found = [spectrum for spectrum in map(_spectrum, findings) if spectrum is not None]
    return markup(spectral_density({"given model": found[0]}), prefix) if found else ""


def _spectrum(found: Finding) -> tuple[Array, Array] | None:
    """Return nodes and weights of a finding's spectrum; none where none can be drawn."""
    held = {name: found.numbers.get(name) for name in ("nodes", "weights")}
    try:
        spectrum: SpectrumInfo = build(SpectrumInfo, held, found.id)
    except BadInputError:
        return None
    nodes, weights = as_array(spectrum.nodes), as_array(spectrum.weights)
    fits = 0 < len(nodes) == len(weights) and bool((np.abs(nodes) < _LARGEST).all())
    return (nodes, weights) if fits and bool(np.isfinite(weights).all()) else None


def _own_plots(record: Record) -> list[Plot]:
    if not isinstance(record, PurificationRecord):
        return []
    layers = LayerChanges(
        layers=[layer.layer for layer in record.layers],
        changes=[layer.change for layer in record.layers],
        pruned=[layer.pruned for layer in record.layers],
        units=[layer.units for layer in record.layers],
    )
    retunings = [
        dataclasses.replace(one.retuning.plot(), of=" and ".join(one.recorded_as))
        for one in record.evaluations
        if one.retuning is not None
    ]
    plots = (layers, TrainingCurves(record.history), *retunings)
    return [plot for plot in plots if plot.panels()]


def _guard_drawing(guard: GuardInfo) -> Markup:
    label = f"drop of hold-out {guard.metric} in percentage points (further left is better)"
    value, low, high, bound = (
        100 * rate for rate in (guard.drop, guard.drop_low, guard.drop_high, guard.bound)
    )
    return markup(Interval(value, low, high, bound, label), "guard")


def _settings(record: Record) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each defense that has settings, with them."""
    if isinstance(record, PurificationRecord):
        yield record.defense.name, record.defense.settings
        if record.choice is not None:
            yield f"{record.choice.defense}, which it took", record.choice.settings
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
        ("Threads", ", then ".join(map(str, origin.threads))),
        ("Created", origin.created),
        ("Command", origin.command),
        ("Versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items())),
    ]
    return ((name, value) for name, value in entries if value)


def _after(record: Record) -> str:
    before, after = record.model.sha256_before, record.model.sha256_after
    return f"{after} (unchanged)" if after == before else after or ""
