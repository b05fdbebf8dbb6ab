"""Scan what a file holds, by its bytes and not its name: pickles, archives, arrays, programs.

Archives are read entry by entry and never unpacked to disk by name; an entry is scanned like a
file. Zip entries are read as leniently as PyTorch reads them (by picklescan's reader, which ignores
flags, local names and checksums), so that a broken archive hides nothing.
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

from mmdefense.checkpoints.faults import (
    BOMB_BYTES,
    BOMB_RATIO,
    MAX_ENTRIES,
    is_zip,
    leads_outside,
    zip_faults,
)
from mmdefense.errors import one_line
from mmdefense.findings import Finding, Level, Rule
from mmdefense.scanning.arrays import MAGIC, read_header
from mmdefense.scanning.opcodes import follow
from mmdefense.scanning.pickles import IMPORT, MAX_DEPTH, PLAIN, is_deliberate, scan_pickles
from mmdefense.scanning.python import CODE
from mmdefense.scanning.streams import DAMAGE, MAX_UNPACKED, copied, unpacker
from mmdefense.scanning.texts import is_text, scan_text

__all__ = ["PICKLE_SUFFIXES", "scan_content", "unread_level"]

ARCHIVE = Rule(
    id="archive-fault",
    level="high",
    measured="the structure of the archive",
    reference="uniquely named entries, one after the other, of the size they claim",
    meaning="The archive is built to exhaust memory or disk, to write outside its folder, or to "
    "be read in two ways.",
    blind_spot="archives other than zip, tar, gzip, bz2, xz and zlib.",
)
DEEP = Rule(
    id="archive-nesting",
    level="high",
    measured="archives within archives",
    reference=f"{MAX_DEPTH} levels",
    meaning="Layers of archives hide what the innermost one holds.",
    blind_spot="anything deeper.",
)
DAMAGED = Rule(
    id="archive-damaged",
    level="medium",
    measured="whether the archive can be read to the end",
    reference="an undamaged archive",
    meaning="It is damaged, or built so that only some readers can read it.",
    blind_spot="what follows the damage.",
)
OBJECTS = Rule(
    id="array-of-objects",
    level="medium",
    measured="the type of a NumPy array",
    reference="numbers",
    meaning="An array of objects is a pickle; numpy.load runs it if allow_pickle is given.",
    blind_spot="what the objects do; the pickle's imports are reported separately.",
)
MISMATCH = Rule(
    id="file-disguised",
    level="medium",
    measured="the content against the file's name",
    reference="the type that the name says",
    meaning="A pickle under another name slips past scanners that go by names.",
    blind_spot="why it has that name.",
)
PROGRAM = Rule(
    id="file-executable",
    level="medium",
    measured="whether the file is a program",
    reference="a model folder holds data",
    meaning="It can be executed, and no model needs it.",
    blind_spot="what the program does.",
)
TORCHSCRIPT = Rule(
    id="file-torchscript",
    level="medium",
    measured="whether the archive holds TorchScript",
    reference="tensors only",
    meaning="torch.jit.load runs the program in it.",
    blind_spot="what the program does.",
)
UNSEEN = Rule(
    id="file-not-looked-into",
    level="low",
    measured="the type of the file",
    reference="file types that this scan reads",
    meaning="It was hashed but not read.",
    blind_spot="everything inside, for example a Lambda layer of Keras or a custom ONNX operator.",
)

PICKLE_SUFFIXES = {
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".p", ".pk", ".sav", ".th"),
    *(".dat", ".data", ".model", ".dill", ".tar", ".pdparams", ".pdopt", ".npy", ".npz", ".pckl"),
}
_CONTAINERS = {
    *(".zip", ".npz", ".npy", ".mar", ".nemo", ".keras", ".gz", ".bz2", ".xz", ".lzma", ".z"),
    *(".ptl", ".pt2", ".torchscript", ".zst", ".lz4"),
}
_LOOSE = {".dat", ".data", ".model", ".tar"}
"""Suffixes that pickles share with other kinds of file."""
_NUMBERS = ".bin"
"""The suffix that pickles share with files of raw numbers."""
_PACKINGS = re.compile(r"(\.(gz|bz2|xz|lzma|zst|lz4|z))+$")
_OF_TORCH_TAR = {"storages", "tensors", "pickle"}
"""Names of the pickles in PyTorch's first format, a tar."""

