"""Where a run keeps what it has done, so that it can go on after a kill to the same result."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from mmdefense.errors import BadInputError

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


@dataclass(frozen=True)
class RunStore:
    """A folder of named states; each holds tensors and plain values, and is read as data only.

    Attributes:
        folder: Created on the first write.
    """

    folder: Path

    def part(self, name: str) -> Self:
        """Return the store of a part of the run: a folder within this one."""
        return replace(self, folder=self.folder / name)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep ``state`` under ``name``, atomically.

        Raises:
            OSError: If it cannot be written, for example on a full disk.
        """
        try:
            write_atomically(self.folder / f"{name}.pt", lambda file: torch.save(state, file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch hides a full disk behind its own
                raise error.__context__ from error
            raise

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the state kept under ``name``, or none.

        Raises:
            BadInputError: If the file is not one that this class wrote.
        """
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
        except Exception as error:
            raise BadInputError(
                f"checkpoint {path} cannot be read ({type(error).__name__}); remove it to restart"
            ) from error
        return state
