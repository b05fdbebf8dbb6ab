"""Uniform reading of text files."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from pathlib import Path

from mmdefense.errors import BadInputError, one_line
from mmdefense.files import MOST_BYTES, read_bytes

__all__ = ["lines_of", "read_text"]


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, gzipped or not, without a byte order mark.

    Raises:
        BadInputError: If it cannot be read, is in UTF-16, or is too large.
    """
    content = read_bytes(path)
    try:
        content = _unpacked(content, path) if path.suffix == ".gz" else content
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadInputError(f"text {path} cannot be read: it is in UTF-16; save it as UTF-8")
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInputError(f"text {path} cannot be read: {one_line(error)}") from error


def _unpacked(content: bytes, path: Path) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        unpacked = file.read(MOST_BYTES + 1)
    if len(unpacked) > MOST_BYTES:
        raise BadInputError(f"text {path} must unpack to at most {MOST_BYTES} bytes")
    return unpacked


def lines_of(text: str) -> list[str]:
    r"""Split a text into lines, only at ``\n`` or ``\r\n``.

    ``str.splitlines`` also breaks at form feeds, U+0085 and U+2028, which occur inside sentences.

    Example:
        >>> lines_of("one\u2028still one\r\ntwo\n")
        ['one\u2028still one', 'two']
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
