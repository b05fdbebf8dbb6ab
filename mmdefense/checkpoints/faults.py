"""Find faults in a model's files without reading a tensor or running anything.

The loader refuses a model for any of these; a scan reports each of them.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from mmdefense.errors import BadInputError, one_line, printable
from mmdefense.files import read_json

__all__ = [
    "CODE_KEYS",
    "Fault",
    "all_files",
    "check_file",
    "check_folder",
    "is_zip",
    "leads_outside",
    "link_faults",
    "refuse",
    "remote_code",
    "safetensors_faults",
    "shard_faults",
    "zip_faults",
]

Kind = Literal["bomb", "code", "form", "header", "loader", "path", "size", "structure"]

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""
MAX_ENTRIES = 100_000
"""Entries of an archive, or tensors of a file; a checkpoint has one per tensor. Our choice."""
MAX_AXES = 64
"""Axes of a tensor; PyTorch has operations for no more."""
BOMB_RATIO, BOMB_BYTES = 200, 1 << 25
"""An archive that unpacks to this many bytes and this multiple of its size is a bomb. Our
choice."""
CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
"""Configuration fields that ask to run the model's own code."""
_CACHED = "snapshots"
"""Name of the folder of the hub's cache that holds the revisions of a repository."""
MAX_GAP = 24
"""Bytes between the entries of a zip: the longest data descriptor has 24."""

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Fault:
    """A fault of a file.

    Attributes:
        kind: A bomb, code to be run, a value of the wrong form, a header that contradicts its file,
            a field that reaches a library's loader, a path that escapes the folder, a size that the
            weights do not support, or a structure that two readers would read differently.
        text: What is wrong and where, as the end of a sentence.
    """

    kind: Kind
    text: str


def check_file(path: Path) -> None:
    """Refuse a weight file that has a fault.

    Raises:
        BadInputError: Naming the first fault.
    """
    if path.suffix == ".safetensors":
        faults = safetensors_faults(path)
    else:
        with path.open("rb") as file:
            faults = zip_faults(file) if is_zip(file) else []
    refuse(path, faults)


def check_folder(folder: Path) -> None:
    """Refuse a Hugging Face folder that asks to run code, or to read files outside it.

    Raises:
        BadInputError: Naming the first fault.
    """
    every = all_files(folder)
    faults = [fault for path in every for fault in _place_faults(path, folder)]
    files = [path for path in every if path.parent == folder and path.is_file()]
    for path in files if not faults else ():
        if path.name.endswith("config.json"):
            faults += remote_code(path)
        elif path.name.endswith(".index.json"):
            faults += shard_faults(path)
        elif path.suffix in {".safetensors", ".bin"}:
            check_file(path)
    refuse(folder, faults)


def all_files(root: Path) -> list[Path]:
    """Return every file in a folder, hidden ones included, without following symlinks.

    Of a file, that is the file.
    """
    if not root.is_dir():
        return [root]
    found = []
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [Path(folder) / name for name in [*names, *links]]
    return sorted(found)


def _place_faults(path: Path, folder: Path) -> list[Fault]:
    """Return the fault of an entry that escapes the folder, or is a pipe, a socket or a device."""
    if faults := link_faults(path, folder):
        return faults
    if path.is_dir() or path.is_file() or not path.exists():
        return []
    name = path.relative_to(folder).as_posix()
    return [Fault("path", f"{name!r} is a pipe, a socket or a device; remove it")]


def refuse(path: Path, faults: Sequence[Fault]) -> None:
    """Refuse what has a fault.

    Raises:
        BadInputError: Naming the first fault.
    """
    if faults:
        is_damaged = faults[0].kind in {"form", "header"}
        how = "cannot be read" if is_damaged else "was refused and nothing in it executed"
        raise BadInputError(f"model {path} {how}: {printable(faults[0].text)}")


def safetensors_faults(path: Path) -> list[Fault]:
    """Return where a safetensors header contradicts the file or itself.

    References:
        The format's description in the README of huggingface/safetensors: eight bytes of length,
        a JSON header, and a buffer that the tensors cover without overlap and without holes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is None or length > size - 8:
                return [_header(f"its header claims {length} bytes, and the file has {size}")]
            if length > MAX_HEADER:
                return [_header(f"its header of {length} bytes exceeds {MAX_HEADER}")]
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        return [_header(f"its header is not a plain JSON object: {one_line(error)}")]
    if not isinstance(header, dict):
        return [_header(f"its header must be a JSON object, got {type(header).__name__}")]
    return list(_header_faults(header, size - 8 - length))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {name!r} occurs {count} times")
    return named


def _header(text: str) -> Fault:
    return Fault("header", text)


def _header_faults(header: dict[str, Any], size: int) -> Iterator[Fault]:
    """Yield the faults of a header over a buffer of ``size`` bytes."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        yield _header("its __metadata__ must map names to text")
    if len(header) > MAX_ENTRIES:
        yield Fault("bomb", f"it has {len(header)} tensors, more than {MAX_ENTRIES}")
        return
    spans = []
    for name, entry in header.items():
        fault = _entry_fault(name, entry, size)
        if fault:
            yield fault
        else:
            spans.append((*entry["data_offsets"], name))
    if len(spans) == len(header):
        yield from _span_faults(sorted(spans), size)


