"""From files to files: what the command line does, as functions."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdefense.analysis.gather import Level
from mmdefense.checkpoints.folders import reserved
from mmdefense.checkpoints.outputs import RECORD, check_separate
from mmdefense.checkpoints.runs import RunStore
from mmdefense.checkpoints.seals import Seal, read_once
from mmdefense.checkpoints.weights import write_state
from mmdefense.defenses.base import Defense
from mmdefense.errors import BadInputError, DivergenceError, LowUtilityError, MMDefenseError
from mmdefense.notes import note
from mmdefense.pipeline.identity import purification_parts
from mmdefense.pipeline.purification import purify_prepared
from mmdefense.pipeline.scan import scan_loaded
from mmdefense.pipeline.sources import AUTO, Opened, Source
from mmdefense.pipeline.vetting import open_vetted
from mmdefense.report.record import PurificationRecord, read_record
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.processes import Processes
from mmdefense.runtime.run import Event, Progress
from mmdefense.store import Entry, Identity, Store

__all__ = [
    "AUTO",
    "Opened",
    "Source",
    "assist",
    "partial_folder",
    "purify_files",
    "writing_seconds",
]

_IDENTITY = "job"
_FOR_THE_PAGE, _PASSES = 1.0, 6
"""Kept for writing: seconds, and passes over the model, each as long as hashing what is given."""


def partial_folder(out: str | Path) -> Path:
    """Return where the states of a purification into ``out`` are kept until it is done."""
    target = Path(out).absolute()
    return target.with_name(f"{target.name}.partial")


def purify_files(
    source: Source,
    defense: Defense,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    max_seconds: float | Deadline | None = None,
    evidence: Level = "fast",
    command: str = "",
    processes: Processes | None = None,
    kept: Store | None = None,
) -> PurificationRecord:
    """Purify the model of ``source`` into the folder ``out``.

    Its files are scanned before it is loaded, and its weights behind that; what was found stands in
    the record and on the page.
    States are kept in the folder ``out.partial``; after a kill the same call with ``resume`` goes
    on from them to the same result. It is removed when ``out`` is there, and where there is
    nothing to keep; it stays where the time was up. What a kill amid the writing of ``out`` left
    beside it is removed.

    Args:
        source: Model and clean data.
        defense: The defense with its settings.
        out: The folder to make.
        resume: Whether an unfinished run of the same call goes on.
        force: Whether an earlier output at ``out`` is replaced.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
        max_seconds: Within how many seconds to be done with all of it, reading and writing
            included, or by what deadline; the best state so far is written.
        evidence: How much is measured beyond the verdict; see
            :func:`~mmdefense.pipeline.purification.purify`.
        command: For the record, the command line.
        processes: Those that compute it together, of which this is the main one; the others call
            :func:`assist`.
        kept: A store of results: what is in it is written to ``out`` and not computed again, and
            what is computed within the time is kept in it.

    Returns:
        The record in ``out``, as it was when the result was computed.

    Raises:
        BadInputError: If anything given cannot be used, or a file of the model speaks strongly
            against it; nothing is written.
        UnsupportedError: If the defense cannot serve this model.
        DivergenceError: If a loss stopped being finite; the last good weights are kept.
    """
    deadline = Deadline.after(max_seconds)
    store, inputs = RunStore(partial_folder(out)), source.inputs()
    check_separate(store.folder, inputs)
    with reserved(out, force=force, inputs=inputs) as place:
        _check_resumable(store, resume)
        tell = progress or (lambda _: None)
        with read_once(source.model, every=True) as seal:
            tell(Event("reading", 0, 1))
            vetted = open_vetted(source)
            prepared = vetted.opened.prepare()
            tell(Event("reading", 1, 1))
            tell(Event("scan", 0, 1))
            files = None if seal is None else seal.own
            scanned = scan_loaded(source.model, prepared.model, files, vetted.findings)
            tell(Event("scan", 1, 1))
        begin = deadline.clock()
        parts = purification_parts(source, vetted.opened, prepared, defense)
        parts["number of processes"] = 1 if processes is None else processes.count
        identity = _kept_as(source, parts, defense, evidence, seal)
        entry = _found(kept, identity, processes)
        if kept is not None and entry is not None:
            with place.writing() as folder:
                kept.restore(entry, folder)
            shutil.rmtree(store.folder, ignore_errors=True)
            return _record_in(out)
        _claim(store, parts)
        writing = writing_seconds(deadline.clock() - begin)
        with _kept_or_cleared(store, prepared.model):
            purified = purify_prepared(
                prepared,
                defense,
                progress=progress,
                store=store,
                deadline=deadline.earlier(writing),
                evidence=evidence,
                accept_low_utility=source.accept_low_utility,
                processes=processes,
            )
            names = {"model": source.model, "data": source.data, "command": command}
            purified = dataclasses.replace(
                purified,
                names=names,
                scan=scanned,
                seal=seal,
                accepted_findings=vetted.accepted,
            )
            tell(Event("writing", 0, 1))
            with place.writing() as folder:
                purified.write(folder, source.model, weights=source.weights)
            tell(Event("writing", 1, 1))
        if not purified.result.stopped or not _holds_states(store):
            shutil.rmtree(store.folder, ignore_errors=True)
        if kept is not None and not purified.result.stopped:
            kept.put(identity, {"seconds": purified.result.seconds}, output=Path(out))
    return _record_in(out)


def _kept_as(
    source: Source, parts: Mapping[str, Any], defense: Defense, evidence: Level, seal: Seal | None
) -> Identity:
    """Return the identity of an output: that of its weights, and what else stands in its folder."""
    accepted = [source.accept_low_utility, source.accept_findings]
    name = f"{source.model} by {type(defense).__name__}"
    files = {} if seal is None else {**seal.own, **seal.files}
    more = {"evidence": evidence, "accepted": accepted, "files": files}
    return Identity("purification", name, {**parts, **more})


def _found(kept: Store | None, identity: Identity, processes: Processes | None) -> Entry | None:
    """Return the result that a store has, where it has it, and tell the other processes."""
    entry = None if kept is None else kept.find(identity)
    if processes is not None:
        processes.from_main(entry is not None)
    if kept is not None and entry is not None:
        note(f"nothing to compute: the result of {entry.created[:19]} is in {kept.folder}")
    return entry


def _record_in(out: str | Path) -> PurificationRecord:
    found = read_record(Path(out) / RECORD)
    assert isinstance(found, PurificationRecord)
    return found


def assist(source: Source, defense: Defense, processes: Processes) -> None:
    """Do this process's share of a purification, whose main process calls :func:`purify_files`.

    Args:
        source: As the main process has it, but for the device.
        defense: The same.
        processes: All of them.

    Raises:
        LostProcessError: If the main process has ended.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the main process has the same to say
        prepared = open_vetted(source).opened.prepare()
        if processes.from_main(False):
            return  # the main process has found the result in a store
        store = RunStore(Path())  # that of the main process
        defense.purify(prepared, store=store, processes=processes)


