"""Verify that a model's files did not change while they were in use.

A model's files are not copied, since they may be large. Their stat marks (inode, size, mtime,
ctime) are taken before the first byte is read and compared after the last; in between every file is
hashed. So the hashes are those of the bytes that were read, unless somebody sets the clock back or
writes past the file system. For the same reason a file that is read again later is hashed again
only if its marks differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.faults import all_files, link_faults
from mmdefense.checkpoints.models import input_files, model_places
from mmdefense.checkpoints.weights import hash_file
from mmdefense.errors import BadInputError
from mmdefense.files import open_plain

__all__ = ["Seal", "hash_all", "marks_in", "read_once", "unchanged"]

_Mark = tuple[int, ...]


@dataclass(frozen=True)
class Seal:
    """The files of a model as they were read.

    Attributes:
        where: What the user called the model.
        places: Its folder or file, and the folder of its base, by what their names begin with.
        marks: Of each file, by its path, before the first byte was read.
        every: Whether all files of the folder are hashed, or only those that are read or passed on.
        earlier: The seal of an earlier read of the same model: files with the same marks are not
            hashed again.
    """

    where: str
    places: Mapping[str, Path]
    marks: Mapping[str, tuple[_Mark, ...]]
    every: bool = False
    earlier: Seal | None = None

    @cached_property
    def own(self) -> Mapping[str, str]:
        """SHA-256 of each file of the folder by its name, as ``sha256sum`` prints it."""
        only = None if self.every else set(input_files(self.where))
        return hash_all(self.places[""], only, self._known)

    @cached_property
    def files(self) -> Mapping[str, str]:
        """The same of each file that is read or handed on, and of the base as ``base/...``."""
        files = input_files(self.where)
        base = self.places.get("base/")
        return {
            name: self._known.get(name) or hash_file(path)
            if base is not None and path.is_relative_to(base)
            else self.own.get(name, "")
            for name, path in files.items()
        }

    @cached_property
    def _known(self) -> Mapping[str, str]:
        """The hashes of the earlier seal whose files lie on the disk as they did then, by name."""
        if self.earlier is None:
            return {}
        paths, then = input_files(self.where), self.earlier
        return {
            name: value
            for name, value in then.files.items()
            if name in paths and self._marks_of(paths[name]) == then._marks_of(paths[name]) != ()
        }

    def _marks_of(self, path: Path) -> tuple[_Mark, ...]:
        return self.marks.get(str(path), ())

    def by_path(self) -> dict[str, str]:
        """Return the hashes of :attr:`files` by the path, with links followed."""
        paths = input_files(self.where)
        return {str(paths[name].resolve()): value for name, value in self.files.items()}

    def check_same(self, later: Seal) -> None:
        """Refuse files that are read again and have changed.

        Raises:
            BadInputError: If one of them was changed, removed or added.
        """
        known = self.files.keys() | later.files.keys()
        _refuse(self.where, [n for n in known if self.files.get(n) != later.files.get(n)])


@contextmanager
def read_once(
    where: Any, *, every: bool = False, earlier: Seal | None = None
) -> Iterator[Seal | None]:
    """Read a model within the block; the hashes are those of the bytes that were read.

    Args:
        where: A folder, a file or a hub id; of a module, which has no files, there is no seal.
        every: As :class:`Seal` has it.
        earlier: Of a model that was read before; where it is the same one, its files must be what
            they were.

    Yields:
        What tells that it is the same when it is read again.

    Raises:
        BadInputError: If a file was changed, came or went before the block was over, or since the
            model was read before.
    """
    if not isinstance(where, str | Path):
        yield None
        return
    places = model_places(where)
    then = earlier if earlier is not None and earlier.where == str(where) else None
    with unchanged(where, *places.values()) as marks:
        seal = Seal(str(where), places, marks, every, then)
        yield seal
        _ = seal.files
        if then is not None:
            then.check_same(seal)


@contextmanager
def unchanged(where: Any, *places: Any) -> Iterator[Mapping[str, tuple[_Mark, ...]]]:
    """Refuse files that are changed, added or removed before the block is over.

    Args:
        where: What the user called the model.
        *places: Folders and files; what is no path is passed by.

    Yields:
        What tells that a file is changed or replaced, of each by its path.

    Raises:
        BadInputError: If it is so.
    """
    roots = [place for place in places if isinstance(place, Path)]
    before = marks_in(*roots)
    yield before
    after = marks_in(*roots)
    _refuse(where, [name for name in before | after if before.get(name) != after.get(name)])


def marks_in(*roots: Path) -> dict[str, tuple[_Mark, ...]]:
    """Return the marks of each file, by its path."""
    return {str(path): _marks(path) for root in roots for path in all_files(root)}


def _refuse(where: str | Path, changed: list[str]) -> None:
    if changed:
        named = ", ".join(map(repr, sorted(changed)[:3]))
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise BadInputError(
            f"model {where} was changed while it was in use ({named}{more}); rerun when nothing "
            "else writes to it"
        )


def _name(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _marks(path: Path) -> tuple[_Mark, ...]:
    """Return the marks of a file and of the link that leads to it."""
    found = []
    for follow in (False, True):
        with suppress(OSError):
            seen = path.stat(follow_symlinks=follow)
            times = (seen.st_mtime_ns, seen.st_ctime_ns)
            found.append((seen.st_dev, seen.st_ino, seen.st_mode, seen.st_size, *times))
    return tuple(found)


def hash_all(
    path: str | Path, only: Collection[str] | None = None, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the SHA-256 of each file by its name in the folder, as ``sha256sum`` prints it.

    Files that cannot be read, are not regular, or are symlinks that escape the folder are left out.

    Args:
        path: A folder, or a single file.
        only: Names of the files; by default all.
        known: Of files that need not be hashed again, by name.
    """
    root = Path(path)
    hashes = {}
    for file in all_files(root):
        name = _name(file, root)
        if (only is not None and name not in only) or (file != root and link_faults(file, root)):
            continue
        if known and known.get(name):
            hashes[name] = known[name]
            continue
        with suppress(OSError), open_plain(file) as stream:  # that is among the findings
            hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
