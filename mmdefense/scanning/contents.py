"""What a file holds, told by its bytes and not by its name: pickles, archives, arrays, programs.

Archives are read entry by entry and never unpacked to disk by name; an entry is looked at like a
file of its own. Zip entries are read as forgivingly as PyTorch reads them (by picklescan's reader,
which ignores flags, local names and checksums), so that a broken archive hides nothing.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from mmdefense.scanning.findings import Finding, Rule
from mmdefense.scanning.pickles import (
    IMPORT,
    MAX_DEPTH,
    calls_dangerous,
    follow,
    scan_pickles,
)

__all__ = ["PICKLE_SUFFIXES", "scan_content"]

ARCHIVE = Rule(
    id="archive-fault",
    level="high",
    measured="the structure of the archive",
    reference="entries with names of their own, one behind the other, of the size they unpack to",
    meaning="The archive is made to exhaust, to write elsewhere, or to be read in two ways.",
    blind_spot="archives of kinds other than zip, tar, gzip, bz2, xz and zlib.",
)
DEEP = Rule(
    id="archive-nesting",
    level="high",
    measured="archives within archives",
    reference=f"{MAX_DEPTH} levels",
    meaning="Layers of archives hide what the innermost one holds.",
    blind_spot="what lies deeper.",
)
DAMAGED = Rule(
    id="archive-damaged",
    level="medium",
    measured="whether the archive can be read to its end",
    reference="an undamaged archive",
    meaning="It is damaged, or made so that only some readers can read it.",
    blind_spot="what stands behind the damage.",
)
OBJECTS = Rule(
    id="array-of-objects",
    level="medium",
    measured="the type of a NumPy array",
    reference="numbers",
    meaning="An array of objects is a pickle; numpy.load runs it where allow_pickle is given.",
    blind_spot="what the objects do; the pickle's imports are reported apart.",
)
MISMATCH = Rule(
    id="file-disguised",
    level="medium",
    measured="the content against the file's name",
    reference="the kind that the name says",
    meaning="A pickle under another name slips past scanners that go by names.",
    blind_spot="why it was named so.",
)
PROGRAM = Rule(
    id="file-executable",
    level="medium",
    measured="whether the file is a program",
    reference="a model folder holds data",
    meaning="It can be run, and no model needs it.",
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
    measured="the kind of the file",
    reference="kinds that this scan reads",
    meaning="Only its hash was taken.",
    blind_spot="everything inside, for example a Lambda layer of Keras or a custom ONNX operator.",
)

PICKLE_SUFFIXES = {
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".p", ".pk", ".sav", ".th"),
    *(".dat", ".data", ".model", ".dill", ".tar", ".pdparams", ".pdopt"),
}
_CONTAINERS = {
    *(".zip", ".npz", ".npy", ".mar", ".nemo", ".keras", ".gz", ".bz2", ".xz"),
    *(".ptl", ".pt2", ".torchscript"),
}
_LOOSE = {".dat", ".data", ".model", ".tar"}
"""Of those suffixes, the ones that other kinds of file bear as often."""

_OPAQUE: Mapping[bytes, tuple[str, bool]] = {
    b"GGUF": ("GGUF", False),
    b"\x89HDF\r\n\x1a\n": ("HDF5 (Keras h5)", False),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", True),
    b"Rar!\x1a\x07": ("a RAR archive", True),
    b"\x28\xb5\x2f\xfd": ("a zstd stream", True),
    b"\x04\x22\x4d\x18": ("an lz4 stream", True),
}
# Behind these suffixes a pickle is still looked for.
_OPAQUE_SUFFIXES = {
    *(".onnx", ".tflite", ".pb", ".mlmodel", ".engine", ".plan", ".msgpack", ".ot", ".keras"),
    *(".h5", ".hdf5", ".gguf", ".ggml", ".mlpackage", ".pdmodel", ".rknn", ".pt2"),
}
_PROGRAMS = (b"\x7fELF", b"MZ\x90", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"#!/")
_PACKED: Mapping[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_HEAD = 1 << 16
_IN_MEMORY, _MAX_UNPACKED = 1 << 26, 1 << 32
_SCRIPTED = re.compile(r"torch\.jit\._pickle\.\w+|__torch__\..+")
_OBJECT = re.compile(rb"""['"][|=<>]?(O\d*|object)['"]""")


