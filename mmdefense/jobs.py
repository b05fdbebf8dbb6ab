"""From files to files: what the command line does, as functions."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdefense import __version__, registry
from mmdefense.attacks.base import Attack
from mmdefense.batches import LabelledSamples, Samples
from mmdefense.checkpoints.folders import check_replaceable
from mmdefense.checkpoints.models import class_names, load_model, load_processor
from mmdefense.checkpoints.runs import RunStore
from mmdefense.checkpoints.weights import hash_weights, write_state
from mmdefense.defenses.base import Defense
from mmdefense.errors import BadInputError, DivergenceError, MMDefenseError
from mmdefense.evaluation.measurement import Evaluation, evaluate
from mmdefense.kernels.run import Progress
from mmdefense.protocol import TaskAdapter
from mmdefense.purification import Purification, purify
from mmdefense.report.encoding import plain

__all__ = ["Source", "evaluate_files", "partial_folder", "purify_files"]

_IDENTITY = "job"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model and its data are, and how they are read.

    Attributes:
        model: A Hugging Face folder or id, or a state-dict file.
        data: A folder, an archive, or a name that the task knows.
        arch: ``module:callable`` that builds the model of a state dict.
        split: ``"train"`` or ``"test"``, where the data is split.
        mean: Per-channel mean that the model's inputs are normalised by.
        std: Per-channel deviation of the same.
        image_size: Side in pixels that images are resized to.
        channels: 1 or 3; by default the first image's.
        device: For example ``"cpu"`` or ``"cuda"``.
        task: The name of a task.
    """

    model: str
    data: str
    arch: str | None = None
    split: str = "train"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    channels: int | None = None
    device: str = "cpu"
    task: str = "image-classification"

    def open(self) -> tuple[TaskAdapter[Any], Samples[Any]]:
        """Return the model in its adapter, and the data as it reads them, both checked.

        Raises:
            BadInputError: If either cannot be read, or they do not fit each other.
            UnsupportedError: If a library is not installed, or no adapter accepts the model.
        """
        device = _device(self.device)
        task = registry.load("tasks", self.task)()
        model = load_model(self.model, arch=self.arch)
        data = task.load(
            self.data,
            split=self.split,
            image_size=self.image_size,
            channels=self.channels,
            classes=class_names(model),
        )
        options: dict[str, Any] = {
            "mean": self.mean,
            "std": self.std,
            "processor": load_processor(self.model),
        }
        given = {name: value for name, value in options.items() if value is not None}
        adapter = registry.adapt(model.to(device), **given)
        return adapter, adapter.samples(data)


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
    command: str = "",
) -> Purification:
    """Purify the model of ``source`` into the folder ``out``.

    States are kept in the folder ``out.partial``; after a kill the same call with ``resume`` goes
    on from them to the same result. It is removed when ``out`` is there, and where there is
    nothing to keep.

    Args:
        source: Model and clean data.
        defense: The defense with its settings.
        out: The folder to make.
        resume: Whether an unfinished run of the same call goes on.
        force: Whether an earlier output at ``out`` is replaced.
        progress: Called with each :class:`~mmdefense.kernels.run.Event`.
        command: For the record, the command line.

    Raises:
        BadInputError: If anything given cannot be used; nothing is written.
        UnsupportedError: If the defense cannot serve this model.
        DivergenceError: If a loss stopped being finite; the last good weights are kept.
    """
    check_replaceable(out, force)
    store = RunStore(partial_folder(out))
    _check_resumable(store, resume)
    adapter, samples = source.open()
    _claim(store, _identity(adapter, samples, defense))
    try:
        purified = purify(adapter, samples, defense, progress=progress, store=store)
        names = {"model": source.model, "data": source.data, "command": command}
        purified = dataclasses.replace(purified, names=names)
        purified.save(out, source.model, force=force)
    except DivergenceError as error:
        raise _with_kept_state(error, store) from error
    except (MMDefenseError, OSError) as error:
        raise _with_remedy(error, store) from error
    shutil.rmtree(store.folder, ignore_errors=True)
    return purified


def _identity(adapter: TaskAdapter[Any], samples: Samples[Any], defense: Defense) -> dict[str, Any]:
    """Return all that the result depends on, as plain values."""
    return {
        "defense": type(defense).__name__,
        **{f"setting {name}": value for name, value in plain(dataclasses.asdict(defense)).items()},
        "model": hash_weights(adapter.model),
        "normalisation": plain([getattr(adapter, name, None) for name in ("mean", "std")]),
        "data": samples.fingerprint(),
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
        BadInputError: If anything given cannot be used.
        UnsupportedError: If a library is not installed, or no adapter accepts the model.
    """
    adapter, samples = source.open()
    return evaluate(adapter, in_memory(samples), attack)


def in_memory(samples: Any) -> LabelledSamples:
    """Return labelled samples decoded, where they are read image by image."""
    return samples.in_memory() if hasattr(samples, "in_memory") else samples  # type: ignore[no-any-return]
