"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmdefense.errors import BadInputError, one_line

__all__ = ["check_replaceable", "new_folder"]


@contextmanager
def new_folder(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Make a folder that appears under its name only when the block ends without an error.

    Args:
        folder: The folder to make.
        force: Whether an earlier output is replaced. A folder that holds no safetensors is not
            one, and is refused in any case.

    Yields:
        A temporary folder beside it, to write into.

    Raises:
        BadInputError: If the folder exists, or cannot be written; nothing is left behind.
    """
    target = Path(folder).absolute()
    check_replaceable(target, force)
    temporary = _beside(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _move_into_place(temporary, target)
    except OSError as error:
        raise BadInputError(
            f"output folder {folder} cannot be written: {error.strerror or one_line(error)}; "
            "nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(target: Path) -> Path:
    """Return a new name on the same disk."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename; an earlier folder steps aside, and comes back if anything goes wrong."""
    old = _beside(target)
    try:
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: str | Path, force: bool = False) -> None:
    """Refuse a folder that :func:`new_folder` would refuse, before any work is done for it.

    Raises:
        BadInputError: If it exists and is not to be replaced.
    """
    target = Path(folder).absolute()
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.is_dir() and force and list(target.glob("*.safetensors")):
        return
    if target.exists():
        remedy = "; it holds no earlier model" if force else ", or give --force to replace it"
        raise BadInputError(
            f"output folder {target} must be new, but it exists; choose another{remedy}"
        )
