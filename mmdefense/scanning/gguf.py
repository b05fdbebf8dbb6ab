"""Read the strings in the header of a GGUF file, within limits and without its tensors.

References:
    The format's description in the documentation of ggml-org/ggml (GGUF, versions 2 and 3): a
    magic number, a version, two counts, and pairs of a name and a typed value.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from mmdefense.errors import BadInputError

__all__ = ["MAGIC", "gguf_texts"]

MAGIC = b"GGUF"
_MOST_PAIRS, _MOST_ITEMS, _MOST_TEXT, _MOST_NAME = 100_000, 4_000_000, 1 << 26, 1 << 16
"""Limits on pairs, items of all arrays, bytes of a text and of a name. Our choice."""
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9


def gguf_texts(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each text in a header; arrays are skipped.

    Args:
        file: A seekable binary file, at its start.

    Raises:
        BadInputError: If the header is damaged, or larger than any known one.
    """
    order, pairs = _read_start(file)
    items = 0
    for _ in range(pairs):
        name = _text(file, order, _MOST_NAME)
        kind = _number(file, order, "I")
        if kind == _TEXT:
            yield name, _text(file, order, _MOST_TEXT)
        elif kind == _ARRAY:
            items += _skip_array(file, order, _MOST_ITEMS - items)
        else:
            _read(file, _size(kind))


def _read_start(file: IO[bytes]) -> tuple[str, int]:
    """Return the byte order and the number of pairs."""
    if _read(file, 4) != MAGIC:
        raise BadInputError("it does not start like GGUF")
    raw = _read(file, 4)
    order = next((o for o in "<>" if struct.unpack(f"{o}I", raw)[0] in {2, 3}), None)
    if order is None:
        raise BadInputError(f"its version {int.from_bytes(raw, 'little')} is neither 2 nor 3")
    _number(file, order, "Q")  # number of tensors, which are not read
    pairs = _number(file, order, "Q")
    if pairs > _MOST_PAIRS:
        raise BadInputError(f"its header claims {pairs} pairs, more than {_MOST_PAIRS}")
    return order, pairs


def _skip_array(file: IO[bytes], order: str, most: int) -> int:
    """Read an array and return how many items it had."""
    kind, count = _number(file, order, "I"), _number(file, order, "Q")
    if count > most:
        raise BadInputError(f"an array in its header claims {count} items")
    if kind == _TEXT:
        for _ in range(count):
            _read(file, _length(file, order, _MOST_NAME))
    else:
        _read(file, _size(kind) * count)
    return count


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise BadInputError(f"its header has a value of the unknown type {kind}")
    return _SIZES[kind]


def _text(file: IO[bytes], order: str, most: int) -> str:
    return _read(file, _length(file, order, most)).decode("utf-8", "replace")


def _length(file: IO[bytes], order: str, most: int) -> int:
    length = _number(file, order, "Q")
    if length > most:
        raise BadInputError(f"a text in its header claims {length} bytes")
    return length


def _number(file: IO[bytes], order: str, code: str) -> int:
    return int(struct.unpack(order + code, _read(file, struct.calcsize(code)))[0])


def _read(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise BadInputError("its header is cut off")
    return data
