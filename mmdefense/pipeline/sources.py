"""A model and its data: where they are, and how they are read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from mmdefense import registry
from mmdefense.checkpoints.huggingface import named_base
from mmdefense.checkpoints.models import load_model
from mmdefense.errors import BadInputError
from mmdefense.prepared import Prepared, prepare
from mmdefense.protocol import ReadingAdapter, Task, TaskAdapter, missing_members, traits
from mmdefense.settings import checked_value

__all__ = ["AUTO", "NOT_WRITTEN", "Opened", "Source", "usable_device"]

AUTO = "auto"
"""In place of a task name: use the task of the model's adapter."""

NOT_WRITTEN = {"split", "stated", "fit", "fill", "processor", "tokenizer", "example"}
"""Options that only Python code can give."""


@dataclass(frozen=True)
class Opened:
    """A model and its data, as read.

    Attributes:
        task: The task of the model.
        adapter: The adapter around the model.
        data: The data as read by the task, or as given.
        finite: Whether the weights are known to be finite.
    """

    task: Task
    adapter: TaskAdapter[Any]
    data: Any
    finite: bool = False

    def prepare(self, *, to_learn: bool = True) -> Prepared[Any]:
        """Return model and data, validated; see :func:`mmdefense.prepared.prepare`."""
        return prepare(self.adapter, self.data, finite=self.finite, to_learn=to_learn)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model and its data are, and how they are read.

    Attributes:
        model: A Hugging Face folder or id, or a state-dict file; or a module, or an adapter around
            one, which is not moved.
        data: A folder, a file, or the name of a data set of the task; or samples in memory.
        task: The name of a task, or :data:`AUTO` for that of the model.
        arch: ``module:callable`` that builds the model for a state dict.
        weights: Key of the weights within a checkpoint; see
            :func:`mmdefense.checkpoints.models.load_model`.
        split: ``"train"`` or ``"test"``, if the data is split.
        reading: Reading options by name: options of the task's ``load``, such as ``image_size``,
            ``frames`` or ``points``, and of the adapter, such as ``mean`` or ``max_length``. Others
            are inferred from the model or the data.
        device: For example ``"cpu"`` or ``"cuda"``.
        accept_low_utility: Whether to continue if the model performs too poorly on the data as
            read.
        accept_findings: Whether to continue if the scan of the model's files has high-level
            findings; see :func:`mmdefense.pipeline.vetting.open_vetted`.
        also_read: Further files that values of ``reading`` come from, such as class names.
    """

    model: Any
    data: Any
    task: str = AUTO
    arch: str | None = None
    weights: str | None = None
    split: str = "train"
    reading: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    accept_low_utility: bool = False
    accept_findings: bool = False
    also_read: tuple[Path, ...] = ()

    def inputs(self) -> list[str | Path]:
        """Return the paths to read: the model, its base model, the data and the class names."""
        given = [self.model, self.data, *self.reading.values(), *self.also_read]
        paths = [one for one in given if isinstance(one, str | Path) and os.path.exists(one)]
        base = named_base(self.model) if isinstance(self.model, str | Path) else None
        return paths if base is None else [*paths, base]

    def open(self) -> Opened:
        """Return the model in its adapter, and the data as read by the task.

        Raises:
            BadInputError: If either cannot be read, they do not fit the task, or an option is
                unknown.
            UnsupportedError: If a library is not installed, or no adapter accepts the model.
        """
        device = usable_device(self.device)
        asked = None if self.task == AUTO else self.task
        if asked is not None:
            registry.load("tasks", asked)  # fails on a misspelt name before loading the model
        model: Any = self.model
        if isinstance(model, str | Path):
            model = load_model(model, arch=self.arch, task=asked, weights=self.weights)
            model = model.to(device)
        kind = registry.adapter_for(model, asked) if isinstance(model, nn.Module) else type(model)
        task = registry.load("tasks", asked or _task_of(kind))()
        of_task, of_adapter = _split_options(self.reading, task, kind)
        if isinstance(model, nn.Module):
            adapter: TaskAdapter[Any] = kind(model, **of_adapter)
        else:
            _refuse(of_adapter, "an adapter that is given")
            adapter = model
        if isinstance(self.data, str | Path):
            stated = adapter.reading() if not missing_members(adapter, ReadingAdapter) else {}  # type: ignore[attr-defined]
            data = task.load(self.data, split=self.split, stated=stated, **of_task)
        else:
            _refuse(of_task, "samples in memory")
            data = self.data
        return Opened(task, adapter, data, finite=isinstance(self.model, str | Path))


def _task_of(kind: Any) -> str:
    """Return the name of an adapter's task.

    Raises:
        BadInputError: If the adapter does not state it.
    """
    named = traits(kind).task
    if named is None:
        raise BadInputError(f"{kind.__name__} does not state its task; set task=")
    return named


def _refuse(options: Mapping[str, Any], given: str) -> None:
    for name, value in options.items():
        raise BadInputError(f"{name}={value} has no effect on {given}; leave it out")


def _split_options(
    given: Mapping[str, Any], task: Task, kind: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the task's ``load``, and those of the adapter.

    Raises:
        BadInputError: If one belongs to neither, or is of the wrong kind.
    """
    reads, takes = (_options(call) for call in (task.load, kind.__init__))
    known = takes | reads  # options of both go to the task
    for name, value in given.items():
        if name not in known:
            raise BadInputError(
                f"{task.name} has no option {name!r}; known options are {', '.join(sorted(known))}"
            )
        checked_value(name, value, known[name], task.name)
    of_task = {name: value for name, value in given.items() if name in reads}
    return of_task, {name: value for name, value in given.items() if name not in reads}


def _options(call: Any) -> dict[str, Any]:
    """Return the types of a function's options that can be given as text, by name."""
    hints = get_type_hints(call)
    names = [
        p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    return {name: hints[name] for name in names if name not in NOT_WRITTEN}


def usable_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        BadInputError: If it is not usable here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on the device "meta"
    except Exception as error:  # each backend raises its own kind
        raise BadInputError(f"device {name!r} is not usable here; try --device cpu") from error
    return device
