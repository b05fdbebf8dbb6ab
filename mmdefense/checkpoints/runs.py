"""Checkpoints of a run, so that it can resume after a kill with the same result."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from mmdefense.errors import BadInputError, one_line

__all__ = ["RunStore", "write_atomically"]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old or the new one whole.

    Args:
        path: The file to write.
        write: Receives a binary file open for writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:  # readable by whom the umask says, unlike mkstemp's
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_MARK = b"mmdefense state, sha256 "
"""Start of every saved state; the digest of the rest and a line break follow."""


class _Digesting:
    """Forwards what is written, and computes its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _write_state(state: dict[str, Any], file: BinaryIO) -> None:
    empty = b"0" * 2 * hashlib.sha256().digest_size
    file.write(_MARK + empty + b"\n")
    content = _Digesting(file)
    torch.save(state, content)  # type: ignore[arg-type]  # it asks for no more than these two
    file.seek(len(_MARK))
    file.write(content.digest.hexdigest().encode())


def _read_state(file: BufferedReader) -> Any:
    """Return what :func:`_write_state` wrote.

    Raises:
        ValueError: If a single bit differs.
    """
    head = file.readline(len(_MARK) + 128)
    begin = file.tell()
    if head != _MARK + hashlib.file_digest(file, "sha256").hexdigest().encode() + b"\n":
        raise ValueError("its checksum does not match its content")
    file.seek(begin)
    return torch.load(file, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class RunStore:
    """A folder of named states; each holds tensors and plain values, and is read only as data.

    Each has a checksum, so that a damaged one is refused.

    Attributes:
        folder: Created on the first write.
        every: Steps of a training between two saves.
    """

    folder: Path
    every: int = 100

    def part(self, name: str) -> Self:
        """Return the store of a part of the run: a folder within this one."""
        return replace(self, folder=self.folder / name)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Save ``state`` under ``name``, atomically.

        Raises:
            OSError: If it cannot be written, for example on a full disk.
        """
        try:
            write_atomically(self.folder / f"{name}.pt", lambda file: _write_state(state, file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch hides a full disk behind its own
                raise error.__context__ from error
            raise

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the state saved under ``name``, or None.

        Raises:
            BadInputError: If the file is not one that this class wrote, or is damaged.
        """
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            with path.open("rb") as file:
                state = _read_state(file)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
        except Exception as error:
            raise BadInputError(
                f"saved state {path} is damaged or of another version: {one_line(error)}; delete "
                "it to restart that run"
            ) from error
        return state
