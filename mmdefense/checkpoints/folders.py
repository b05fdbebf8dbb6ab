"""Folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmdefense.errors import BadInputError, one_line

__all__ = ["check_replaceable", "clear_stale", "hold", "new_folder"]

_OURS = "mmdefense"
"""Part of the names of hidden folders, so that no other program's are taken for ours."""


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
    clear_stale(target)
    check_replaceable(target, force)
    temporary = _beside(target, "new")
    held = None
    try:
        temporary.mkdir(parents=True)
        held = hold(temporary)
        yield temporary
        _move_into_place(temporary, target)
    except OSError as error:
        raise BadInputError(
            f"output folder {folder} cannot be written: {error.strerror or one_line(error)}; "
            "nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def _beside(target: Path, kind: str) -> Path:
    """Return a new name on the same disk, for a folder that is ``"new"`` or ``"old"``."""
    return target.with_name(f".{target.name}.{_OURS}-{kind}-{uuid.uuid4().hex[:8]}")


def hold(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives; return what to close to let it go.

    The lock goes with the process, however it ends: a folder without one was left behind.

    Returns:
        None where another process holds it, or it cannot be locked.
    """
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def clear_stale(folder: str | Path) -> None:
    """Remove what runs that were killed while they wrote this folder have left beside it.

    An earlier output that had stepped aside comes back where nothing has taken its place. What
    other processes are writing is left alone.
    """
    target = Path(folder).absolute()
    ours = re.compile(rf"\.{re.escape(target.name)}\.{_OURS}-(new|old)-[0-9a-f]{{8}}")
    beside = sorted(target.parent.iterdir()) if target.parent.is_dir() else []
    for path in beside:
        found = ours.fullmatch(path.name)
        held = hold(path) if found else None
        if found is None or held is None:
            continue
        if found[1] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename; an earlier folder steps aside, and comes back if anything goes wrong."""
    old, held = _beside(target, "old"), None
    try:
        if target.exists():
            held = hold(target)  # so that no other run takes it for left behind
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    finally:
        if held is not None:
            os.close(held)
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
