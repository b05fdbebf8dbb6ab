"""The evidence of a purification as an in-toto statement about the files that it wrote.

A statement names files by their SHA-256 (``subject``) and says something about them
(``predicate``): here the record, and the files that it all came from (``materials``).
:mod:`mmdefense.report.signing` signs it together with those files.

References:
    The in-toto Attestation Framework, *Statement*, version 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.outputs import PAGE, PREDICATE_TYPE, RECORD, SIGNATURE
from mmdefense.checkpoints.runs import write_atomically
from mmdefense.errors import BadInputError, one_line
from mmdefense.report.encoding import plain
from mmdefense.report.record import PurificationRecord

__all__ = ["differing", "materials", "subjects", "write_statement"]

_TYPE = "https://in-toto.io/Statement/v1"


def write_statement(
    record: PurificationRecord,
    folder: Path,
    inputs: Mapping[str, str] | None = None,
    *,
    only: Collection[str] | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Write ``purification.json`` for a folder whose other files are all there, atomically.

    The page is no subject, for it is made from this file, and may be made again.

    Args:
        record: What is known.
        folder: The output; hashed as it is.
        inputs: SHA-256 of each file that was read, by name.
        only: Names of the files that it is about; by default all in the folder.
        known: SHA-256 of files of the folder that were hashed already, by name.
    """
    found = _hashed(folder, known or {})
    named = found if only is None else {name: found[name] for name in found if name in only}
    predicate = {"materials": _resources(inputs or {}), **json.loads(record.to_json())}
    statement = {
        "_type": _TYPE,
        "subject": _resources(named),
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    text = json.dumps(plain(statement), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / RECORD, lambda file: file.write(text.encode()))


def _hashed(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, but of the record, page and signature."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    hashed = {name: path for name, path in named.items() if name not in {RECORD, PAGE, SIGNATURE}}
    return {name: known.get(name) or _sha256(path) for name, path in hashed.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _resources(hashes: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "digest": {"sha256": value}} for name, value in hashes.items()]


def differing(folder: Path, known: Mapping[str, str] | None = None) -> list[str]:
    """Return what speaks against the files of an output being those of its statement.

    Args:
        folder: The output.
        known: SHA-256 of files that were hashed already, by their path.

    Returns:
        A phrase for each file that changed or is missing; none where all are as they were.
        Files that have come since are not looked at.

    Raises:
        BadInputError: If there is no statement.
    """
    found = []
    for name, digest in _named(folder, _statement(folder).get("subject")).items():
        path = _file(folder, name)
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            found.append(f"{name} is missing")
        elif ((known or {}).get(str(path.resolve())) or _sha256(path)) != digest:
            found.append(f"{name} is another file than the one that was written")
    return found


def _file(folder: Path, name: str) -> Path:
    """Return where a file of a statement lies; there, names that are no UTF-8 stand escaped."""
    path = folder / name
    if path.is_file():
        return path
    others = (p for p in folder.rglob("*") if plain(p.relative_to(folder).as_posix()) == name)
    return next(others, path)


def subjects(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a statement is about, by name.

    Raises:
        BadInputError: If there is no statement.
    """
    return _named(folder, _statement(folder).get("subject"))


def materials(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that an output came from, by name.

    Raises:
        BadInputError: If there is no statement.
    """
    predicate = _statement(folder).get("predicate")
    return _named(folder, predicate.get("materials") if isinstance(predicate, dict) else None)


def _statement(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"record {path} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict) or value.get("_type") != _TYPE:
        raise BadInputError(f"record {path} must be a statement of _type {_TYPE}")
    return value


def _named(folder: Path, resources: Any) -> dict[str, str]:
    """Return the digests of resource descriptors by name.

    Raises:
        BadInputError: If they are none.
    """
    try:
        return {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in resources}
    except (KeyError, TypeError) as error:
        raise BadInputError(
            f"record {folder / RECORD} must list files as {{name, digest: {{sha256}}}}"
        ) from error
