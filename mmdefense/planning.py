"""What a purification would do, and how long it would take: ``mmdefense purify --dry-run``."""

from __future__ import annotations

import copy
import dataclasses
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdefense.batches import split
from mmdefense.checkpoints.runs import RunStore
from mmdefense.defenses.base import Defense, Result, TrainingDefense
from mmdefense.scanning import scan_loaded
from mmdefense.sources import Opened, Source

__all__ = ["Plan", "plan"]

_FEW, _MORE = 2, 6
"""Updates of the runs that are timed."""

_LONGEST = 60.0
"""Seconds after which the first of them is cut off."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a purification would do.

    Attributes:
        task: Name of the task.
        adapter: Class of the adapter.
        architecture: Class of the model.
        parameters: Number of weights.
        trained: Number of values that are trained; none where the defense trains none.
        fit: Clean samples to learn from.
        holdout: Clean samples that are held out.
        defense: The defense with all its settings.
        seconds: About how long it takes; none where a few updates do not tell.
        memory: Peak of the memory after a few updates, in bytes: of the GPU, or of this process.
        scan: What a look at the files and weights concludes; it is taken first, and in ``seconds``.
    """

    task: str
    adapter: str
    architecture: str
    parameters: int
    trained: int | None
    fit: int
    holdout: int
    defense: Defense
    seconds: float | None
    memory: int
    scan: str = ""

    def lines(self) -> list[str]:
        """Return the plan for a person."""
        trains = "no values" if self.trained is None else f"{self.trained:,} values"
        takes = "not told by a few updates" if self.seconds is None else _duration(self.seconds)
        if more := getattr(self.defense, "restarts", 0):
            takes += f"; up to {1 + more} times as long where the rate has to be lowered"
        return [
            f"task      {self.task}, read by {self.adapter}",
            f"model     {self.architecture}, {self.parameters:,} weights",
            f"data      {self.fit + self.holdout} clean samples: {self.fit} to fit, "
            f"{self.holdout} held out",
            *([f"scan      {self.scan}"] if self.scan else []),
            f"defense   {self.defense}",
            f"trains    {trains}",
            f"time      {takes}",
            f"memory    {self.memory / 2**30:.2f} GiB at its peak",
            "nothing was written",
        ]


def plan(source: Source, defense: Defense) -> Plan:
    """Return what ``defense`` would do to a model; it is tried for a few updates on a copy.

    The files and weights are scanned as they would be.

    Raises:
        BadInputError: If the clean data or the model cannot be used.
        UnsupportedError: If the defense cannot serve this model.
    """
    opened = source.open()
    adapter, samples = opened.adapter, opened.samples
    begin = time.perf_counter()
    scanned = scan_loaded(source.model, adapter.model)
    looked = time.perf_counter() - begin
    fit, held = split(samples, defense.holdout, defense.seed)
    seconds = _seconds(opened, defense)
    return Plan(
        task=opened.task.name,
        adapter=type(adapter).__name__,
        architecture=type(adapter.model).__name__,
        parameters=sum(p.numel() for p in adapter.model.parameters()),
        trained=(defense.trained(adapter.fork()) if isinstance(defense, TrainingDefense) else None),
        fit=len(fit),
        holdout=len(held),
        defense=defense,
        seconds=None if seconds is None else seconds + looked,
        memory=_peak(next(adapter.model.parameters()).device),
        scan=scanned.verdict.text,
    )


@dataclass(frozen=True)
class _Memory(RunStore):
    """A store that keeps states in memory."""

    folder: Path = Path()
    states: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, name: str, state: dict[str, Any]) -> None:
        self.states[str(self.folder / name)] = copy.deepcopy(state)

    def load(self, name: str) -> dict[str, Any] | None:
        return copy.deepcopy(self.states.get(str(self.folder / name)))


def _seconds(opened: Opened, defense: Defense) -> float | None:
    """Return about how long a purification takes.

    A run of few updates is resumed twice: once at its end, for what every run costs that has
    nothing left to train, and once with more updates.
    """
    store = _Memory()

    def timed(trial: Defense) -> tuple[float, Result]:
        begin = time.perf_counter()
        result = trial.purify(opened.adapter, opened.samples, store=store, max_seconds=_LONGEST)
        return time.perf_counter() - begin, result

    steps = getattr(defense, "steps", None)
    if not isinstance(steps, int) or steps <= _MORE:
        whole, result = timed(defense)
        return None if result.stopped else whole
    few, result = timed(_shortened(defense, _FEW))
    if result.stopped:
        return None
    again, _ = timed(_shortened(defense, _FEW))
    more, _ = timed(_shortened(defense, _MORE))
    return few + (steps - _FEW) * max(0.0, more - again) / (_MORE - _FEW)


def _shortened(defense: Defense, steps: int) -> Defense:
    once = {"restarts": 0} if isinstance(defense, TrainingDefense) else {}
    return dataclasses.replace(defense, **{"steps": steps}, **once)


def _peak(device: torch.device) -> int:
    """Return the peak of the memory in bytes: of a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float) -> str:
    """Return a time in words, rounded."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"
