"""A content-addressed store: whatever is expensive to compute is kept under what determines it.

An entry is named by the digest of its identity: the data, settings, seed and code that it was
computed from. Another value of any of them is another entry, so nothing stale is ever returned.
The index is an SQLite file in WAL mode; contents lie beside it as JSON and safetensors files that
are named by their SHA-256 and written atomically before the index mentions them. Several processes
may use a store at once, and a killed one loses at most the entry that it was computing.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmdefense.checkpoints.runs import RunStore, write_atomically
from mmdefense.errors import BadInputError, one_line

__all__ = ["Entry", "Freed", "Identity", "Store"]

Status = Literal["done", "failed"]

_INDEX = "index.sqlite"
_FORM = 1
"""Version of the table's columns."""

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
    content TEXT,
    tensors TEXT,
    error TEXT NOT NULL DEFAULT '',
    trace TEXT NOT NULL DEFAULT ''
)
"""


@dataclass(frozen=True)
class Identity:
    """All that determines a result.

    Attributes:
        kind: What it is, for example ``"victim"`` or ``"cell"``.
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
        content: SHA-256 of the JSON file; none of a failure.
        tensors: SHA-256 of the safetensors file, where there is one.
        error: What went wrong, in one line; empty where nothing did.
        trace: The traceback of it.
    """

    digest: str
    kind: str
    name: str
    status: Status
    created: str
    identity: Mapping[str, Any]
    content: str | None = None
    tensors: str | None = None
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
            raise BadInputError(f"{folder} holds no store; `mmdefense grid run -o` makes one")
        if create:
            self._check_ours()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._index() as index:
                form = index.execute("PRAGMA user_version").fetchone()[0]
                if form == 0 and index.execute("SELECT 1 FROM sqlite_master").fetchone():
                    raise BadInputError(
                        f"{self.folder / _INDEX} is the database of another program; use another "
                        "folder"
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
            raise BadInputError(
                f"{self.folder} exists and holds no store; name another folder to make one in"
            )

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
    ) -> Entry:
        """Keep a result; a failure of the same identity gives way to it.

        Args:
            identity: What determines it.
            content: Plain JSON values.
            tensors: Tensors by name, on any device.

        Returns:
            The entry: the earlier one, where another process was first.

        Raises:
            OSError: If it cannot be written, for example on a full disk.
        """
        text = json.dumps(content, indent=1, allow_nan=False).encode()
        kept, blob = self._keep(text, "json"), None
        if tensors is not None:
            # clones, for safetensors refuses tensors that share storage
            copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
            blob = self._keep(save(copies), "safetensors")
        return self._write(identity, "done", content=kept, tensors=blob)

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
        found: dict[str, Any] = json.loads(self._checked(entry, entry.content, "json").read_bytes())
        return found

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """Return the tensors of an entry that is done; on the CPU.

        Raises:
            BadInputError: If their file is missing or damaged.
        """
        path = self._checked(entry, entry.tensors, "safetensors")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise BadInputError(f"{path} cannot be read: {one_line(error)}") from error

    def content_path(self, entry: Entry) -> str:
        """Return where the JSON content of an entry is, within the folder of the store."""
        return self._path(entry.content or "", "json").relative_to(self.folder).as_posix()

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
            for digest, suffix in ((entry.content, "json"), (entry.tensors, "safetensors")):
                if digest is not None:
                    try:
                        self._checked(entry, digest, suffix)
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
        needed = {digest for entry in entries for digest in (entry.content, entry.tensors)}
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

    def _keep(self, data: bytes, suffix: str) -> str:
        digest = hashlib.sha256(data).hexdigest()
        write_atomically(self._path(digest, suffix), lambda file: file.write(data))
        return digest

    def _path(self, digest: str, suffix: str) -> Path:
        return self.folder / "blobs" / digest[:2] / f"{digest}.{suffix}"

    def _checked(self, entry: Entry, digest: str | None, suffix: str) -> Path:
        """Return the file of an entry, once it is found to hold what was written."""
        if digest is None:
            raise BadInputError(f"{entry.kind} {entry.name} has no {suffix} in {self.folder}")
        path = self._path(digest, suffix)
        what = f"{entry.kind} {entry.name} ({entry.digest[:12]}): {path}"
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadInputError(f"{what} cannot be read: {error.strerror}") from error
        if found != digest:
            raise BadInputError(
                f"{what} is damaged; `mmdefense store rm {entry.digest[:12]}` removes the entry, "
                "and it is computed again"
            )
        return path

    def _write(
        self,
        identity: Identity,
        status: Status,
        *,
        content: str | None = None,
        tensors: str | None = None,
        error: str = "",
        trace: str = "",
    ) -> Entry:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = (identity.digest, identity.kind, identity.name, status, now, identity.text)
        with self._index() as index:
            index.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET status = excluded.status, "
                "created = excluded.created, content = excluded.content, "
                "tensors = excluded.tensors, error = excluded.error, trace = excluded.trace "
                "WHERE entries.status = 'failed'",
                (*row, content, tensors, error, trace),
            )
        kept = self.find(identity)
        assert kept is not None
        return kept


def _entry(row: sqlite3.Row) -> Entry:
    held = dict(row)
    return Entry(**{**held, "identity": json.loads(held["identity"])})
