"""Hash and scan every file of a model without running any."""

from __future__ import annotations

import dataclasses
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.faults import all_files, link_faults, safetensors_faults
from mmdefense.checkpoints.huggingface import base_folder
from mmdefense.errors import BadInputError, MMDefenseError, one_line
from mmdefense.findings import Finding, Level, Rule
from mmdefense.report.encoding import plain
from mmdefense.sandbox import BeyondBoundsError, Channel, in_child
from mmdefense.scanning.contents import PICKLE_SUFFIXES, UNSEEN, scan_content, unread_level
from mmdefense.scanning.texts import is_unknown, scan_text

__all__ = ["scan_files"]

HEADER = Rule(
    id="safetensors-header",
    level="high",
    measured="the header of a safetensors file",
    reference="the file's length and the rules of the format",
    meaning="The header contradicts the file; a careless reader reads or writes out of bounds.",
    blind_spot="what the tensors do.",
)
LINK = Rule(
    id="file-link-outside",
    level="high",
    measured="where a symlink points",
    reference="the model's own folder",
    meaning="Reading it would read a file that is not part of the model.",
    blind_spot="what is there: it was not opened.",
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
    meaning="It could not be inspected.",
    blind_spot="its content.",
)

BASE = Rule(
    id="adapter-base",
    level="low",
    measured="the base model of an adapter",
    reference="a folder, or the local cache of the hub",
    meaning="It is not here, and is not downloaded just because a model names it.",
    blind_spot="all of it: scan it separately.",
)
BEYOND = Rule(
    id="file-beyond-bounds",
    level="medium",
    measured="the time and memory needed to inspect it",
    reference="limits that grow with the size of the file",
    meaning="It may be built to exhaust or crash its reader.",
    blind_spot="what it holds: it was not read to the end.",
)
MORE = Rule(
    id="file-more-findings",
    level="medium",
    measured="the number of findings in one file",
    reference="the first of each level",
    meaning="The others are left out, so that these can be read.",
    blind_spot="what the omitted ones say; only their levels are counted.",
)

MOST = 100
"""Most findings per level to list for one file. Our choice."""
_ATTEMPTS = 3
"""Files that may kill their reader before the remaining ones are skipped. Our choice."""
_HEAD = 1 << 16


def scan_files(path: str | Path) -> list[Finding]:
    """Return the findings on a model's files; none of them is run or unpacked to disk.

    They are read in a child process; see :mod:`mmdefense.sandbox`. A file that kills it is a
    finding, and the others are read in another child. Files of an adapter's base model are called
    ``base/...``.

    Args:
        path: A folder, or a single file.

    Raises:
        BadInputError: If there is none at ``path``.
    """
    root = Path(path)
    if not root.exists():
        raise BadInputError(f"model {str(path)!r} must be a file or a folder; none found")
    found = _scan_folder(root)
    try:
        base = _base(root)
    except MMDefenseError as error:
        return [*found, BASE.found("base", one_line(error))]
    of_base = _scan_folder(base) if base else []
    return [*found, *(dataclasses.replace(one, subject=f"base/{one.subject}") for one in of_base)]


def _base(root: Path) -> Path | None:
    """Return the folder of an adapter's base model; None if the model is not an adapter.

    Raises:
        BadInputError: If the base is not here.
        UnsupportedError: If the base is an adapter itself.
    """
    return base_folder(root) if (root / "adapter_config.json").is_file() else None


def _scan_folder(root: Path) -> list[Finding]:
    files, found = all_files(root), list[Finding]()
    for _ in range(_ATTEMPTS):
        files, ended = _scan_in_child(files, root, found)
        if not files:
            break
        level = unread_level(files[0].name)
        found.append(BEYOND.found(_name(files[0], root), ended, level=level))
        files = files[1:]
    found += [
        BEYOND.found(_name(file, root), "not inspected, after others exceeded the limits")
        for file in files[:MOST]
    ]
    if len(files) > MOST:
        found.append(MORE.found("files", f"{len(files) - MOST} files were not inspected"))
    return found


def _scan_in_child(files: list[Path], root: Path, found: list[Finding]) -> tuple[list[Path], str]:
    """Scan files in a child process; add to ``found``.

    Returns: The remaining files, the first of which ended the reader, and how it did.
    """
    done = 0

    def scan(channel: Channel) -> None:
        for file in files:
            channel.begin(f"reading {_name(file, root)}", _size(file))
            for finding in _capped(_scan_file(file, root), _name(file, root)):
                channel.send(plain(finding))
            channel.send(None)

    def receive(message: Any) -> None:
        nonlocal done
        if message is None:
            done += 1
        else:
            found.append(Finding(**message))

    try:
        in_child(scan, receive, what=f"reading {root.name}", size=0)
    except BeyondBoundsError as error:
        return files[done:], str(error)
    return [], ""


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a broken link
        return 0


def _capped(findings: Iterable[Finding], subject: str) -> Iterator[Finding]:
    """Yield the first findings of each level of a file, and how many more there are."""
    counts = Counter[Level]()
    for finding in findings:
        counts[finding.level] += 1
        if counts[finding.level] <= MOST:
            yield finding
    for level, count in counts.items():
        if count > MOST:
            yield MORE.found(subject, f"{count - MOST} more of {level} level", level=level)


def _name(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def _leaves(file: Path, root: Path) -> bool:
    return file != root and bool(link_faults(file, root))


def _scan_file(file: Path, root: Path) -> Iterator[Finding]:
    subject = _name(file, root)
    if _leaves(file, root):
        yield LINK.found(subject, link_faults(file, root)[0].text)
    elif file.is_dir():  # a link to a folder inside, whose files are listed anyway
        return
    elif not file.exists() or not stat.S_ISREG(file.stat().st_mode):
        yield SPECIAL.found(subject, "not a regular file")
    else:
        try:
            yield from _scan_plain(file, subject)
        except Exception as error:  # whatever the reader's error, the file was not read
            why = f"{type(error).__name__}: {one_line(error)}"
            yield UNREADABLE.found(subject, why, level=unread_level(file.name))


def _scan_plain(file: Path, subject: str) -> Iterator[Finding]:
    suffix, is_silent = file.suffix.lower(), True
    if suffix == ".safetensors":
        for fault in safetensors_faults(file):
            yield HEADER.found(subject, fault.text)
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
        for finding in scan_text(stream, subject, file.name, file.parent):
            is_silent = False
            yield finding
        stream.seek(0)
        for finding in scan_content(stream, subject, name=file.name):
            is_silent = False
            yield finding
    if is_silent and suffix not in PICKLE_SUFFIXES and is_unknown(file.name, head):
        yield UNSEEN.found(subject, f"a {suffix} file" if suffix else "a file of unknown type")