_OPAQUE: Mapping[bytes, tuple[str, bool]] = {
    b"GGUF": ("GGUF", False),
    b"\x89HDF\r\n\x1a\n": ("HDF5 (Keras h5)", True),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", True),
    b"Rar!\x1a\x07": ("a RAR archive", True),
    b"\x28\xb5\x2f\xfd": ("a zstd stream", True),
    b"\x04\x22\x4d\x18": ("an lz4 stream", True),
}
# Files with these suffixes are still scanned for pickles.
_OPAQUE_SUFFIXES = {
    *(".onnx", ".tflite", ".pb", ".mlmodel", ".engine", ".plan", ".msgpack", ".ot", ".keras"),
    *(".h5", ".hdf5", ".gguf", ".ggml", ".mlpackage", ".pdmodel", ".rknn", ".pt2"),
}
_OF_CODE = {".keras", ".h5", ".hdf5", ".pb"}
"""Those of them with code that a loader runs."""
_PROGRAMS = (b"\x7fELF", b"MZ\x90", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"#!/")
_ZIP, _COMPRESSED = b"PK\x03\x04", (b"\x1f\x8b", b"\xfd7zXZ\x00")
_HEAD = 1 << 16
_SCRIPTED = re.compile(r"torch\.jit\._pickle\.\w+|__torch__\..+")
_BLOCK = 512


def scan_content(
    file: IO[bytes], subject: str, *, name: str | None = None, depth: int = 0
) -> Iterator[Finding]:
    """Yield the findings on the bytes of a file, whatever its name.

    Loaders disagree about types, so a file is scanned as every type that it could be.

    Args:
        file: A seekable binary file.
        subject: Its name in the findings.
        name: Its own name, if it is inside another file.
        depth: Number of archives around it.
    """
    if depth > MAX_DEPTH:
        yield DEEP.found(subject, depth)
        return
    file.seek(0)
    head = file.read(_HEAD)
    suffix = _suffix(name or subject)
    yield from _scan_opaque(head, subject, suffix)
    if is_zip(file):
        yield from _disguise(subject, suffix, "a zip archive")
        yield from _scan_zip(file, subject, depth)
    elif head.startswith(_ZIP):
        yield _unread(subject, name or subject, "a zip archive without a central directory")
    opener = unpacker(head)
    if opener:
        yield from _scan_packed(opener, file, subject, name or subject, depth)
    elif head.startswith(_COMPRESSED):
        yield _unread(subject, name or subject, "a compressed stream that is damaged at its start")
    elif head.startswith(MAGIC):
        yield from _scan_array(file, subject, depth)
    elif _is_tar(head):
        yield from _scan_tar(file, subject, depth)
    if not head.startswith(_ZIP):  # as a pickle, a persistent id that no loader resolves
        is_other = bool(opener) or head.startswith(MAGIC) or _is_tar(head)
        yield from _scan_as_pickle(file, subject, name or subject, is_other, depth)
    if depth > 0:  # else the caller does it, who knows the folder
        yield from scan_text(file, subject, (name or subject).rpartition("/")[2])


def _suffix(name: str) -> str:
    """Return the suffix that names the file type, ignoring a compression suffix after it."""
    lowered = name.rpartition("/")[2].lower()
    return PurePosixPath(_PACKINGS.sub("", lowered)).suffix or PurePosixPath(lowered).suffix


def _unread(subject: str, name: str, why: str) -> Finding:
    """Return the finding that something was not read; high if a loader would unpickle it."""
    return DAMAGED.found(subject, why, level=unread_level(name))