def scan_content(file: IO[bytes], subject: str, *, depth: int = 0) -> Iterator[Finding]:
    """Yield what speaks against the bytes of a file, whatever its name says they are.

    Args:
        file: A binary file that can be searched, at its start.
        subject: Its name in the findings.
        depth: How many archives it lies in.
    """
    if depth > MAX_DEPTH:
        yield DEEP.found(subject, depth)
        return
    head = file.read(_HEAD)
    suffix = PurePosixPath(subject.split("!")[-1]).suffix.lower()
    yield from _scan_opaque(head, subject, suffix)
    if is_zip(file):
        yield from _disguise(subject, suffix, "a zip archive")
        yield from _scan_zip(file, subject, depth)
    elif head.startswith(b"PK\x03\x04"):
        yield DAMAGED.found(subject, "a zip archive without a table of contents")
    packed = _unpacker(head)
    if packed:
        yield from _scan_packed(packed, file, subject, depth)
    elif head.startswith(b"\x93NUMPY"):
        yield from _scan_array(head, file, subject, depth)
    elif head[257:262] == b"ustar":
        yield from _scan_tar(file, subject, depth)
    elif not head.startswith(b"PK\x03\x04") and _is_pickle(head, suffix) and not _is_opaque(head):
        file.seek(0)
        found = list(scan_pickles(file, subject, declared=_declared(suffix), depth=depth))
        yield from found
        if found:
            yield from _disguise(subject, suffix, "a pickle")


def _scan_opaque(head: bytes, subject: str, suffix: str) -> Iterator[Finding]:
    if head.startswith(_PROGRAMS) or suffix == ".pyc":
        yield PROGRAM.found(subject, "compiled code" if suffix == ".pyc" else repr(head[:4]))
    for magic, (kind, is_archive) in _OPAQUE.items():
        if head.startswith(magic):
            yield UNSEEN.found(subject, kind, level="medium" if is_archive else "low")
            return
    if suffix in _OPAQUE_SUFFIXES:
        yield UNSEEN.found(subject, f"a {suffix} file")


def _is_opaque(head: bytes) -> bool:
    return head.startswith(tuple(_OPAQUE))


def _disguise(subject: str, suffix: str, kind: str) -> Iterator[Finding]:
    if suffix and suffix not in PICKLE_SUFFIXES | _CONTAINERS:
        yield MISMATCH.found(subject, f"{kind} called {suffix}")


def _declared(suffix: str) -> bool:
    """Whether a file that is no archive must be a pickle, to judge by its name."""
    return suffix in PICKLE_SUFFIXES - _LOOSE


def _is_pickle(head: bytes, suffix: str) -> bool:
    """Whether bytes start like a pickle; early protocols have no mark but their first opcodes."""
    if _declared(suffix) or (head[:1] == b"\x80" and head[1:2] <= b"\x05"):
        return True
    followed = follow(io.BytesIO(head))
    return calls_dangerous(followed) or (bool(followed.imports) and not followed.error)


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
                yield TORCHSCRIPT.found(subject, "a program beside the tensors")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return  # its faults are reported above


def _is_torchscript(names: list[str]) -> bool:
    return any("/code/" in name and name.endswith(".py") for name in names)


def _of_torchscript(found: Finding) -> bool:
    """Whether a finding is what every TorchScript archive holds: its own classes and line maps."""
    if found.id == IMPORT.id:
        return bool(_SCRIPTED.fullmatch(str(found.value)))
    return found.id == MISMATCH.id and found.subject.endswith(".debug_pkl")


def _scan_entry(archive: Any, entry: Any, subject: str, depth: int) -> Iterator[Finding]:
    if entry.is_dir():
        return
    try:
        with archive.open(entry) as stream:
            head = stream.read(_HEAD)
            if not _wants_look(head, subject):
                return
            with _copied(stream, head) as copy:
                if copy.damage:
                    yield DAMAGED.found(subject, copy.damage)
                elif copy.checksum != entry.CRC:
                    yield ARCHIVE.found(subject, "its checksum is wrong", level="medium")
                yield from scan_content(copy.file, subject, depth=depth + 1)
    except OverflowError as error:
        yield ARCHIVE.found(subject, f"{one_line(error)}: a bomb")
    except _DAMAGE as error:
        yield DAMAGED.found(subject, one_line(error))


def _wants_look(head: bytes, subject: str) -> bool:
    """Whether an entry may be more than raw numbers; those are large, and are not copied."""
    suffix = PurePosixPath(subject).suffix.lower()
    is_archive = head.startswith((b"PK", *_PACKED, *_OPAQUE, *_PROGRAMS)) or (
        head[257:262] == b"ustar" or bool(_unpacker(head))
    )
    if head.startswith(b"\x93NUMPY"):
        return bool(_OBJECT.search(head[:4096]))
    return is_archive or suffix in _CONTAINERS | _OPAQUE_SUFFIXES or _is_pickle(head, suffix)


