"""Read untrusted files with size limits; only regular files are opened."""

from __future__ import annotations

import errno
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line

__all__ = ["MOST_BYTES", "open_plain", "parse_json", "plain_file", "read_bytes", "read_json"]

MOST_BYTES = 1 << 29
"""Most bytes of a text file that is read at once; the largest COCO JSON has 4.5e8. Our choice."""

_PLACE = re.compile(r" at line 1 column (\d+)$")


def plain_file(path: Path) -> Path:
    """Return a path if it is a regular file; a pipe or a device could block or never end.

    Raises:
        BadInputError: If it is none.
    """
    try:
        is_file, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as error:
        raise BadInputError(f"file {str(path)!r:.300} cannot be read: {one_line(error)}") from error
    if not is_file:
        fault = (
            ("is not a regular file (but a folder, pipe or device)") if exists else "does not exist"
        )
        raise BadInputError(f"file {path} cannot be read: it {fault}")
    return path


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file for reading, never a pipe, socket or device, which could block.

    Raises:
        OSError: If it cannot be opened, or is not a regular file.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(opened, "rb")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file.

    Args:
        path: Of the file.
        most: Bytes that it may have.

    Raises:
        BadInputError: If it cannot be read, or is larger.
    """
    try:
        with open_plain(plain_file(path)) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise BadInputError(f"file {path} cannot be read: {error.strerror or error}") from error
    if len(content) > most:
        raise BadInputError(
            f"file {path} is too large to read at once: it must have at most {most} bytes"
        )
    return content


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Return the content of a JSON file; see :func:`parse_json`.

    Args:
        path: Of the file.
        most: Bytes that it may have.

    Raises:
        BadInputError: If it is none, or is larger.
    """
    return parse_json(read_bytes(path, most), path)


def parse_json(content: str | bytes, where: object) -> Any:
    """Return the value of a JSON text.

    Text must be valid UTF-8 without unpaired surrogates, values are nested at most 200 deep, and
    integers have at most 4300 digits. Of duplicate names in an object the last wins, as in the
    libraries' readers.

    Args:
        content: The JSON, with or without a byte order mark.
        where: What it is called in messages.

    Raises:
        BadInputError: If it is none.
    """
    from pydantic_core import from_json

    bare = content.removeprefix("\ufeff") if isinstance(content, str) else _unmarked(content)
    try:
        return from_json(bare, cache_strings="keys")
    except (ValueError, MemoryError) as error:
        reason = _PLACE.sub(r" at column \1", one_line(error))
        raise BadInputError(f"{where} must be JSON: {reason}") from error


def _unmarked(content: bytes) -> bytes:
    return content.removeprefix(b"\xef\xbb\xbf")
