"""A content-addressed store: whatever is expensive to compute is kept under what determines it.

An entry is named by the digest of its identity: the data, settings, seed and code that it was
computed from. Another value of any of them is another entry, so nothing stale is ever returned.
The index is an SQLite file in WAL mode; contents lie beside it as files that are named by their
SHA-256 and written atomically before the index mentions them. Several processes may use a store at
once, and a killed one loses at most the entry that it was computing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmdefense.checkpoints.runs import RunStore, write_atomically
from mmdefense.errors import BadInputError, one_line

__all__ = ["Entry", "Freed", "Identity", "Store"]

Status = Literal["done", "failed"]

_INDEX = "index.sqlite"
_FORM = 2
"""Version of the table's columns."""

_CONTENT, _TENSORS, _OUTPUT = "content.json", "tensors.safetensors", "output/"
"""Names of the files of an entry: its JSON values, its tensors, and what was written for a user."""

_FRESH = 3600.0
"""Seconds for which a file without an entry stays."""

_TABLE = """
CREATE TABLE IF NOT EXISTS entries (
    digest TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    created TEXT NOT NULL,
    identity TEXT NOT NULL,
    files TEXT NOT NULL DEFAULT '{}',
    error TEXT NOT NULL DEFAULT '',
    trace TEXT NOT NULL DEFAULT ''
)
"""


