"""What a scan found before a purification, read from its JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from mmdefense.errors import BadInputError, one_line
from mmdefense.report.encoding import build
from mmdefense.report.images import is_picture

__all__ = [
    "Alike",
    "Found",
    "ScanFinding",
    "ScanSummary",
    "ScanVerdict",
    "alike",
    "read_scan",
    "scan_of",
]


@dataclass(frozen=True, kw_only=True)
class ScanFinding:
    """One finding; the fields are those of ``mmdefense scan --format json``.

    Attributes:
        figures: Numbers behind the value, such as nodes and weights of a spectrum.
        picture: A trigger as a picture, as a ``data:`` address; empty where there is none.
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
    picture: str = ""

    @property
    def shown(self) -> str:
        """The value for a person."""
        return _shown(self.value)

    @property
    def pictured(self) -> str:
        """The address of the picture; empty where there is none, or it leads elsewhere."""
        return self.picture if is_picture(self.picture) else ""


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


class Found(Protocol):
    """What findings are grouped by."""

    @property
    def id(self) -> str:
        """The rule that found it."""
        ...

    @property
    def level(self) -> str:
        """How strong it is."""
        ...

    @property
    def subject(self) -> str:
        """The file, layer or class."""
        ...

    @property
    def value(self) -> Any:
        """What was found there."""
        ...


F = TypeVar("F", bound=Found)

_ALIKE, _NAMED = 4, 5
"""From how many alike findings on they stand as one, and how many of them are named. Ours."""


@dataclass(frozen=True)
class Alike(Generic[F]):
    """Findings of one rule and level, which are shown as one.

    Attributes:
        findings: One or more.
    """

    findings: Sequence[F]

    @property
    def first(self) -> F:
        """The first of them, which says what all mean."""
        return self.findings[0]

    @property
    def where(self) -> str:
        """The subjects, the first few by name."""
        return _some([found.subject for found in self.findings], "places")

    @property
    def what(self) -> str:
        """The values, the first few of them."""
        return _some([_shown(found.value) for found in self.findings], "findings")


def alike(findings: Sequence[F]) -> list[Alike[F]]:
    """Return findings in their order, those alike as one at the place of the first."""
    groups: dict[tuple[str, str], list[F]] = {}
    for found in findings:
        groups.setdefault((found.id, found.level), []).append(found)
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


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def read_scan(path: Path) -> ScanSummary:
    """Return what ``mmdefense scan --format json`` wrote; what is not shown is passed by.

    Raises:
        BadInputError: If it is no such file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
