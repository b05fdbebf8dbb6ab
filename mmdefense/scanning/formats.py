"""A scan's record as text or a page for a person, JSON for a program, SARIF for a code scanner."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmdefense.errors import printable
from mmdefense.findings import Level, ScanRecord
from mmdefense.report.encoding import plain
from mmdefense.report.findings import alike
from mmdefense.report.page import scan_page
from mmdefense.scanning.baseline import fingerprint
from mmdefense.scanning.sarif import to_sarif

__all__ = ["FORMATS", "to_csv", "to_html", "to_json", "to_sarif", "to_text"]

_STYLES: Mapping[Level, str] = {
    "info": "dim",
    "low": "cyan",
    "medium": "yellow",
    "high": "bold red",
}


def to_text(record: ScanRecord) -> str:
    """Return the verdict and a table of the findings."""
    console = Console()
    if not console.is_terminal:  # a log has no width to wrap at
        console = Console(width=120)
    with console.capture() as captured:
        if record.findings:
            console.print(_table(record))
        console.print(Text(record.verdict.text))
        if record.files:
            console.print(Text(f"{len(record.files)} files hashed; --format json lists them"))
    return captured.get().rstrip("\n")


def _table(record: ScanRecord) -> Table:
    table = Table(title=Text(f"scan of {printable(record.model)}"), title_justify="left")
    for heading in ("level", "where", "what", "what it means, and what it cannot see"):
        table.add_column(heading, overflow="fold")
    for group in alike(record.findings):
        found = group.first
        table.add_row(
            Text(f"{found.level}, known" if found.known else found.level, _STYLES[found.level]),
            Text(printable(group.where)),
            Text(printable(f"{found.id}: {group.what} (compared with: {found.reference})")),
            Text(f"{found.meaning} Cannot see: {found.blind_spot}"),
        )
    return table


def to_json(record: ScanRecord) -> str:
    """Return the whole record with its verdict, and the fingerprint of each finding."""
    findings = [
        {**plain(found), "fingerprint": fingerprint(found, record.files)}
        for found in record.findings
    ]
    content = {**plain(record), "findings": findings, "verdict": plain(record.verdict)}
    return json.dumps(content, indent=2)


def to_html(record: ScanRecord) -> str:
    """Return one self-contained page, like that of a purification."""
    return scan_page(record)


def to_csv(record: ScanRecord) -> str:
    """Return a row for each finding."""
    return record.table().to_csv().rstrip("\n")


FORMATS: Mapping[str, Callable[[ScanRecord], str]] = {
    "text": to_text,
    "csv": to_csv,
    "json": to_json,
    "sarif": to_sarif,
    "html": to_html,
}