@dataclass(frozen=True)
class Identity:
    """All that determines a result.

    Attributes:
        kind: What it is: ``"victim"``, ``"cell"``, ``"purification"`` or ``"scan"``.
        name: What people call it; no part of the digest.
        parts: What determines it, as plain JSON values.
    """

    kind: str
    name: str
    parts: Mapping[str, Any]

    @cached_property
    def text(self) -> str:
        """Kind and parts as canonical JSON."""
        return json.dumps({"kind": self.kind, **self.parts}, sort_keys=True, allow_nan=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of :attr:`text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A result, or why there is none.

    Attributes:
        digest: Of its identity.
        kind: As in :class:`Identity`.
        name: As in :class:`Identity`.
        status: ``"done"`` or ``"failed"``.
        created: When it was written, ISO 8601 in UTC.
        identity: The parts of the identity.
        files: SHA-256 of each of its files, by name; none of a failure.
        error: What went wrong, in one line; empty where nothing did.
        trace: The traceback of it.
    """

    digest: str
    kind: str
    name: str
    status: Status
    created: str
    identity: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Freed:
    """What a clean-up removed.

    Attributes:
        files: Number of files that no entry needs.
        size: Their bytes.
    """

    files: int
    size: int


class Store:
    """A folder of results, each under the digest of what determines it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     store = Store(folder)
        ...     same = Identity("sum", "two and two", {"a": 2, "b": 2})
        ...     _ = store.put(same, {"sum": 4})
        ...     store.content(store.find(same))
        {'sum': 4}
    """

    def __init__(self, folder: str | Path, *, create: bool = True) -> None:
        """Open the store in ``folder``.

        Args:
            folder: Where it is.
            create: Whether it is made where it is missing.

        Raises:
            BadInputError: If it is missing, cannot be written, or is no store of this version.
        """
        self.folder = Path(folder)
        if not create and not (self.folder / _INDEX).is_file():
            raise BadInputError(
                f"{folder} holds no store; `mmdefense grid run -o` or `purify --store` makes one"
            )
        if create:
            self._check_ours()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._index() as index:
                form = index.execute("PRAGMA user_version").fetchone()[0]
                if form == 0 and index.execute("SELECT 1 FROM sqlite_master").fetchone():
                    raise BadInputError(
                        f"{self.folder / _INDEX} belongs to another program; use another folder"
                    )
                if form not in {0, _FORM}:
                    raise BadInputError(
                        f"the store {folder} is of version {form}, this program's is {_FORM}; "
                        "use another folder"
                    )
                index.execute("PRAGMA journal_mode = WAL")
                index.execute(_TABLE)
                index.execute(f"PRAGMA user_version = {_FORM}")
        except (OSError, sqlite3.Error) as error:
            raise BadInputError(f"the store {folder} cannot be opened: {error}") from error

    def _check_ours(self) -> None:
        """Refuse a folder that holds something else than a store.

        Raises:
            BadInputError: If it is so; nothing is written into it.
        """
        if not self.folder.exists() or (self.folder / _INDEX).exists():
            return
        if not self.folder.is_dir() or any(
            not path.name.startswith(_INDEX) for path in self.folder.iterdir()
        ):
            raise BadInputError(f"{self.folder} exists and is not a store; name another folder")

    @property
    def parts(self) -> list[Path]:
        """The index, and the folders of contents, claims and states."""
        return [self.folder / name for name in (_INDEX, "blobs", "claims", "work")]

    @contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        """Open the index for one transaction: all of it is written, or nothing.

        Yields:
            The connection.
        """
        with closing(sqlite3.connect(self.folder / _INDEX, timeout=60)) as index, index:
            index.row_factory = sqlite3.Row
            yield index

    def find(self, identity: Identity | str) -> Entry | None:
        """Return the entry of an identity or digest; none where there is none yet."""
        digest = identity if isinstance(identity, str) else identity.digest
        with self._index() as index:
            row = index.execute("SELECT * FROM entries WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else _entry(row)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return all entries, or those of a kind, oldest first."""
        query = "SELECT * FROM entries WHERE ? IN (kind, '') ORDER BY created, name"
        with self._index() as index:
            return [_entry(row) for row in index.execute(query, (kind or "",))]

    def named(self, start: str) -> Entry:
        """Return the one entry whose digest begins with ``start``.

        Raises:
            BadInputError: If there is none, or more than one.
        """
        found = [entry for entry in self.entries() if entry.digest.startswith(start)]
        if len(found) != 1:
            count = len(found) or "no"
            raise BadInputError(
                f"{count} entries of {self.folder} have a digest that begins with {start!r}; "
                "`mmdefense store ls` lists them"
            )
        return found[0]

    def put(
        self,
        identity: Identity,
        content: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        output: Path | None = None,
    ) -> Entry:
        """Keep a result; a failure of the same identity gives way to it.

        Args:
            identity: What determines it.
            content: Plain JSON values.
            tensors: Tensors by name, on any device.
            output: A folder whose files are kept as well; see :meth:`restore`.

        Returns:
            The entry: the earlier one, where another process was first.

        Raises:
            OSError: If it cannot be written, for example on a full disk.
        """
        text = json.dumps(content, indent=1, allow_nan=False).encode()
        files = {_CONTENT: self._keep(BytesIO(text), _CONTENT)}
        if tensors is not None:
            # clones, for safetensors refuses tensors that share storage
            copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
            files[_TENSORS] = self._keep(BytesIO(save(copies)), _TENSORS)
        if output is not None:
            for path in sorted(part for part in output.rglob("*") if part.is_file()):
                name = f"{_OUTPUT}{path.relative_to(output).as_posix()}"
                with path.open("rb") as file:
                    files[name] = self._keep(file, name)
        return self._write(identity, "done", files=files)

    def fail(self, identity: Identity, error: BaseException) -> Entry:
        """Keep that there is no result, and why."""
        trace = "".join(traceback.format_exception(error))
        return self._write(identity, "failed", error=one_line(error), trace=trace)

    def forget(self, entry: Entry) -> None:
        """Remove an entry from the index; :meth:`gc` removes its files."""
        with self._index() as index:
            index.execute("DELETE FROM entries WHERE digest = ?", (entry.digest,))

    def content(self, entry: Entry) -> dict[str, Any]:
        """Return the JSON content of an entry that is done.

        Raises:
            BadInputError: If its file is missing or damaged.
        """
        found: dict[str, Any] = json.loads(self._checked(entry, _CONTENT).read_bytes())
        return found

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """Return the tensors of an entry that is done; on the CPU.

        Raises:
            BadInputError: If their file is missing or damaged.
        """
        path = self._checked(entry, _TENSORS)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise BadInputError(f"{path} cannot be read: {one_line(error)}") from error

    def restore(self, entry: Entry, folder: Path) -> None:
        """Write the files of the folder that :meth:`put` was given as ``output`` into ``folder``.

        Raises:
            BadInputError: If one of them is missing or damaged.
        """
        for name in entry.files:
            if name.startswith(_OUTPUT):
                target = folder / name.removeprefix(_OUTPUT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._checked(entry, name), target)

    def content_path(self, entry: Entry) -> str:
        """Return where the JSON content of an entry is, within the folder of the store."""
        path = self._path(entry.files[_CONTENT], _CONTENT)
        return path.relative_to(self.folder).as_posix()

    @contextmanager
    def claim(self, identity: Identity) -> Iterator[bool]:
        """Claim an identity for this process while the block runs, so that no other computes it.

        The claim ends with the process, however that ends.

        Yields:
            Whether it was free.
        """
        path = self.folder / "claims" / identity.digest
        path.parent.mkdir(exist_ok=True)
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except OSError:
                mine = False
            yield mine
        finally:
            os.close(held)

    def claimed(self) -> set[str]:
        """Return the digests that processes are at work on."""
        found = set()
        for path in (self.folder / "claims").glob("*"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    found.add(path.name)
        return found

    def work(self, identity: Identity) -> RunStore:
        """Return where the states of a computation are kept until it is done; see :meth:`put`."""
        return RunStore(self.folder / "work" / identity.digest)

    def verify(self) -> list[str]:
        """Return what is wrong, a line each: files that are missing, or not what they were."""
        faults = []
        for entry in self.entries():
            for name in entry.files:
                try:
                    self._checked(entry, name)
                except BadInputError as error:
                    faults.append(str(error))
        return faults

    def gc(self) -> Freed:
        """Remove files that no entry needs: of forgotten entries and of finished runs.

        What a process is at work on is left alone, and so is what may be resumed. A file of the
        last hour stays: its entry may be about to be written.
        """
        old = time.time() - _FRESH
        entries = self.entries()
        needed = {digest for entry in entries for digest in entry.files.values()}
        done = {entry.digest for entry in entries if entry.status == "done"} - self.claimed()
        blobs = [path for path in (self.folder / "blobs").rglob("*") if path.is_file()]
        doomed = [p for p in blobs if p.stem not in needed and p.stat().st_mtime < old]
        finished = [path for path in (self.folder / "work").glob("*") if path.name in done]
        doomed += [path for folder in finished for path in folder.rglob("*") if path.is_file()]
        freed = Freed(len(doomed), sum(path.stat().st_size for path in doomed))
        for path in doomed:
            path.unlink(missing_ok=True)
        for folder in finished:
            shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _keep(self, data: BinaryIO, name: str) -> str:
        """Keep what is read from ``data`` and return its SHA-256."""
        digest = hashlib.sha256()
        while block := data.read(1 << 20):
            digest.update(block)
        data.seek(0)
        path = self._path(digest.hexdigest(), name)
        write_atomically(path, lambda file: shutil.copyfileobj(data, file))
        return digest.hexdigest()

    def _path(self, digest: str, name: str) -> Path:
        return self.folder / "blobs" / digest[:2] / f"{digest}{Path(name).suffix}"

    def _checked(self, entry: Entry, name: str) -> Path:
        """Return where a file of an entry is, once it is found to hold what was written."""
        if name not in entry.files:
            raise BadInputError(f"{entry.kind} {entry.name} has no {name} in {self.folder}")
        path = self._path(entry.files[name], name)
        what = f"{entry.kind} {entry.name} ({entry.digest[:12]}): {path}"
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadInputError(f"{what} cannot be read: {error.strerror}") from error
        if found != entry.files[name]:
            raise BadInputError(
                f"{what} is damaged; `mmdefense store rm {entry.digest[:12]}` removes the entry, "
                "so that it is computed again"
            )
        return path

    def _write(
        self,
        identity: Identity,
        status: Status,
        *,
        files: Mapping[str, str] | None = None,
        error: str = "",
        trace: str = "",
    ) -> Entry:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = (identity.digest, identity.kind, identity.name, status, now, identity.text)
        with self._index() as index:
            index.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET status = excluded.status, "
                "created = excluded.created, files = excluded.files, "
                "error = excluded.error, trace = excluded.trace "
                "WHERE entries.status = 'failed'",
                (*row, json.dumps(files or {}), error, trace),
            )
        kept = self.find(identity)
        assert kept is not None
        return kept


def _entry(row: sqlite3.Row) -> Entry:
    held = dict(row)
    return Entry(**{**held, **{key: json.loads(held[key]) for key in ("identity", "files")}})
