"""From files to files: what the command line does, as functions."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from mmdefense import __version__, registry
from mmdefense.attacks.base import Attack
from mmdefense.batches import Samples
from mmdefense.checkpoints.folders import check_replaceable
from mmdefense.checkpoints.models import load_model
from mmdefense.checkpoints.runs import RunStore
from mmdefense.checkpoints.weights import hash_weights, write_state
from mmdefense.defenses.base import Defense
from mmdefense.errors import BadInputError, DivergenceError, MMDefenseError
from mmdefense.evaluation.measurement import Evaluation, evaluate
from mmdefense.kernels.run import Progress
from mmdefense.protocol import ReadingAdapter, Task, TaskAdapter, lacking
from mmdefense.purification import Purification, check_value, purify
from mmdefense.report.encoding import plain

__all__ = ["AUTO", "Opened", "Source", "evaluate_files", "partial_folder", "purify_files"]

AUTO = "auto"
"""In place of a task: that of the model's adapter."""

_IDENTITY = "job"
_NOT_WRITTEN = {"split", "classes", "uneven_size", "processor", "tokenizer", "example"}


@dataclass(frozen=True)
class Opened:
    """A model and its data, read and checked.

    Attributes:
        task: What the model is for.
        adapter: Around the model.
        data: As the task reads it: what attacks stamp and metrics read.
        samples: The same as the adapter reads it: what defenses take.
    """

    task: Task
    adapter: TaskAdapter[Any]
    data: Samples[Any]
    samples: Samples[Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model and its data are, and how they are read.

    Attributes:
        model: A Hugging Face folder or id, or a state-dict file.
        data: A folder, a file, or a name that the task knows.
        task: The name of a task, or :data:`AUTO` for that of the model.
        arch: ``module:callable`` that builds the model of a state dict.
        split: ``"train"`` or ``"test"``, where the data is split.
        reading: How data is read, by name: options of the task's ``load``, such as ``image_size``,
            ``frames`` or ``points``, and of the adapter, such as ``mean`` or ``max_length``. What
            is not given is as the model says, or as the data is.
        device: For example ``"cpu"`` or ``"cuda"``.
    """

    model: str
    data: str
    task: str = AUTO
    arch: str | None = None
    split: str = "train"
    reading: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def open(self) -> Opened:
        """Return the model in its adapter, and the data as the task and the model read them.

        Raises:
            BadInputError: If either cannot be read, they do not fit each other or the task, or an
                option is none of theirs.
            UnsupportedError: If a library is not installed, or no adapter accepts the model.
        """
        device = _device(self.device)
        asked = None if self.task == AUTO else self.task
        if asked is not None:
            registry.load("tasks", asked)  # a misspelt name is told before a model is loaded
        model = load_model(self.model, arch=self.arch, task=asked)
        kind = registry.adapter_for(model, asked)
        task = registry.load("tasks", asked or kind.task)()
        mine, its = _told_apart(self.reading, task, kind)
        adapter = kind(model.to(device), **its)
        said = adapter.reading() if not lacking(adapter, ReadingAdapter) else {}
        data = task.load(self.data, split=self.split, **{**said, **mine})
        return Opened(task, adapter, data, adapter.samples(data))


def _told_apart(
    given: Mapping[str, Any], task: Task, kind: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return which options are for the task's ``load``, and which for the adapter.

    Raises:
        BadInputError: If one is for neither, or of the wrong kind.
    """
    reads, takes = (_options(call) for call in (task.load, kind.__init__))
    known = takes | reads  # what both know is read from the data
    for name, value in given.items():
        if name not in known:
            raise BadInputError(
                f"{task.name} reads no option {name!r}; known are {', '.join(sorted(known))}"
            )
        check_value(name, value, known[name], task.name)
    mine = {name: value for name, value in given.items() if name in reads}
    return mine, {name: value for name, value in given.items() if name not in reads}


def _options(call: Any) -> dict[str, Any]:
    """Return the types of the options of a function, by name, that a user can write down."""
    hints = get_type_hints(call)
    names = [
        p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    return {name: hints[name] for name in names if name not in _NOT_WRITTEN}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # each backend raises its own kind
        raise BadInputError(f"device {name!r} is not usable here; try --device cpu") from error
    return device


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
    max_seconds: float | None = None,
    command: str = "",
) -> Purification:
    """Purify the model of ``source`` into the folder ``out``.

    States are kept in the folder ``out.partial``; after a kill the same call with ``resume`` goes
    on from them to the same result. It is removed when ``out`` is there, and where there is
    nothing to keep; it stays where the time was up.

    Args:
        source: Model and clean data.
        defense: The defense with its settings.
        out: The folder to make.
        resume: Whether an unfinished run of the same call goes on.
        force: Whether an earlier output at ``out`` is replaced.
        progress: Called with each :class:`~mmdefense.kernels.run.Event`.
        max_seconds: From when on to stop, with the best state so far.
        command: For the record, the command line.

    Raises:
        BadInputError: If anything given cannot be used; nothing is written.
        UnsupportedError: If the defense cannot serve this model.
        DivergenceError: If a loss stopped being finite; the last good weights are kept.
    """
    check_replaceable(out, force)
    store = RunStore(partial_folder(out))
    _check_resumable(store, resume)
    opened = source.open()
    _claim(store, _identity(opened, defense))
    try:
        purified = purify(
            opened.adapter,
            opened.samples,
            defense,
            progress=progress,
            store=store,
            max_seconds=max_seconds,
        )
        names = {"model": source.model, "data": source.data, "command": command}
        purified = dataclasses.replace(purified, names=names)
        purified.save(out, source.model, force=force)
    except DivergenceError as error:
        raise _with_kept_state(error, store) from error
    except (MMDefenseError, OSError) as error:
        raise _with_remedy(error, store) from error
    if not purified.result.stopped:
        shutil.rmtree(store.folder, ignore_errors=True)
    return purified


def _identity(opened: Opened, defense: Defense) -> dict[str, Any]:
    """Return all that the result depends on, as plain values."""
    return {
        "defense": type(defense).__name__,
        **{f"setting {name}": value for name, value in plain(dataclasses.asdict(defense)).items()},
        "task": opened.task.name,
        "model": hash_weights(opened.adapter.model),
        "normalisation": plain([getattr(opened.adapter, name, None) for name in ("mean", "std")]),
        "data": opened.samples.fingerprint(),
        "mmdefense": __version__,
        "torch": str(torch.__version__),
    }


def _check_resumable(store: RunStore, resume: bool) -> None:
    if store.folder.exists() and not resume:
        raise BadInputError(
            f"{store.folder} holds an unfinished run; add --resume to go on with it, or remove "
            "that folder to start afresh"
        )


def _claim(store: RunStore, identity: dict[str, Any]) -> None:
    """Note whose states the store holds, or refuse those of another job."""
    kept = store.load(_IDENTITY)
    if kept is None:
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
            "its command, or remove that folder to start afresh"
        )


