"""Text files, read the same way everywhere."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line

__all__ = ["lines_of", "read_json", "read_text"]


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, gzipped or not, without a byte order mark.

    Raises:
        BadInputError: If it cannot be read, or is in UTF-16.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadInputError(f"text {path} cannot be read: it is in UTF-16; save it as UTF-8")
        return content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInputError(f"text {path} cannot be read: {one_line(error)}") from error


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text, which end at ``\n`` or ``\r\n`` and at nothing else.

    ``str.splitlines`` also breaks at form feeds, U+0085 and U+2028, which stand inside sentences.

    Example:
        >>> lines_of("one\u2028still one\r\ntwo\n")
        ['one\u2028still one', 'two']
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        BadInputError: If it cannot be read, or is no JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInputError(f"{path} must be JSON: {one_line(error)}") from error
