"""Purification from files to files, as used by the command line."""

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
"""Time reserved for writing: seconds, plus passes over the model as long as hashing its weights."""


def partial_folder(out: str | Path) -> Path:
    """Return the checkpoint folder of an unfinished purification into ``out``."""
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

    The model's files are scanned before it is loaded, and its weights after that; the findings are
    in the record and on the page. Checkpoints are saved in the folder ``out.partial``; if the run
    is killed, the same call with ``resume`` continues from them to the same result. That folder is
    removed when ``out`` is complete or there is nothing to resume; it is kept if time ran out.
    Temporary files of a run that was killed while writing ``out`` are removed.

    Args:
        source: Model and clean data.
        defense: The defense with its settings.
        out: The folder to create.
        resume: Whether to continue an unfinished run of the same call.
        force: Whether to replace an earlier output at ``out``.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
        max_seconds: Time limit in seconds for the whole call, including reading and writing, or a
            deadline; the best state so far is written.
        evidence: How much is measured beyond the verdict; see
            :func:`~mmdefense.pipeline.purification.purify`.
        command: The command line, for the record.
        processes: The processes that compute the result together, of which this is the main one;
            the others call :func:`assist`.
        kept: A store of results: a stored result is written to ``out`` instead of being computed
            again, and a new result is added unless it was cut short by the time limit.

    Returns:
        The record in ``out``, as of when the result was computed.

    Raises:
        BadInputError: If an argument is not usable, or a file of the model has high-level findings;
            nothing is written.
        UnsupportedError: If the defense does not support this model.
        DivergenceError: If a loss became non-finite; the last good weights are kept.
    """
    deadline = Deadline.after(max_seconds)
    store, inputs = RunStore(partial_folder(out)), source.inputs()
    check_separate(store.folder, inputs)
    with reserved(out, force=force, inputs=inputs) as place:
        _check_resumable(store, resume)
        report = progress or (lambda _: None)
        with read_once(source.model, every=True) as seal:
            report(Event("reading", 0, 1))
            vetted = open_vetted(source)
            prepared = vetted.opened.prepare()
            report(Event("reading", 1, 1))
            report(Event("scan", 0, 1))
            files = None if seal is None else seal.own
            scanned = scan_loaded(source.model, prepared.model, files, vetted.findings)
            report(Event("scan", 1, 1))
        begin = deadline.clock()
        parts = purification_parts(source, vetted.opened, prepared, defense)
        parts["number of processes"] = 1 if processes is None else processes.count
        identity = _output_identity(source, parts, defense, evidence, seal)
        entry = _stored_result(kept, identity, processes)
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
            report(Event("writing", 0, 1))
            with place.writing() as folder:
                purified.write(folder, source.model, weights=source.weights)
            report(Event("writing", 1, 1))
        if not purified.result.stopped or not _holds_states(store):
            shutil.rmtree(store.folder, ignore_errors=True)
        if kept is not None and not purified.result.stopped:
            kept.put(identity, {"seconds": purified.result.seconds}, output=Path(out))
    return _record_in(out)


def _output_identity(
    source: Source, parts: Mapping[str, Any], defense: Defense, evidence: Level, seal: Seal | None
) -> Identity:
    """Return the identity of an output: what its weights and its other files depend on."""
    accepted = [source.accept_low_utility, source.accept_findings]
    name = f"{source.model} by {type(defense).__name__}"
    files = {} if seal is None else {**seal.own, **seal.files}
    more = {"evidence": evidence, "accepted": accepted, "files": files}
    return Identity("purification", name, {**parts, **more})


def _stored_result(
    kept: Store | None, identity: Identity, processes: Processes | None
) -> Entry | None:
    """Return the stored result, if there is one, and tell the other processes."""
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
    """Do this process's share of a purification whose main process calls :func:`purify_files`.

    Args:
        source: The main process's source, except for the device.
        defense: The main process's defense.
        processes: All processes.

    Raises:
        LostProcessError: If the main process has ended.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the main process shows the same warnings
        prepared = open_vetted(source).opened.prepare()
        if processes.from_main(False):
            return  # the main process found the result in a store
        store = RunStore(Path())  # replaced by the main process's
        defense.purify(prepared, store=store, processes=processes)


def writing_seconds(hashing: float) -> float:
    """Estimate how many seconds writing an output takes, from those of hashing its weights."""
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
    """Refuse a checkpoint folder that was not created by a run.

    Raises:
        BadInputError: If there is one; it is not modified.
    """
    folder = store.folder
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not folder.is_symlink():
        held = {path.name for path in folder.iterdir()}
        begun = re.compile(rf"\.{_IDENTITY}\.pt\.[0-9a-f]{{8}}")  # from a killed run
        if f"{_IDENTITY}.pt" in held or all(map(begun.fullmatch, held)):
            return
    raise BadInputError(
        f"{folder} would hold the unfinished run, but mmdefense did not create it; move it, or "
        "choose another output folder"
    )


def _claim(store: RunStore, identity: dict[str, Any]) -> None:
    """Record which job the checkpoints in the store belong to, or refuse those of another job."""
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
    """Return whether a run can be resumed: whether the store has more than the run's identity."""
    return any(path.stem != _IDENTITY for path in store.folder.rglob("*.pt"))


@contextmanager
def _kept_or_cleared(store: RunStore, given: nn.Module) -> Iterator[None]:
    """After an error, keep checkpoints that can be resumed and mention them; else clean up."""
    try:
        yield
    except DivergenceError as error:
        raise _with_kept_state(error, store, given) from error
    except LowUtilityError:
        shutil.rmtree(store.folder, ignore_errors=True)
        raise
    except (MMDefenseError, OSError) as error:
        raise _with_remedy(error, store) from error
    except BaseException as error:  # a bug, or an interrupt
        if _holds_states(store):
            error.add_note(_resume_hint(store))
        else:
            shutil.rmtree(store.folder, ignore_errors=True)
        raise


def _with_kept_state(error: DivergenceError, store: RunStore, given: nn.Module) -> DivergenceError:
    """Keep the last good weights, unless they are those of the given model.

    Checkpoints are removed, since a resumed run would diverge again.
    """
    if error.state is None or _same(error.state, given.state_dict()):
        shutil.rmtree(store.folder, ignore_errors=True)
        return error
    for kept in store.folder.iterdir():
        if kept.is_dir():
            shutil.rmtree(kept, ignore_errors=True)
        elif kept.name != f"{_IDENTITY}.pt":  # this file marks the folder as created by a run
            kept.unlink()
    path = store.folder / "last_good.safetensors"
    write_state(error.state, path)
    return DivergenceError(f"{error}; its weights are in {path}", error.state)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two state dicts hold the same values."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].cpu().to(other[name].dtype), other[name].cpu()) for name in one
    )


def _with_remedy(error: MMDefenseError | OSError, store: RunStore) -> MMDefenseError:
    """Return an error that mentions resumable checkpoints; remove a store without any."""
    failure = _unwritable(store, error) if isinstance(error, OSError) else error
    if not _holds_states(store):
        shutil.rmtree(store.folder, ignore_errors=True)
        return failure
    return type(failure)(f"{failure}; {_resume_hint(store)}")


def _resume_hint(store: RunStore) -> str:
    return f"progress was saved to {store.folder}; continue it with --resume"


def _unwritable(store: RunStore, error: OSError) -> BadInputError:
    return BadInputError(f"{store.folder} cannot be written: {error.strerror or error}")