def writing_seconds(hashing: float) -> float:
    """Return about how long writing an output takes, where hashing its weights takes so long."""
    return _FOR_THE_PAGE + _PASSES * hashing


def _check_resumable(store: RunStore, resume: bool) -> None:
    _check_ours(store)
    if resume and not _holds_states(store):
        note(f"{store.folder} has no checkpoint: the run starts from the beginning")
    if not resume and _holds_states(store):
        raise BadInputError(
            f"{store.folder} holds an unfinished run; add --resume to continue it, or delete that "
            "folder to start again"
        )


def _check_ours(store: RunStore) -> None:
    """Refuse a folder that stands where states are to be kept, and that no run has made.

    Raises:
        BadInputError: If there is one: nothing is written into it, and nothing removed from it.
    """
    folder = store.folder
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not folder.is_symlink():
        held = {path.name for path in folder.iterdir()}
        begun = re.compile(rf"\.{_IDENTITY}\.pt\.[0-9a-f]{{8}}")  # by a run killed in that moment
        if f"{_IDENTITY}.pt" in held or all(map(begun.fullmatch, held)):
            return
    raise BadInputError(
        f"{folder} would hold the unfinished run, but mmdefense did not create it; move it, or "
        "choose another output folder"
    )


def _claim(store: RunStore, identity: dict[str, Any]) -> None:
    """Note whose states the store holds, or refuse those of another job."""
    kept = _kept_identity(store)
    if kept is None or not _holds_states(store):
        try:
            store.save(_IDENTITY, identity)
        except OSError as error:
            shutil.rmtree(store.folder, ignore_errors=True)
            raise _unwritable(store, error) from error
        return
    different = sorted(k for k in identity.keys() | kept.keys() if identity.get(k) != kept.get(k))
    if different:
        raise BadInputError(
            f"{store.folder} holds an unfinished run with another {', '.join(different)}; repeat "
            "its command, or delete that folder to start again"
        )


