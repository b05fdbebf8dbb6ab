"""Every file of a model, hashed and looked into without being run."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mmdefense.checkpoints.faults import link_faults, safetensors_faults
from mmdefense.errors import BadInputError, one_line
from mmdefense.scanning.configs import scan_json, scan_python, scan_template
from mmdefense.scanning.contents import UNSEEN, scan_content
from mmdefense.scanning.findings import Finding, Rule

__all__ = ["hash_all", "scan_files"]

HEADER = Rule(
    id="safetensors-header",
    level="high",
    measured="the header of a safetensors file",
    reference="the file's length, and the format's rules",
    meaning="The header lies about the file; a careless reader reads or writes out of bounds.",
    blind_spot="what the tensors do.",
)
LINK = Rule(
    id="file-link-outside",
    level="high",
    measured="where a symbolic link leads",
    reference="the model's own folder",
    meaning="Reading it would read a file that is no part of the model.",
    blind_spot="what lies there: it was not opened.",
)
SPECIAL = Rule(
    id="file-special",
    level="high",
    measured="the type of a directory entry",
    reference="plain files",
    meaning="Opening a device, pipe or socket can block or do harm.",
    blind_spot="what is behind it: it was not opened.",
)
UNREADABLE = Rule(
    id="file-unreadable",
    level="medium",
    measured="whether the file can be read",
    reference="a file that can be read",
    meaning="It could not be looked into.",
    blind_spot="its content.",
)

MAX_TEXT = 1 << 26
"""Bytes of a text file that is parsed. Ours."""


def scan_files(path: str | Path) -> list[Finding]:
    """Return what speaks against the files of a model; none of them is run or unpacked to disk.

    Args:
        path: A folder, or a single file.

    Raises:
        BadInputError: If there is neither.
    """
    root = Path(path)
    if not root.exists():
        raise BadInputError(f"model {str(path)!r} must be a file or a folder; none found")
    return [finding for file in _all_files(root) for finding in _scan_file(file, root)]


def hash_all(path: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its name in the folder, as ``sha256sum`` prints it.

    Files that cannot be read are left out.
    """
    root = Path(path)
    hashes = {}
    for file in _all_files(root):
        if file.is_file() and not _leaves(file, root):
            with suppress(OSError), file.open("rb") as stream:  # that is among the findings
                hashes[_name(file, root)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _all_files(root: Path) -> list[Path]:
    """Return everything in a folder but its folders, hidden names as well; links not followed."""
    if not root.is_dir():
        return [root]
    found = []
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [Path(folder) / name for name in [*names, *links]]
    return sorted(found)


def _name(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def _leaves(file: Path, root: Path) -> bool:
    return file != root and bool(link_faults(file, root))


def _scan_file(file: Path, root: Path) -> Iterator[Finding]:
    subject = _name(file, root)
    if _leaves(file, root):
        yield LINK.found(subject, link_faults(file, root)[0].text)
    elif file.is_dir():  # a link to a folder within, which is walked itself
        return
    elif not file.exists() or not stat.S_ISREG(file.stat().st_mode):
        yield SPECIAL.found(subject, "no plain file")
    else:
        try:
            yield from _scan_plain(file, subject)
        except OSError as error:
            yield UNREADABLE.found(subject, one_line(error))


def _scan_plain(file: Path, subject: str) -> Iterator[Finding]:
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        for fault in safetensors_faults(file):
            yield HEADER.found(subject, fault.text)
    elif suffix in {".json", ".py", ".jinja", ".jinja2"}:
        yield from _scan_text(file, subject, suffix)
    with file.open("rb") as stream:
        yield from scan_content(stream, subject)


def _scan_text(file: Path, subject: str, suffix: str) -> Iterator[Finding]:
    if file.stat().st_size > MAX_TEXT:
        yield UNSEEN.found(subject, f"{file.stat().st_size} bytes of text", level="medium")
    elif suffix == ".json":
        yield from scan_json(file, subject)
    elif suffix == ".py":
        yield from scan_python(file, subject)
    else:
        yield from scan_template(file.read_text(encoding="utf-8", errors="replace"), subject)
