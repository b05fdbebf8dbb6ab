"""A scan read from its JSON, and its findings grouped for a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line
from mmdefense.findings import Finding, ScanRecord
from mmdefense.report.encoding import build

__all__ = ["Alike", "alike", "read_scan", "scan_of"]


_ALIKE, _NAMED = 4, 5
"""From how many alike findings on they stand as one, and how many of them are named. Ours."""


@dataclass(frozen=True)
class Alike:
    """Findings of one rule and level, which are shown as one.

    Attributes:
        findings: One or more.
    """

    findings: Sequence[Finding]

    @property
    def first(self) -> Finding:
        """The first of them, which says what all mean."""
        return self.findings[0]

    @property
    def where(self) -> str:
        """The subjects, the first few by name."""
        return _some([found.subject for found in self.findings], "places")

    @property
    def what(self) -> str:
        """The values, the first few of them."""
        return _some([found.shown for found in self.findings], "findings")


def alike(findings: Sequence[Finding]) -> list[Alike]:
    """Return findings in their order, those alike as one at the place of the first."""
    groups: dict[tuple[str, str, bool | None], list[Finding]] = {}
    for found in findings:
        groups.setdefault((found.id, found.level, found.known), []).append(found)
    parts = (
        [group] if len(group) >= _ALIKE else [[found] for found in group]
        for group in groups.values()
    )
    return [Alike(part) for group in parts for part in group]


def _some(texts: list[str], name: str) -> str:
    different = list(dict.fromkeys(texts))
    if len(different) == 1:
        return different[0]
    more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
    return f"{len(different)} {name}: {', '.join(different[:_NAMED])}{more}"


def read_scan(path: Path) -> ScanRecord:
    """Return what ``mmdefense scan --format json`` wrote; what is not shown is passed by.

    Raises:
        BadInputError: If it is no such file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"scan {path} cannot be read: {one_line(error)}") from error
    return scan_of(value, f"scan {path}")


def scan_of(value: Any, where: str) -> ScanRecord:
    """Return a scan from its plain JSON values; what is not shown is passed by.

    Raises:
        BadInputError: If they are of no scan.
    """
    known = _known(ScanRecord, value)
    if isinstance(known, dict) and isinstance(known.get("findings"), list):
        known["findings"] = [_known(Finding, item) for item in known["findings"]]
    record: ScanRecord = build(ScanRecord, known, where)
    return record


def _known(kind: type, value: Any) -> Any:
    """Return a mapping without the keys that a dataclass has no field for."""
    if not isinstance(value, Mapping):
        return value
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: item for name, item in value.items() if name in names}
