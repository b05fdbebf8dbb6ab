"""Compressed streams and copies of them, read as far as possible."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from mmdefense.errors import one_line

__all__ = ["DAMAGE", "MAX_UNPACKED", "PACKED", "Copy", "copied", "unpacker"]

MAX_UNPACKED = 1 << 32
"""Most bytes to unpack a stream to. Our choice."""
_IN_MEMORY = 1 << 26

DAMAGE = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError, MemoryError),
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
)
"""Errors that a damaged stream or archive raises."""

PACKED: Mapping[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x5d\x00": lzma.LZMAFile,
}
"""Functions that unpack streams, by their first bytes."""
_OLD_JOBLIB = b"ZF0x"
_OLD_HEADERS = (21, 22)


def unpacker(head: bytes) -> Callable[[IO[bytes]], Any] | None:
    """Return the function that unpacks a stream with this start, or None if there is none."""
    for magic, opener in PACKED.items():
        if head.startswith(magic) and _starts(opener, head):
            return opener
    if _inflates(head):
        return _Inflated
    if head.startswith(_OLD_JOBLIB):
        for start in _OLD_HEADERS:
            if _inflates(head[start:]):
                return lambda file: _Inflated(file, start)
    return None


def _starts(opener: Callable[[IO[bytes]], Any], head: bytes) -> bool:
    """Return whether something can be unpacked, or only the end is missing."""
    try:
        opener(io.BytesIO(head)).read1(1)
    except EOFError:
        return True
    except DAMAGE:
        return False
    return True


def _inflates(head: bytes) -> bool:
    if head[:1] != b"\x78":  # by which joblib recognises it
        return False
    try:
        zlib.decompressobj().decompress(head, 1)
    except zlib.error:
        return False
    return True


class _Inflated:
    """Reads a zlib stream, as joblib writes one, a chunk at a time."""

    def __init__(self, file: IO[bytes], start: int = 0) -> None:
        self.file, self.inflate = file, zlib.decompressobj()
        file.seek(start)

    def read1(self, size: int) -> bytes:
        """Return up to ``size`` bytes of content.

        Raises:
            EOFError: If the stream has no end.
            ValueError: If something follows its end.
        """
        while not self.inflate.eof:
            data = self.inflate.unconsumed_tail or self.file.read(size)
            if not data:
                raise EOFError("the zlib stream has no end")
            if content := self.inflate.decompress(data, size):
                return content
        if self.inflate.unused_data or self.file.read(1):
            raise ValueError("something follows the end of the zlib stream")
        return b""


@dataclass
class Copy:
    """A seekable copy of a stream.

    Attributes:
        file: The copy, at its start; in memory, or on disk if it is large.
        checksum: CRC-32 of its content.
        damage: Why the stream could not be read to its end; empty if it could.
    """

    file: IO[bytes]
    checksum: int = 0
    damage: str = ""


@contextmanager
def copied(stream: Any, head: bytes = b"", limit: int = MAX_UNPACKED) -> Iterator[Copy]:
    """Copy a stream as far as it can be read, since an unpickler would run that part.

    Args:
        stream: The stream, whose ``read1`` loses nothing before a break.
        head: Bytes that were read from it before.
        limit: Most bytes to copy.

    Yields:
        The copy.

    Raises:
        OverflowError: If there is more than ``limit``.
    """
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
        copy = Copy(file, zlib.crc32(head))
        size = file.write(head)
        try:
            while chunk := stream.read1(1 << 16):
                size, copy.checksum = size + len(chunk), zlib.crc32(chunk, copy.checksum)
                if size > limit:
                    raise OverflowError(f"it unpacks to more than {limit} bytes")
                file.write(chunk)
        except DAMAGE as error:
            copy.damage = one_line(error)
        file.seek(0)
        yield copy
