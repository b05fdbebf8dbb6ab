"""Decide whether a NumPy file holds numbers or a pickle, the way NumPy does."""

from __future__ import annotations

import ast
import re
import struct
import warnings
from typing import IO

import numpy as np

from mmdefense.errors import one_line

__all__ = ["MAGIC", "read_header"]

MAGIC = b"\x93NUMPY"
MAX_HEADER = 1 << 20
"""Most bytes of a header to read; NumPy's own limit is lower. Our choice."""


def read_header(file: IO[bytes]) -> tuple[bool, int]:
    """Return whether an array holds objects, and where its data starts.

    Args:
        file: At the start of the array.

    Raises:
        ValueError: If NumPy cannot read its header.

    References:
        NumPy Enhancement Proposal 1: a simple file format for NumPy arrays.
    """
    head = file.read(8)
    code = "<H" if head[6:7] == b"\x01" else "<I"
    length = file.read(struct.calcsize(code))
    if len(head) < 8 or len(length) < struct.calcsize(code) or not 1 <= head[6] <= 3:
        raise ValueError("its header has no known format")
    (size,) = struct.unpack(code, length)
    if size > MAX_HEADER:
        raise ValueError(f"its header claims {size} bytes")
    text = file.read(size).decode("utf-8" if head[6] == 3 else "latin-1")
    return _holds_objects(text), 8 + len(length) + size


def _holds_objects(header: str) -> bool:
    text = re.sub(r"(\d)L\b", r"\1", header)  # as Python 2 wrote integers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.lib.format.descr_to_dtype(ast.literal_eval(text)["descr"]).hasobject
    except Exception as error:  # NumPy fails in many ways on headers that it did not write
        raise ValueError(f"its header cannot be read: {one_line(error)}") from error
