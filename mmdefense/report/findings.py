"""What a scan found before a purification, read from its JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line
from mmdefense.report.encoding import build

__all__ = ["ScanFinding", "ScanSummary", "ScanVerdict", "read_scan", "scan_of"]


@dataclass(frozen=True, kw_only=True)
class ScanFinding:
    """One finding; the fields are those of ``mmdefense scan --format json``.

    Attributes:
        figures: Numbers behind the value, such as nodes and weights of a spectrum.
    """

    id: str
    level: str
    subject: str
    value: Any
    reference: str = ""
    meaning: str = ""
    blind_spot: str = ""
    measured: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The value for a person."""
        return f"{self.value:.3g}" if isinstance(self.value, float) else str(self.value)


@dataclass(frozen=True, kw_only=True)
class ScanVerdict:
    """What the scan concluded; the level is none where nothing was found."""

    level: str | None
    text: str


@dataclass(frozen=True, kw_only=True)
class ScanSummary:
    """What the page shows of a scan.

    Attributes:
        model: What was scanned.
        findings: Strongest first.
        verdict: The conclusion.
        parts: Which of files, weights and behaviour were looked at.
        files: SHA-256 of each file that was scanned, by name.
    """

    model: str
    findings: tuple[ScanFinding, ...]
    verdict: ScanVerdict
    parts: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def is_of(self, files: Mapping[str, str]) -> bool:
        """Say whether all of these files, given as SHA-256 by name, were scanned."""
        return bool(files) and set(files.values()) <= set(self.files.values())


def read_scan(path: Path) -> ScanSummary:
    """Return what ``mmdefense scan --format json`` wrote; what is not shown is passed by.

    Raises:
        BadInputError: If it is no such file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"scan {path} cannot be read: {one_line(error)}") from error
    return scan_of(value, f"scan {path}")


def scan_of(value: Any, where: str) -> ScanSummary:
    """Return a scan from its plain JSON values; what is not shown is passed by.

    Raises:
        BadInputError: If they are of no scan.
    """
    summary: ScanSummary = build(ScanSummary, _known(ScanSummary, value), where)
    return summary


def _known(kind: type, value: Any) -> Any:
    """Return a mapping without the keys that a dataclass has no field for, at each level."""
    if not isinstance(value, Mapping):
        return value
    names = {entry.name for entry in dataclasses.fields(kind)}
    known = {name: item for name, item in value.items() if name in names}
    if kind is ScanSummary:
        found = known.get("findings")
        if isinstance(found, list):
            known["findings"] = [_known(ScanFinding, item) for item in found]
        known["verdict"] = _known(ScanVerdict, known.get("verdict"))
    return known
