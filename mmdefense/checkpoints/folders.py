"""Output folders that appear completely or not at all, each written by one run at a time."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmdefense.checkpoints.outputs import check_separate, is_output
from mmdefense.errors import BadInputError, one_line

__all__ = ["Reserved", "new_folder", "reserved"]

_OURS = "mmdefense"
"""Part of the names of our hidden folders, to tell them from those of other programs."""


@dataclass(frozen=True)
class Reserved:
    """A folder that is reserved for this run.

    Attributes:
        target: The folder.
        force: Whether an earlier output is replaced.
    """

    target: Path
    force: bool = False

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield a temporary folder beside it, which takes its place if the block ends well.

        Raises:
            BadInputError: If it cannot be written, or what now exists in its place must not be
                replaced; nothing is left behind.
        """
        temporary = _beside(self.target, "new")
        held = None
        try:
            temporary.mkdir(parents=True)
            held = _hold(temporary)
            yield temporary
            _check_replaceable(self.target, self.force)
            _move_into_place(temporary, self.target, self.force)
        except OSError as error:
            raise _unwritable(self.target, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if held is not None:
                os.close(held)


@contextmanager
def reserved(
    folder: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()
) -> Iterator[Reserved]:
    """Reserve an output folder for this run until the block ends.

    Leftovers of killed runs next to it are removed. The lock is released with the process, however
    it ends.

    Args:
        folder: The folder to make.
        force: Whether an earlier output is replaced. A folder without the record of one is refused
            in any case.
        inputs: What is read for it; see :func:`~mmdefense.checkpoints.outputs.check_separate`.

    Yields:
        What writes it.

    Raises:
        BadInputError: If it exists and is not to be replaced, is or holds or lies in an input,
            another run is making it, or nothing can be written there.
    """
    target, given = _placed(folder), list(inputs)
    for made in (target, *_stale(target)):
        check_separate(made, given)
    made_above = _make(target.parent)
    try:
        held = _lock(target)
        try:
            _clear_stale(target)
            _check_replaceable(target, force)
            yield Reserved(target, force)
        finally:
            _unlock(target, held)
    finally:
        for above in made_above:
            if not any(above.iterdir()):
                above.rmdir()


@contextmanager
def new_folder(
    folder: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()
) -> Iterator[Path]:
    """Make a folder that appears under its name only when the block ends without an error.

    Args:
        folder: The folder to make.
        force: Whether an earlier output is replaced; see :func:`reserved`.
        inputs: What is read for it.

    Yields:
        A temporary folder beside it, to write into.

    Raises:
        BadInputError: As :func:`reserved`, or if it cannot be written; nothing is left behind.
    """
    with reserved(folder, force=force, inputs=inputs) as place, place.writing() as temporary:
        yield temporary


def _placed(folder: str | Path) -> Path:
    """Return an absolute path that ends in a name, so that it has siblings."""
    path = Path(folder).absolute()
    return path if path.name not in {"", ".."} else path.resolve()


def _unwritable(target: Path, error: OSError) -> BadInputError:
    return BadInputError(
        f"output folder {target} cannot be written: {error.strerror or one_line(error)}; nothing "
        "was left behind"
    )


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; return those that were not there, the lowest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return missing


def _lock(target: Path) -> int:
    """Lock the name of an output folder; return what to close to unlock it.

    Raises:
        BadInputError: If another run holds it, or nothing can be written there.
    """
    path = _lock_of(target)
    while True:
        try:
            held = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(target, error) from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise BadInputError(
                f"another run is writing {target}; wait until it ends, or choose another folder"
            ) from None
        except OSError:  # a file system without locks: the last rename still replaces nothing
            return held
        if os.fstat(held).st_nlink:
            return held
        os.close(held)  # another process released and removed it in between


def _unlock(target: Path, held: int) -> None:
    _lock_of(target).unlink(missing_ok=True)
    os.close(held)


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{_OURS}-lock")


def _beside(target: Path, kind: str) -> Path:
    """Return a new name on the same disk, for a folder that is ``"new"`` or ``"old"``."""
    return target.with_name(f".{target.name}.{_OURS}-{kind}-{uuid.uuid4().hex[:8]}")


def _hold(folder: Path) -> int | None:
    """Lock a folder while this process lives; return what to close to unlock it.

    The lock is released with the process, however it ends: a folder without one is a leftover.

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


def _stale(target: Path) -> list[Path]:
    """Return the hidden folders next to this one that runs have left behind or are writing."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.{_OURS}-(new|old)-[0-9a-f]{{8}}")
    beside = sorted(target.parent.iterdir()) if target.parent.is_dir() else []
    return [path for path in beside if ours.fullmatch(path.name)]


def _clear_stale(target: Path) -> None:
    """Remove what runs killed while writing this folder left next to it.

    An earlier output that was moved aside is restored unless something has taken its place. Folders
    that other processes are writing are left alone.
    """
    for path in _stale(target):
        held = _hold(path)
        if held is None:
            continue
        if f".{_OURS}-old-" in path.name and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def _move_into_place(temporary: Path, target: Path, force: bool) -> None:
    """Rename; an earlier folder is moved aside, and restored if anything goes wrong.

    Without ``force`` the rename itself fails where there is more than an empty folder by now.
    """
    old, held = _beside(target, "old"), None
    try:
        if force and target.exists():
            held = _hold(target)  # so that no other run takes it for a leftover
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


def _check_replaceable(target: Path, force: bool) -> None:
    """Refuse a folder that exists and is not to be replaced.

    Raises:
        BadInputError: If it is so.
    """
    if not os.path.lexists(target):
        return
    is_folder = target.is_dir() and not target.is_symlink()
    if is_folder and (not any(target.iterdir()) or (force and is_output(target))):
        return
    if target.is_symlink():
        remedy = "; it is a symlink, which is never replaced"
    elif force:
        remedy = "; it has no record of an earlier output, so --force does not replace it"
    else:
        remedy = ", or give --force to replace it"
    raise BadInputError(f"output folder {target} already exists; choose another{remedy}")
