"""The names of the files that this package writes, and where they may be written.

An output is never an input, nor inside or around one; and whatever is in its place is replaced only
if it is an output itself and the user asks for it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from mmdefense.errors import BadInputError

__all__ = [
    "BOM",
    "BOM_MARK",
    "CARD",
    "COMPARISON",
    "EVALUATION_MARK",
    "PAGE",
    "PAGE_MARK",
    "PLOTS",
    "PREDICATE_TYPE",
    "RECORD",
    "SCAN",
    "SIGNATURE",
    "check_replaceable_file",
    "check_separate",
    "is_output",
    "is_record",
]

RECORD, PAGE, CARD, PLOTS = "purification.json", "report.html", "README.md", "report.npz"
"""Names of the files written next to the model: record, page, model card, data of plots."""
SCAN, COMPARISON, BOM = "scan.json", "comparison.json", "bom.cdx.json"
SIGNATURE = "model.sig"
"""Names of what may stand beside them: a scan, a demo's record, a bill of materials, a signature.
"""
PREDICATE_TYPE = "urn:mmdefense:purification:1"
PAGE_MARK = '<meta name="generator" content="mmdefense">'
EVALUATION_MARK = '"kind": "evaluation"'
BOM_MARK = '"bom-ref": "mmdefense"'
"""Marks near the beginning of every page, evaluation and bill of materials, to identify them."""

_HEAD = 2048
_LARGEST_RECORD = 1 << 28


def is_record(name: str) -> bool:
    """Return whether a file of that name in an output is taken for one of our records."""
    return name.casefold() in {RECORD, SCAN, COMPARISON, BOM, PAGE, PLOTS, SIGNATURE}


def is_output(folder: Path) -> bool:
    """Return whether a folder holds the record of a purification or of a demo."""
    return any(_says(folder / name) for name in (RECORD, COMPARISON))


def _says(path: Path) -> bool:
    """Return whether a file is a record that this package wrote."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_RECORD:
            return False
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    return value.get("predicateType") == PREDICATE_TYPE or value.get("kind") == "comparison"


def check_separate(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is an input, lies in one or holds one, by whatever name it is called.

    Files and folders are compared by their identity on disk, so that links, ``..`` and letter case
    do not matter.

    Args:
        out: A file or folder, which need not exist.
        inputs: What is read; a name that is not an existing path is ignored.

    Raises:
        BadInputError: Naming the first such input.
    """
    above = _lineage(out)
    for given in inputs:
        if not os.path.exists(given):
            continue
        itself = _lineage(given)
        how = ""
        if above[0] == itself[0]:
            how = "is the same as"
        elif itself[0] in above:
            how = "lies in"
        elif above[0] in itself:
            how = "holds"
        if how:
            raise BadInputError(
                f"output {out} {how} {given}, which is an input; choose another path"
            )


def _lineage(path: str | Path) -> list[tuple[int, int] | None]:
    """Return the disk identities of a path and of each folder above it; None where missing."""
    real = Path(os.path.realpath(path))
    found: list[tuple[int, int] | None] = []
    for one in (real, *real.parents):
        try:
            seen = one.stat()
        except OSError:
            found.append(None)
        else:
            found.append((seen.st_dev, seen.st_ino))
    return found if found[0] is not None else [(-1, -1), *found[1:]]


def check_replaceable_file(
    path: Path, mark: str | None, inputs: Iterable[str | Path] = (), *, force: bool = False
) -> None:
    """Refuse a file that is to be written, before any work is done for it.

    Args:
        path: The file.
        mark: What is near the beginning of every such file of ours; None if nothing is.
        inputs: What is read; see :func:`check_separate`.
        force: Whether a file without the mark is replaced.

    Raises:
        BadInputError: If it is an input or inside one, not a regular file, in a missing folder, or
            an existing file without the mark.
    """
    check_separate(path, inputs)
    if not path.absolute().parent.is_dir():
        raise BadInputError(f"the folder of {path} does not exist; create it first")
    if not os.path.lexists(path):
        return
    if not stat.S_ISREG(path.lstat().st_mode):
        raise BadInputError(
            f"{path} is not a regular file and is not replaced; choose another name"
        )
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not force and (mark is None or mark.encode() not in head):
        remedy = "choose another name" + (", or give --force to replace it" if mark is None else "")
        what = "exists" if mark is None else "exists and is not an earlier output of this command"
        raise BadInputError(f"{path} {what}; {remedy}")