def _kept_identity(store: RunStore) -> dict[str, Any] | None:
    try:
        return store.load(_IDENTITY)
    except BadInputError as error:
        raise BadInputError(
            f"{store.folder} has no readable description of its run ({error}): delete that folder "
            "to start again"
        ) from error


def _holds_states(store: RunStore) -> bool:
    """Say whether a run can be gone on with: whether it has kept more than whose it is."""
    return any(path.stem != _IDENTITY for path in store.folder.rglob("*.pt"))


@contextmanager
def _kept_or_cleared(store: RunStore, given: nn.Module) -> Iterator[None]:
    """After a fault, keep the states that can be gone on from, and say so; else leave nothing."""
    try:
        yield
    except DivergenceError as error:
        raise _with_kept_state(error, store, given) from error
    except LowUtilityError:
        shutil.rmtree(store.folder, ignore_errors=True)
        raise
    except (MMDefenseError, OSError) as error:
        raise _with_remedy(error, store) from error
    except BaseException as error:  # a fault of ours, or an interrupt
        if _holds_states(store):
            error.add_note(_way_on(store))
        else:
            shutil.rmtree(store.folder, ignore_errors=True)
        raise


def _with_kept_state(error: DivergenceError, store: RunStore, given: nn.Module) -> DivergenceError:
    """Keep the last good weights, where they are not those of the given model.

    What leads to the same end again is not kept.
    """
    if error.state is None or _same(error.state, given.state_dict()):
        shutil.rmtree(store.folder, ignore_errors=True)
        return error
    for kept in store.folder.iterdir():
        if kept.is_dir():
            shutil.rmtree(kept, ignore_errors=True)
        elif kept.name != f"{_IDENTITY}.pt":  # which tells that a run has made the folder
            kept.unlink()
    path = store.folder / "last_good.safetensors"
    write_state(error.state, path)
    return DivergenceError(f"{error}; its weights are in {path}", error.state)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two state dicts hold the same values."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].cpu().to(other[name].dtype), other[name].cpu()) for name in one
    )


def _with_remedy(error: MMDefenseError | OSError, store: RunStore) -> MMDefenseError:
    """Keep states that can be gone on from, and say so; remove a store that holds none."""
    failure = _unwritable(store, error) if isinstance(error, OSError) else error
    if not _holds_states(store):
        shutil.rmtree(store.folder, ignore_errors=True)
        return failure
    return type(failure)(f"{failure}; {_way_on(store)}")


def _way_on(store: RunStore) -> str:
    return f"what was done is kept in {store.folder}: go on with --resume"


def _unwritable(store: RunStore, error: OSError) -> BadInputError:
    return BadInputError(f"{store.folder} cannot be written: {error.strerror or error}")
