"""A scan's record as text or a page for a person, JSON for a program, SARIF for a code scanner."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmdefense.errors import printable
from mmdefense.findings import Finding, Level, ScanRecord
from mmdefense.report.encoding import plain
from mmdefense.report.findings import alike
from mmdefense.report.page import scan_page

__all__ = ["FORMATS", "to_html", "to_json", "to_sarif", "to_text"]

_STYLES: Mapping[Level, str] = {
    "info": "dim",
    "low": "cyan",
    "medium": "yellow",
    "high": "bold red",
}
_SARIF_LEVELS: Mapping[Level, str] = {
    "info": "none",
    "low": "note",
    "medium": "warning",
    "high": "error",
}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def to_text(record: ScanRecord) -> str:
    """Return the verdict and a table of the findings."""
    console = Console()
    if not console.is_terminal:  # a log has no edge to wrap at
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
            Text(found.level, style=_STYLES[found.level]),
            Text(printable(group.where)),
            Text(printable(f"{found.id}: {group.what} (compared with: {found.reference})")),
            Text(f"{found.meaning} Cannot see: {found.blind_spot}"),
        )
    return table


def to_json(record: ScanRecord) -> str:
    """Return the whole record, verdict included."""
    return json.dumps({**plain(record), "verdict": plain(record.verdict)}, indent=2)


def to_sarif(record: ScanRecord) -> str:
    """Return the findings as a SARIF 2.1.0 log.

    References:
        OASIS. *Static Analysis Results Interchange Format (SARIF) Version 2.1.0*. 2020.
    """
    rules = list({found.id: found for found in record.findings}.values())
    order = [found.id for found in rules]
    run = {
        "tool": {
            "driver": {
                "name": "mmdefense",
                "version": record.version,
                "rules": [_rule(found) for found in rules],
            }
        },
        "artifacts": [
            {"location": {"uri": quote(plain(name))}, "hashes": {"sha-256": digest}}
            for name, digest in record.files.items()
        ],
        "results": [
            _result(found, order.index(found.id), record.files) for found in record.findings
        ],
        "properties": {"verdict": record.verdict.text, "parts": list(record.parts)},
    }
    return json.dumps(plain({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}), indent=2)


def _rule(found: Finding) -> dict[str, Any]:
    return {
        "id": found.id,
        "shortDescription": {"text": found.measured},
        "fullDescription": {"text": found.meaning},
        "help": {"text": f"Cannot see: {found.blind_spot}"},
    }


def _result(found: Finding, rule: int, files: Mapping[str, str]) -> dict[str, Any]:
    where = _file_of(found.subject, files)
    is_file = found.id.split("-")[0] not in {"weights", "behaviour"}
    location = (
        {"physicalLocation": {"artifactLocation": {"uri": quote(plain(where))}}}
        if is_file
        else {"logicalLocations": [{"fullyQualifiedName": found.subject}]}
    )
    return {
        "ruleId": found.id,
        "ruleIndex": rule,
        "kind": "informational" if found.level == "info" else "fail",
        "level": _SARIF_LEVELS[found.level],
        "message": {
            "text": f"{found.subject}: {printable(found.shown)}; compared with {found.reference}"
        },
        "locations": [location],
        "properties": {key: value for key, value in plain(found).items() if key != "picture"},
    }


def _file_of(subject: str, files: Mapping[str, str]) -> str:
    """Return the file that a subject is in; what lies in an archive stands behind an ``!``."""
    names = (name for name in files if f"{subject}!".startswith(f"{name}!"))
    return max(names, key=len, default=subject.split("!")[0])


def to_html(record: ScanRecord) -> str:
    """Return one self-contained page, of the form of a purification's."""
    return scan_page(record)


FORMATS: Mapping[str, Callable[[ScanRecord], str]] = {
    "text": to_text,
    "json": to_json,
    "sarif": to_sarif,
    "html": to_html,
}
