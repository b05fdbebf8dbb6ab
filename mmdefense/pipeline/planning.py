"""What a purification would do, and how long it would take: ``mmdefense purify --dry-run``."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmdefense.analysis.gather import SHARE, Level, most_seconds
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.data.batch import Samples, few, split
from mmdefense.defenses.base import Defense, TrainingDefense
from mmdefense.kernels.loop import mean_loss_gradient
from mmdefense.metrics.clean_data import doubts
from mmdefense.metrics.utility import check_utility
from mmdefense.pipeline.jobs import writing_seconds
from mmdefense.pipeline.scan import scan_loaded
from mmdefense.pipeline.sources import Source
from mmdefense.pipeline.vetting import open_vetted
from mmdefense.prepared import Prepared
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.run import Event

__all__ = ["Plan", "plan"]

_TRIAL = 8.0
"""Ours: seconds that the defense is tried for."""

_TRIED = 512
"""Ours: samples that it is tried on, at most."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a purification would do.

    Attributes:
        task: Name of the task.
        adapter: Class of the adapter.
        architecture: Class of the model.
        parameters: Number of weights.
        trains: What the defense trains, and how many of them.
        fit: Clean samples to learn from.
        holdout: Clean samples that are held out.
        defense: The defense with all its settings.
        seconds: About how long it takes, reading and writing included, evidence not.
        at_least: Whether it may take longer, since the trial did not come to its last stage.
        evidence: The level of evidence.
        evidence_seconds: How long that takes at most.
        memory: Peak of the memory after the trial, in bytes: of the GPU, or of this process.
        scan: What a look at the files and weights concludes; it is taken first, and in ``seconds``.
        doubts: What about the clean data is a reason to doubt the outcome, as a heuristic sees it.
    """

    task: str
    adapter: str
    architecture: str
    parameters: int
    trains: str
    fit: int
    holdout: int
    defense: Defense
    seconds: float
    at_least: bool = False
    evidence: Level = "none"
    evidence_seconds: float = 0.0
    memory: int
    scan: str = ""
    doubts: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the plan for a person."""
        takes = _duration(self.seconds, "at least" if self.at_least else "about")
        if more := getattr(self.defense, "restarts", 0):
            takes += f"; up to {1 + more} times as long where the rate has to be lowered"
        beyond = "none"
        if self.evidence != "none":
            beyond = f"{self.evidence}, {_duration(self.evidence_seconds, 'at most about')} more"
        return [
            f"task      {self.task}, read by {self.adapter}",
            f"model     {self.architecture}, {self.parameters:,} weights",
            f"data      {self.fit + self.holdout} clean samples: {self.fit} to fit, "
            f"{self.holdout} held out",
            *(f"note      {doubt} (a heuristic)" for doubt in self.doubts),
            *([f"scan      {self.scan}"] if self.scan else []),
            f"defense   {self.defense}",
            f"trains    {self.trains}",
            f"time      {takes}",
            f"evidence  {beyond}",
            f"memory    {self.memory / 2**30:.2f} GiB at its peak",
            "nothing was written",
        ]