def _scan_as_pickle(
    file: IO[bytes], subject: str, name: str, is_other: bool, depth: int
) -> Iterator[Finding]:
    """Yield the findings on the bytes read as a pickle; many other formats can be one too."""
    suffix = _suffix(name)
    declared = _declared(suffix) or (name.rpartition("/")[2] in _OF_TORCH_TAR and depth > 0)
    declared &= not is_other
    file.seek(0)
    loose = suffix == _NUMBERS
    found = list(scan_pickles(file, subject, declared=declared, loose=loose, depth=depth))
    yield from found
    if found:
        yield from _disguise(subject, suffix, "a pickle")


def _scan_opaque(head: bytes, subject: str, suffix: str) -> Iterator[Finding]:
    if head.startswith(_PROGRAMS) or suffix == ".pyc":
        yield PROGRAM.found(subject, "compiled code" if suffix == ".pyc" else repr(head[:4]))
    for magic, (kind, can_hide) in _OPAQUE.items():
        if head.startswith(magic):
            level: Level = "high" if _declared(suffix) and suffix != _NUMBERS else "medium"
            yield UNSEEN.found(subject, kind, level=level if can_hide else "low")
            return
    if suffix in _OPAQUE_SUFFIXES:
        hides = suffix in _OF_CODE
        yield UNSEEN.found(subject, f"a {suffix} file", level="medium" if hides else "low")


def _disguise(subject: str, suffix: str, kind: str) -> Iterator[Finding]:
    if suffix and suffix not in PICKLE_SUFFIXES | _CONTAINERS:
        yield MISMATCH.found(subject, f"{kind} called {suffix}")


def _declared(suffix: str) -> bool:
    return suffix in PICKLE_SUFFIXES - _LOOSE


def unread_level(name: str) -> Level:
    """Return the level of the finding that a file of this name could not be read."""
    return "high" if _declared(_suffix(name)) else "medium"


def _scan_zip(file: IO[bytes], subject: str, depth: int) -> Iterator[Finding]:
    faults = zip_faults(file)
    for fault in faults:
        yield ARCHIVE.found(subject, fault.text)
    if any(fault.kind == "bomb" for fault in faults):
        return
    from picklescan.relaxed_zipfile import RelaxedZipFile

    try:
        with RelaxedZipFile(file) as archive:
            is_script = _is_torchscript(archive.namelist())
            for entry in archive.infolist():
                for found in _scan_entry(archive, entry, f"{subject}!{entry.filename}", depth):
                    if not (is_script and _of_torchscript(found)):
                        yield found
            if is_script:
                yield TORCHSCRIPT.found(subject, "a program next to the tensors")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return  # its faults are reported above


def _is_torchscript(names: list[str]) -> bool:
    return any("/code/" in name and name.endswith(".py") for name in names)


def _of_torchscript(found: Finding) -> bool:
    """Return whether every TorchScript archive has this finding: for its classes and line maps."""
    if found.id in {IMPORT.id, PLAIN.id}:
        return all(_SCRIPTED.fullmatch(name) for name in str(found.value).split(", "))
    if found.id == CODE.id:
        return "/code/" in found.subject
    return found.id == MISMATCH.id and found.subject.endswith(".debug_pkl")


def _scan_entry(archive: Any, entry: Any, subject: str, depth: int) -> Iterator[Finding]:
    if entry.is_dir():
        return
    suffix = _suffix(entry.filename)
    try:
        with archive.open(entry) as stream:
            head = stream.read(_HEAD)
            if not is_text(entry.filename) and not _needs_scan(head, suffix, entry.file_size):
                return
            with copied(stream, head) as copy:
                if copy.damage:
                    yield _unread(subject, entry.filename, copy.damage)
                elif copy.checksum != entry.CRC:
                    yield ARCHIVE.found(subject, "its checksum is wrong", level="medium")
                yield from scan_content(copy.file, subject, name=entry.filename, depth=depth + 1)
    except OverflowError as error:
        yield ARCHIVE.found(subject, f"{one_line(error)}: a decompression bomb")
    except DAMAGE as error:
        yield _unread(subject, entry.filename, one_line(error))


