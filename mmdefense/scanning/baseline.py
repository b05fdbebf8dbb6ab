"""The findings that an earlier report, the baseline, already has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError
from mmdefense.files import read_json
from mmdefense.findings import Finding, ScanRecord
from mmdefense.report.encoding import plain

__all__ = ["FINGERPRINT", "compared", "file_of", "fingerprint", "is_of_file", "read_baseline"]

FINGERPRINT = "mmdefense/v1"
"""The key of the fingerprint in a SARIF log; the number is the version of its definition."""


def is_of_file(found: Finding) -> bool:
    """Return whether a finding is on a file, not on weights or behaviour."""
    return found.id.split("-")[0] not in {"weights", "behaviour"}


def file_of(subject: str, files: Mapping[str, str]) -> str:
    """Return the file that a subject is in; what is in an archive follows an ``!``."""
    names = (name for name in files if f"{subject}!".startswith(f"{name}!"))
    return max(names, key=len, default=subject.split("!")[0])


def fingerprint(found: Finding, files: Mapping[str, str]) -> str:
    """Return a SHA-256 that identifies a finding in later scans.

    It covers the rule, the level and the subject. For a finding on a file, it also covers the value
    and the file's SHA-256, so that a changed file is reviewed again. Weights and behaviour are
    measured with some noise, so their values are left out.

    Args:
        found: The finding.
        files: SHA-256 of each scanned file by its name.
    """
    identity = [found.id, found.level, found.subject]
    if is_of_file(found):
        identity += [str(found.value), files.get(file_of(found.subject, files), "")]
    return hashlib.sha256(json.dumps(plain(identity)).encode()).hexdigest()


def read_baseline(path: Path) -> frozenset[str]:
    """Return the fingerprints of the findings in an earlier report.

    Args:
        path: A report of ``mmdefense scan --format json`` or ``--format sarif``.

    Raises:
        BadInputError: If it is neither.
    """
    try:
        return frozenset(_fingerprints(read_json(path)))
    except (AttributeError, KeyError, TypeError):
        raise BadInputError(
            f"baseline {path} must be a report of mmdefense scan with --format json or sarif, "
            "with a fingerprint of each finding; write it again"
        ) from None


def _fingerprints(report: Any) -> Iterator[str]:
    if "runs" in report:
        for run in report["runs"]:
            yield from (str(r["partialFingerprints"][FINGERPRINT]) for r in run["results"])
    else:
        yield from (str(found["fingerprint"]) for found in report["findings"])


def compared(record: ScanRecord, baseline: frozenset[str]) -> ScanRecord:
    """Return a record whose findings say whether the baseline has them.

    Args:
        record: The record of a scan.
        baseline: Fingerprints, as :func:`read_baseline` returns them.
    """
    findings = [
        replace(found, known=fingerprint(found, record.files) in baseline)
        for found in record.findings
    ]
    return replace(record, findings=findings)
