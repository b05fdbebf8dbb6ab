"""A scan's record as a SARIF log, which code scanners read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmdefense.errors import printable
from mmdefense.findings import Finding, Level, ScanRecord, worst_level
from mmdefense.report.encoding import plain
from mmdefense.scanning.baseline import FINGERPRINT, file_of, fingerprint, is_of_file

__all__ = ["HOMEPAGE", "to_sarif"]

HOMEPAGE = "https://github.com/mmdefense/mmdefense"
"""The project and its documentation."""

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS: Mapping[Level, str] = {"info": "none", "low": "note", "medium": "warning", "high": "error"}
_SEVERITIES: Mapping[Level, str] = {"info": "0.0", "low": "2.0", "medium": "5.5", "high": "8.0"}
"""Ours: the middle of the range that GitHub shows as the level of the same name."""


def to_sarif(record: ScanRecord) -> str:
    """Return the findings as a SARIF 2.1.0 log.

    Paths are relative to the working folder if the model is below it; files of a model from the hub
    have its id before their name.

    References:
        OASIS. *Static Analysis Results Interchange Format (SARIF) Version 2.1.0*. 2020.
        GitHub. *SARIF support for code scanning*.
    """
    rules: dict[str, list[Finding]] = {}
    for found in record.findings:
        rules.setdefault(found.id, []).append(found)
    artifacts = list(record.files)
    run = {
        "tool": {
            "driver": {
                "name": "mmdefense",
                "version": record.version,
                "informationUri": HOMEPAGE,
                "rules": [_rule(findings) for findings in rules.values()],
            }
        },
        # This id distinguishes scans of several models in one repository.
        "automationDetails": {"id": f"mmdefense/{_uri(record.model)}/"},
        "artifacts": [
            {
                "location": {"uri": _uri(record.model, name)},
                "hashes": {"sha-256": record.files[name]},
            }
            for name in artifacts
        ],
        "results": [
            _result(found, list(rules).index(found.id), record) for found in record.findings
        ],
        "properties": {"verdict": record.verdict.text, "parts": list(record.parts)},
    }
    return json.dumps(plain({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}), indent=2)


def _rule(findings: list[Finding]) -> dict[str, Any]:
    first = findings[0]
    worst = worst_level(findings) or "info"
    return {
        "id": first.id,
        "name": "".join(word.capitalize() for word in first.id.split("-")),
        "shortDescription": {"text": first.measured},
        "fullDescription": {"text": first.meaning},
        "help": {"text": f"Cannot see: {first.blind_spot}"},
        "helpUri": f"{HOMEPAGE}/blob/main/docs/findings.md#{first.id}",
        "defaultConfiguration": {"level": _LEVELS[worst]},
        "properties": {"tags": ["security"], "security-severity": _SEVERITIES[worst]},
    }


def _result(found: Finding, rule: int, record: ScanRecord) -> dict[str, Any]:
    name = file_of(found.subject, record.files) if is_of_file(found) else ""
    place: dict[str, Any] = {"uri": _uri(record.model, name)}
    if name in record.files:
        place["index"] = list(record.files).index(name)
    # A finding is on the file as a whole, but many readers want a line to show it at.
    region = {"startLine": 1, "endLine": 1}
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": place, "region": region}}
    if not name:  # a layer or a target, of the model as a whole
        location["logicalLocations"] = [{"fullyQualifiedName": found.subject}]
    known_by = fingerprint(found, record.files)
    result = {
        "ruleId": found.id,
        "ruleIndex": rule,
        "kind": "informational" if found.level == "info" else "fail",
        "level": _LEVELS[found.level],
        "message": {
            "text": f"{found.subject}: {printable(found.shown)}; compared with {found.reference}"
        },
        "locations": [location],
        # GitHub distinguishes alerts by the second key only.
        "partialFingerprints": {FINGERPRINT: known_by, "primaryLocationLineHash": known_by},
        "properties": {key: value for key, value in plain(found).items() if key != "pictures"},
    }
    if found.known is not None:
        result["baselineState"] = "unchanged" if found.known else "new"
    return result


def _uri(model: str, name: str = "") -> str:
    """Return where a model or a file of it is, relative to the working folder if it is below it."""
    path = Path(model)
    place = Path(os.path.abspath(path if path.is_file() and path.name == name else path / name))
    here = Path.cwd()
    if place.is_relative_to(here):
        return quote(plain(place.relative_to(here).as_posix()))
    return place.as_uri()