def _needs_scan(head: bytes, suffix: str, size: int) -> bool:
    """Return whether an entry may be more than raw numbers, which are large and not copied."""
    if head.startswith(MAGIC):
        try:
            return read_header(io.BytesIO(head))[0]
        except ValueError:
            return True
    if head.startswith((b"PK", *_COMPRESSED, *_OPAQUE, *_PROGRAMS)) or _is_tar(head):
        return True
    if suffix in _CONTAINERS | _OPAQUE_SUFFIXES | PICKLE_SUFFIXES or unpacker(head):
        return True
    followed = follow(io.BytesIO(head), size=size)
    return is_deliberate(followed) or (followed.cut and size > len(head))


def _scan_packed(
    opener: Callable[[IO[bytes]], Any], file: IO[bytes], subject: str, name: str, depth: int
) -> Iterator[Finding]:
    limit = max(BOMB_BYTES, BOMB_RATIO * file.seek(0, io.SEEK_END))
    file.seek(0)
    inner = _PACKINGS.sub("", name.rpartition("/")[2], count=1)
    try:
        with copied(opener(file), limit=min(limit, MAX_UNPACKED)) as copy:
            if copy.damage:
                yield DAMAGED.found(subject, copy.damage)
            yield from scan_content(copy.file, f"{subject}!{inner}", name=inner, depth=depth + 1)
    except OverflowError as error:
        yield ARCHIVE.found(subject, f"{one_line(error)}: a decompression bomb")


def _is_tar(head: bytes) -> bool:
    """Return whether a tar of any form starts here; its checksum identifies one without magic."""
    try:
        return bool(tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape").name)
    except (tarfile.HeaderError, ValueError):
        return head[257:262] == b"ustar"


def _scan_tar(file: IO[bytes], subject: str, depth: int) -> Iterator[Finding]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for count, entry in enumerate(archive):
                yield from _scan_tar_entry(archive, entry, subject, size, depth)
                if count > MAX_ENTRIES:
                    yield ARCHIVE.found(subject, f"it has more than {MAX_ENTRIES} entries")
                    return
            end = archive.offset
    except DAMAGE as error:
        yield _unread(subject, subject, one_line(error))
        return
    if _has_more(file, end):
        yield ARCHIVE.found(subject, f"data follows its end, at byte {end}")


def _has_more(file: IO[bytes], start: int) -> bool:
    """Return whether anything but zeros follows."""
    file.seek(start)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return True
    return False


def _scan_tar_entry(
    archive: tarfile.TarFile, entry: tarfile.TarInfo, subject: str, size: int, depth: int
) -> Iterator[Finding]:
    if leads_outside(entry.name) or (entry.islnk() and leads_outside(entry.linkname)):
        yield ARCHIVE.found(subject, f"{entry.name!r} would be unpacked outside its folder")
    elif entry.issym():
        yield ARCHIVE.found(subject, f"{entry.name!r} is a symlink to {entry.linkname!r}")
    elif entry.isdev():
        yield ARCHIVE.found(subject, f"{entry.name!r} is a device")
    if entry.isdir() or entry.issym() or entry.islnk() or entry.isdev():
        return
    if entry.size > size:
        yield ARCHIVE.found(
            subject, f"{entry.name!r} claims {entry.size} bytes: a decompression bomb"
        )
    elif stream := archive.extractfile(entry):
        yield from scan_content(stream, f"{subject}!{entry.name}", name=entry.name, depth=depth + 1)


def _scan_array(file: IO[bytes], subject: str, depth: int) -> Iterator[Finding]:
    """Yield what is wrong with an array; its header says whether numbers or a pickle follow."""
    file.seek(0)
    try:
        holds_objects, start = read_header(file)
    except ValueError as error:
        yield DAMAGED.found(subject, one_line(error), level="high")
        return
    if holds_objects:
        yield OBJECTS.found(subject, "objects")
        file.seek(start)
        yield from scan_pickles(file, subject, depth=depth)