@dataclass
class _Copy:
    """A copy of a stream that can be searched.

    Attributes:
        file: At its start, in memory or beyond a size on disk.
        checksum: CRC-32 of its content.
        damage: Why the stream could not be read to its end; empty where it could.
    """

    file: IO[bytes]
    checksum: int = 0
    damage: str = ""


@contextmanager
def _copied(stream: Any, head: bytes = b"", limit: int = _MAX_UNPACKED) -> Iterator[_Copy]:
    """Copy a stream as far as it can be read, for an unpickler would run what stands there.

    Args:
        stream: What is copied; it has ``read1``, which loses nothing before a break.
        head: What was read of it before.
        limit: Bytes that are copied at most.

    Yields:
        The copy.

    Raises:
        OverflowError: If there is more than ``limit``.
    """
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
        copy = _Copy(file, zlib.crc32(head))
        size = file.write(head)
        try:
            while chunk := stream.read1(1 << 16):
                size, copy.checksum = size + len(chunk), zlib.crc32(chunk, copy.checksum)
                if size > limit:
                    raise OverflowError(f"it unpacks to more than {limit} bytes")
                file.write(chunk)
        except _DAMAGE as error:
            copy.damage = one_line(error)
        file.seek(0)
        yield copy


_DAMAGE = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
)


def _unpacker(head: bytes) -> Callable[[IO[bytes]], Any] | None:
    for magic, opener in _PACKED.items():
        if head.startswith(magic):
            return opener
    if head.startswith(_ZLIB):
        try:
            zlib.decompressobj().decompress(head, 1)
        except zlib.error:
            return None
        return _Inflated
    return None


class _Inflated:
    """Reads a zlib stream, as joblib writes one, a chunk at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.inflate = file, zlib.decompressobj()

    def read1(self, size: int) -> bytes:
        """Return up to ``size`` bytes of content."""
        while not self.inflate.eof:
            data = self.inflate.unconsumed_tail or self.file.read(size)
            if not data:
                raise EOFError("the zlib stream has no end")
            if content := self.inflate.decompress(data, size):
                return content
        return b""


def _scan_packed(
    opener: Callable[[IO[bytes]], Any], file: IO[bytes], subject: str, depth: int
) -> Iterator[Finding]:
    limit = max(BOMB_BYTES, BOMB_RATIO * file.seek(0, io.SEEK_END))
    file.seek(0)
    name = PurePosixPath(subject).name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
    try:
        with _copied(opener(file), limit=min(limit, _MAX_UNPACKED)) as copy:
            if copy.damage:
                yield DAMAGED.found(subject, copy.damage)
            yield from scan_content(copy.file, f"{subject}!{name}", depth=depth + 1)
    except OverflowError as error:
        yield ARCHIVE.found(subject, f"{one_line(error)}: a bomb")


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
    except _DAMAGE as error:
        yield DAMAGED.found(subject, one_line(error))


def _scan_tar_entry(
    archive: tarfile.TarFile, entry: tarfile.TarInfo, subject: str, size: int, depth: int
) -> Iterator[Finding]:
    if leads_outside(entry.name) or (entry.islnk() and leads_outside(entry.linkname)):
        yield ARCHIVE.found(subject, f"{entry.name!r} would be unpacked outside its folder")
    elif entry.issym():
        yield ARCHIVE.found(subject, f"{entry.name!r} is a symbolic link to {entry.linkname!r}")
    elif entry.isdev():
        yield ARCHIVE.found(subject, f"{entry.name!r} is a device")
    if entry.isfile() and entry.size > size:
        yield ARCHIVE.found(subject, f"{entry.name!r} claims {entry.size} bytes: a bomb")
    elif entry.isfile() and (stream := archive.extractfile(entry)):
        yield from scan_content(stream, f"{subject}!{entry.name}", depth=depth + 1)


def _scan_array(head: bytes, file: IO[bytes], subject: str, depth: int) -> Iterator[Finding]:
    """Yield what is wrong with an array; its header says whether numbers or a pickle follow.

    References:
        NumPy Enhancement Proposal 1: a simple file format for NumPy arrays.
    """
    start, code = (10, "<H") if head[6:7] == b"\x01" else (12, "<I")
    length = struct.unpack(code, head[8:start].ljust(start - 8, b"\0"))[0]
    if start + length > len(head):
        yield DAMAGED.found(subject, f"its header claims {length} bytes")
    elif _OBJECT.search(head[start : start + length]):
        yield OBJECTS.found(subject, "objects")
        file.seek(start + length)
        yield from scan_pickles(file, subject, depth=depth)