def plan(
    source: Source,
    defense: Defense,
    evidence: Level = "fast",
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Return what ``defense`` would do to a model; it is tried for some seconds on a copy.

    The files and weights are scanned as they would be.

    Args:
        source: Model and clean data.
        defense: The defense with its settings.
        evidence: The level of evidence.
        clock: Returns the time in seconds.

    Raises:
        BadInputError: If the clean data or the model cannot be used.
        LowUtilityError: If the model does not work on the data as it was read.
        UnsupportedError: If the defense cannot serve this model.
    """
    begin = clock()
    vetted = open_vetted(source)
    prepared = vetted.opened.prepare()
    model, adapter, samples = prepared.model, prepared.adapter, prepared.samples
    check_utility(prepared, accept=source.accept_low_utility)
    scanned = scan_loaded(source.model, model, findings=vetted.findings)
    read, begin = clock() - begin, clock()
    hash_weights(model)
    written = writing_seconds(clock() - begin)
    gradient = _gradient_seconds(adapter, samples, clock)
    seconds, at_least = _seconds(prepared, defense, gradient, clock)
    fit, held = split(samples, defense.holdout, defense.seed)
    return Plan(
        task=vetted.opened.task.name,
        adapter=type(adapter).__name__,
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        trains=defense.trains(adapter.fork()),
        fit=len(fit),
        holdout=len(held),
        defense=defense,
        seconds=read + seconds + written,
        at_least=at_least,
        evidence=evidence,
        evidence_seconds=(
            SHARE * seconds if evidence == "fast" else most_seconds(len(samples), gradient)
        ),
        memory=_peak(next(model.parameters()).device),
        scan=scanned.verdict.text,
        doubts=doubts(adapter, samples),
    )


def _gradient_seconds(
    adapter: TaskAdapter[Any], samples: Samples[Any], clock: Callable[[], float]
) -> float:
    """Return about how long the gradient of one sample's loss takes, among eight or alone."""
    weights = [p for p in adapter.model.parameters() if p.requires_grad]
    took = 0.0
    for count in (1, 8):
        some = few(samples, count)
        begin = clock()
        mean_loss_gradient(adapter, some.take(torch.arange(len(some))), weights)
        took = (clock() - begin) / len(some)
        if took > 0.25:
            break
    return took


def _seconds(
    prepared: Prepared[Any], defense: Defense, gradient: float, clock: Callable[[], float]
) -> tuple[float, bool]:
    """Return about how long a purification takes, and whether it may take longer.

    The defense is run for some seconds, and the stage in which it is cut off taken to go on as it
    began. Where one update alone would take longer, nothing is tried.
    """
    samples = prepared.samples
    steps, batch = getattr(defense, "steps", None) or 0, getattr(defense, "batch_size", None) or 32
    if batch * gradient > _TRIAL:
        return (steps * batch + len(samples)) * gradient, True
    part = few(samples, _TRIED)
    heard = _Heard(clock)
    once = {"restarts": 0} if isinstance(defense, TrainingDefense) else {}
    trial = dataclasses.replace(defense, **once)
    limit = Deadline(clock() + _TRIAL, clock)
    some = dataclasses.replace(prepared, samples=part)
    result = trial.purify(some, progress=heard, max_seconds=limit)
    settings = {v for v in result.settings.values() if type(v) is int and v > 1}
    stages = heard.stages()
    cut = _cut(stages) if result.stopped else None
    total = 0.0
    for stage in stages:
        # A stage of as many steps as a setting says takes as long with any number of samples.
        total += stage.seconds * (1 if stage.total in settings else len(samples) / len(part))
        if stage is cut and stage.step:
            total += stage.seconds * (stage.total / stage.step - 1)
    return total, bool(result.stopped) and (cut is None or cut.total != steps)


def _cut(stages: Sequence[_Stage]) -> _Stage | None:
    """Return the stage in which a trial was cut off; none where it was between two."""
    unfinished = [stage for stage in stages if stage.step < stage.total]
    return unfinished[-1] if unfinished else None


@dataclass
class _Stage:
    """A stage of a trial: how far it came, and in how many seconds."""

    name: str
    step: int = 0
    total: int = 0
    seconds: float = 0.0


@dataclass
class _Heard:
    """Listens to a trial, and notes when each stage begins and ends."""

    clock: Callable[[], float]
    moments: list[tuple[float, Event]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if not event.note:
            self.moments.append((self.clock(), event))

    def stages(self) -> list[_Stage]:
        """Return the stages in order; each takes until the next one begins."""
        found: list[_Stage] = []
        before = None
        for moment, event in self.moments:
            if found and before is not None:
                found[-1].seconds += moment - before
            if not found or found[-1].name != event.stage:
                found.append(_Stage(event.stage))
            found[-1].step, found[-1].total = event.step, event.total
            before = moment
        return found


def _peak(device: torch.device) -> int:
    """Return the peak of the memory in bytes: of a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float, word: str = "about") -> str:
    """Return a time in words, rounded."""
    if seconds < 90:
        return f"{word} {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{word} {round(seconds / 60)} min"
    return f"{word} {seconds / 3600:.1f} h"