def _entry_fault(name: str, entry: Any, size: int) -> Fault | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return _header(
            f"tensor {name!r} must have dtype, shape and data_offsets, got {entry!r:.80}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return _header(f"tensor {name!r} has the unknown dtype {dtype!r:.40}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return _header(f"tensor {name!r} has shape {shape!r:.60} and offsets {offsets!r:.60}")
    if len(shape) > MAX_AXES:
        return _header(f"tensor {name!r} has {len(shape)} axes, more than {MAX_AXES}")
    begin, end = offsets
    if not begin <= end <= size:
        return _header(f"tensor {name!r} lies at {begin}..{end}, outside the {size} bytes of data")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        return _header(
            f"tensor {name!r} of shape {shape!r:.60} and {dtype} has {end - begin} bytes"
        )
    return None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _span_faults(spans: list[tuple[int, int, str]], size: int) -> Iterator[Fault]:
    for (_, end, name), (begin, _, after) in pairwise([(0, 0, "the header"), *spans]):
        if begin < end:
            yield _header(f"tensor {after!r} overlaps {name!r}")
        elif begin > end:
            yield _header(f"{begin - end} bytes before tensor {after!r} belong to no tensor")
    last = max((end for _, end, _ in spans), default=0)
    if last < size:
        yield _header(f"{size - last} bytes after the last tensor belong to no tensor")


def is_zip(file: IO[bytes]) -> bool:
    """Whether a file ends like a zip archive, damaged or not."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        return True


def zip_faults(file: IO[bytes]) -> list[Fault]:
    """Return where a zip archive is a bomb, escapes its folder, or can be read in two ways.

    References:
        Fifield. *A better zip bomb*. WOOT 2019, for entries that overlap.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            comment = archive.comment
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        return [Fault("structure", f"its central directory is damaged: {one_line(error)}")]
    faults = [*_bomb_faults(entries), *_name_faults(entries), *_local_faults(file, entries, end)]
    faults += _end_faults(file)
    if b"PK\x05\x06" in comment:
        faults.append(Fault("structure", "its comment hides a second central directory"))
    return faults


_END_SEARCHED = (1 << 16) + 22
"""Bytes that hold the end of a zip: its comment has up to 64 KiB."""


def _end_faults(file: IO[bytes]) -> Iterator[Fault]:
    """Yield where the end records of an archive name different central directories.

    Some readers use the ZIP64 record before the end, some the one that a locator names, some only
    the last record, and some shift all offsets by the surplus bytes.

    References:
        PKWARE's APPNOTE.TXT, sections 4.3.14 to 4.3.16.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SEARCHED))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        return
    end = size - len(tail) + at
    *disks, count, length, start, comment = struct.unpack("<4x3HHIIH", tail[at : at + 22])
    if any(disks[:2]):
        yield Fault("structure", "it claims to be part of a multi-disk archive")
    if end + 22 + comment != size:
        yield Fault("structure", f"{size - end - 22 - comment} bytes follow its end")
    file.seek(max(0, end - 76))
    before = file.read(min(end, 76))
    if before[-20:-16] == b"PK\x06\x07":
        (named,) = struct.unpack("<Q", before[-12:-4])
        if named != end - 76 or before[:4] != b"PK\x06\x06":
            yield Fault("structure", "its ZIP64 locator names another central directory")
            return
        wide = struct.unpack("<3Q", before[32:56])
        narrow = zip((count, length, start), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), wide, strict=True)
        if any(value not in {full, own} for value, full, own in narrow):
            yield Fault("structure", "its two end records disagree about the central directory")
        (_, length, start), end = wide, end - 76
    if start + length != end:
        yield Fault("structure", "its central directory is not where its end says")


def _bomb_faults(entries: list[zipfile.ZipInfo]) -> Iterator[Fault]:
    if len(entries) > MAX_ENTRIES:
        yield Fault("bomb", f"it has {len(entries)} entries, more than {MAX_ENTRIES}")
    unpacked = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * packed:
        yield Fault("bomb", f"{packed} bytes unpack to {unpacked}: a zip bomb")


def _name_faults(entries: list[zipfile.ZipInfo]) -> Iterator[Fault]:
    for entry in entries:
        if leads_outside(entry.filename):
            yield Fault("path", f"entry {entry.filename!r} would be unpacked outside its folder")
        if stat.S_ISLNK(entry.external_attr >> 16):
            yield Fault("path", f"entry {entry.filename!r} is a symlink")
        if "\0" in entry.orig_filename or _names_otherwise(entry):
            yield Fault("structure", f"entry {entry.filename!r} has a second name")
    for name, count in Counter(_as_found(entry.filename) for entry in entries).items():
        if count > 1:
            yield Fault("structure", f"{count} entries have the name {name!r}")


def _as_found(name: str) -> str:
    """Return a name as PyTorch's reader compares it: it looks for pickles ignoring case."""
    return name.lower() if name.lower().endswith(".pkl") else name


def _names_otherwise(entry: zipfile.ZipInfo) -> bool:
    """Return whether an extra field has another name in Unicode, which only some readers use."""
    extra = entry.extra
    while len(extra) >= 4:
        tag, length = struct.unpack("<HH", extra[:4])
        if tag == 0x7075 and extra[9 : 4 + length] != entry.filename.encode():
            return True
        extra = extra[4 + length :]
    return False


def leads_outside(name: str) -> bool:
    """Return whether a relative name, in Linux or Windows style, escapes its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or name[1:2] == ":"


def _local_faults(file: IO[bytes], entries: list[zipfile.ZipInfo], end: int) -> Iterator[Fault]:
    """Yield where the local header of an entry contradicts the central directory."""
    spans = [(0, 0, "the start")]
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            yield Fault("structure", f"there is no header before entry {entry.filename!r}")
            continue
        flags, name_length, extra_length = struct.unpack("<6xH18xHH", header)
        name = file.read(name_length)
        if name != entry.orig_filename.encode("utf-8" if flags & 0x800 else "cp437", "replace"):
            yield Fault("structure", f"entry {entry.filename!r} has another name in its own header")
        if (flags | entry.flag_bits) & 0x1:
            yield Fault("structure", f"entry {entry.filename!r} claims to be encrypted")
        begin = entry.header_offset + 30 + name_length + extra_length
        spans.append((entry.header_offset, begin + entry.compress_size, entry.filename))
    for (_, stop, before), (begin, _, after) in pairwise([*spans, (end, end, "the contents")]):
        if begin < stop:
            yield Fault("structure", f"entries {before!r} and {after!r} overlap: a zip bomb")
        elif begin > stop + MAX_GAP:
            yield Fault("structure", f"{begin - stop} bytes before {after!r} belong to no entry")


def remote_code(path: Path) -> list[Fault]:
    """Return where a configuration asks to run code that comes with the checkpoint."""
    found = dict(_walk(read_json(path)))
    return [
        Fault("code", f"{path.name} asks to run its own code: {key} = {json.dumps(value)}")
        for key, value in found.items()
        if key.split(".")[-1] in CODE_KEYS and value
    ]


def _walk(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each named value of nested JSON with its dotted name."""
    named = value if isinstance(value, Mapping) else {}
    if isinstance(value, list):
        named = {str(index): item for index, item in enumerate(value)}
    for key, item in named.items():
        name = f"{where}.{key}".strip(".")
        yield name, item
        yield from _walk(item, name)


def shard_faults(index: Path) -> list[Fault]:
    """Return the shards of an index that lie outside its folder."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    names = {str(name) for name in shards.values()} if isinstance(shards, Mapping) else set()
    return [
        Fault("path", f"{index.name} names the shard {name!r} outside the folder")
        for name in sorted(names)
        if leads_outside(name)
    ]


def link_faults(path: Path, folder: Path) -> list[Fault]:
    """Return whether ``path`` is a symlink that escapes ``folder``.

    The hub's cache keeps the files of ``snapshots/<revision>`` as links into the ``blobs`` beside
    it; those stay inside what was downloaded.
    """
    if not path.is_symlink():
        return []
    target = Path(os.path.realpath(path))
    root = folder.resolve()
    allowed = [root, *(above.parent / "blobs" for above in root.parents if above.name == _CACHED)]
    if any(target.is_relative_to(place) for place in allowed):
        return []
    name = path.relative_to(folder)
    return [Fault("path", f"the symlink {str(name)!r} escapes the folder, to {target}")]
