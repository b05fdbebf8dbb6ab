"""Read the bytes of a pickle as unpicklers do."""

from __future__ import annotations

import io
import struct
from typing import IO

__all__ = ["MAX_CONSTANT", "CutError", "Reader"]

MAX_CONSTANT = 1 << 24
"""Most bytes of an item to keep. Our choice."""
_MAX_LINE, _MAX_ITEM = 1 << 20, 1 << 26
_CHUNK = 1 << 16


class CutError(Exception):
    """The available bytes end here."""


class Reader:
    """The bytes of a file from some position."""

    def __init__(self, file: IO[bytes], start: int, size: int | None = None) -> None:
        self.file, self.at, self.buffer = file, start, b""
        self.available = file.seek(0, io.SEEK_END)
        self.size = self.available if size is None else size
        self.offset = start
        self.frame_end: int | None = None

    def jump(self, place: int) -> None:
        """Continue at another position."""
        self.at = place

    def read(self, count: int) -> bytes:
        """Return the next ``count`` bytes.

        Raises:
            CutError: If there are fewer.
            ValueError: If the whole file has fewer as well.
        """
        begin = self.at - self.offset
        if begin >= 0 and begin + count <= len(self.buffer):
            self.at += count
            return self.buffer[begin : begin + count]
        if self.at + count > self.available:
            if self.at + count > self.size and self.at < self.available:
                raise ValueError(f"an item of {count} bytes reaches past the end")
            raise CutError
        self.file.seek(self.at)
        self.offset, self.buffer = self.at, self.file.read(max(count, _CHUNK))
        if len(self.buffer) < count:
            raise CutError
        self.at += count
        return self.buffer[:count]

    def line(self) -> tuple[bytes, bool]:
        """Return the next line without its end, and whether it has one.

        A last line that has none loses its last byte, as in Python's own unpickler.

        Raises:
            ValueError: If it is too long.
        """
        begin = self.at - self.offset
        end = (
            self.buffer.find(b"\n", begin, begin + _MAX_LINE)
            if 0 <= begin <= len(self.buffer)
            else -1
        )
        if end >= 0:
            self.at += end + 1 - begin
            return self.buffer[begin:end], True
        self.file.seek(self.at)
        text = self.file.readline(_MAX_LINE)
        if len(text) == _MAX_LINE:
            raise ValueError(f"a line of more than {_MAX_LINE} bytes")
        if not text.endswith(b"\n") and self.available < self.size:
            raise CutError
        self.at += len(text)
        return text[:-1], text.endswith(b"\n")

    def sized(self, code: str) -> bytes:
        """Return the bytes after a length; of a very long item, only the first ones.

        Raises:
            ValueError: If they reach past the end.
        """
        (count,) = struct.unpack(code, self.read(struct.calcsize(code)))
        if count < 0:
            raise ValueError(f"an item of {count} bytes")
        if count <= _MAX_ITEM:
            return self.read(count)
        if self.at + count > self.size:
            raise ValueError(f"an item of {count} bytes reaches past the end")
        start = self.read(min(MAX_CONSTANT, self.available - self.at))
        self.jump(self.at + count - len(start))
        return start