def _with_kept_state(error: DivergenceError, store: RunStore) -> DivergenceError:
    if error.state is None:
        return error
    path = store.folder / "last_good.safetensors"
    write_state(error.state, path)
    return DivergenceError(f"{error}; its weights are in {path}", error.state)


def _with_remedy(error: MMDefenseError | OSError, store: RunStore) -> MMDefenseError:
    """Keep states that can be gone on from, and say so; remove a store that holds none."""
    kept = [path for path in store.folder.iterdir() if path.stem != _IDENTITY]
    failure = _unwritable(store, error) if isinstance(error, OSError) else error
    if not kept:
        shutil.rmtree(store.folder, ignore_errors=True)
        return failure
    return type(failure)(f"{failure}; what was done is kept in {store.folder}: go on with --resume")


def _unwritable(store: RunStore, error: OSError) -> BadInputError:
    return BadInputError(f"{store.folder} cannot be written: {error.strerror or error}")


def evaluate_files(source: Source, attack: Attack[Any] | None = None) -> Evaluation:
    """Measure the model of ``source`` on its data and, where an attack is given, under it.

    Raises:
        BadInputError: If anything given cannot be used, or the attack is on another task.
        UnsupportedError: If a library is not installed, or no adapter accepts the model.
    """
    opened = source.open()
    task, data = opened.task, in_memory(opened.data)
    if attack is not None and attack.task != task.name:
        raise BadInputError(
            f"{type(attack).__name__} is an attack on {attack.task}, but the model is of "
            f"{task.name}; choose one of its own"
        )
    found = evaluate(opened.adapter, data, attack)
    if task.metric == found.metric:
        return found
    value = task.measure(opened.adapter, opened.adapter.samples(data))
    return dataclasses.replace(found, metric=task.metric, value=value)


def in_memory(samples: Any) -> Samples[Any]:
    """Return samples decoded, where they are read one by one."""
    return samples.in_memory() if hasattr(samples, "in_memory") else samples  # type: ignore[no-any-return]
