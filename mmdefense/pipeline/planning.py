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

_TRIAL_SECONDS = 8.0
"""Ours: duration of the trial."""

_TRIAL_SAMPLES = 512
"""Ours: largest number of samples in the trial."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a purification would do.

    Attributes:
        task: Name of the task.
        adapter: Class of the adapter.
        architecture: Class of the model.
        parameters: Number of weights.
        trains: What the defense trains, and how many values.
        fit: Number of clean samples to train on.
        holdout: Number of held-out clean samples.
        defense: The defense with all its settings.
        seconds: Estimated duration, including reading and writing, but not the evidence.
        at_least: Whether ``seconds`` is a lower bound, because the trial did not reach the last
            stage.
        evidence: The level of evidence.
        evidence_seconds: Upper bound on the duration of the evidence.
        memory: Peak memory after the trial, in bytes: of the GPU, or of this process.
        scan: Verdict of the scan of files and weights, which runs first and is included in
            ``seconds``.
        doubts: Reasons to doubt the clean data, from a heuristic.
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
        """Return the plan as lines of text."""
        takes = _duration(self.seconds, "at least" if self.at_least else "about")
        if more := getattr(self.defense, "restarts", 0):
            takes += (
                f" a run; the rate is halved, up to {more} times, until the utility guard passes, "
                "and with few held-out samples it also runs on up to four other splits"
            )
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
    """Plan a purification, based on a trial of a few seconds on a copy of the model.

    Files and weights are scanned as before a purification.

    Args:
        source: Model and clean data.
        defense: The defense with its settings.
        evidence: The level of evidence.
        clock: Returns the time in seconds.

    Raises:
        BadInputError: If the clean data or the model is not usable.
        LowUtilityError: If the model performs too poorly on the data as read.
        UnsupportedError: If the defense does not support this model.
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
    """Estimate the seconds of a gradient per sample, with a batch of eight or one."""
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
    """Return the estimated duration of a purification, and whether it may take longer.

    The defense runs for a few seconds, and the stage in which time runs out is extrapolated. If a
    single update would take longer, there is no trial.
    """
    samples = prepared.samples
    steps, batch = getattr(defense, "steps", None) or 0, getattr(defense, "batch_size", None) or 32
    if batch * gradient > _TRIAL_SECONDS:
        return (steps * batch + len(samples)) * gradient, True
    part = few(samples, _TRIAL_SAMPLES)
    timer = _StageTimer(clock)
    without_restarts = {"restarts": 0} if isinstance(defense, TrainingDefense) else {}
    # Whether the guard will restart or cross-validate is unknown.
    trial = dataclasses.replace(defense, max_utility_drop=1.0, **without_restarts)
    limit = Deadline(clock() + _TRIAL_SECONDS, clock)
    some = dataclasses.replace(prepared, samples=part)
    result = trial.purify(some, progress=timer, max_seconds=limit)
    settings = {v for v in result.settings.values() if type(v) is int and v > 1}
    stages = timer.stages()
    cut = _cut(stages) if result.stopped else None
    total = 0.0
    for stage in stages:
        # A stage with a fixed number of steps takes equally long with any number of samples.
        total += stage.seconds * (1 if stage.total in settings else len(samples) / len(part))
        if stage is cut and stage.step:
            total += stage.seconds * (stage.total / stage.step - 1)
    return total, bool(result.stopped) and (cut is None or cut.total != steps)


def _cut(stages: Sequence[_Stage]) -> _Stage | None:
    """Return the stage in which a trial ran out of time; None if between two stages."""
    unfinished = [stage for stage in stages if stage.step < stage.total]
    return unfinished[-1] if unfinished else None


@dataclass
class _Stage:
    """A stage of a trial: its progress and duration."""

    name: str
    step: int = 0
    total: int = 0
    seconds: float = 0.0


@dataclass
class _StageTimer:
    """Records the events of a trial with their times."""

    clock: Callable[[], float]
    events: list[tuple[float, Event]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if not event.note:
            self.events.append((self.clock(), event))

    def stages(self) -> list[_Stage]:
        """Return the stages in order; each lasts until the next one begins."""
        found: list[_Stage] = []
        before = None
        for moment, event in self.events:
            if found and before is not None:
                found[-1].seconds += moment - before
            if not found or found[-1].name != event.stage:
                found.append(_Stage(event.stage))
            found[-1].step, found[-1].total = event.step, event.total
            before = moment
        return found


def _peak(device: torch.device) -> int:
    """Return the peak memory in bytes: of a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float, word: str = "about") -> str:
    """Return a rounded duration as text."""
    if seconds < 90:
        return f"{word} {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{word} {round(seconds / 60)} min"
    return f"{word} {seconds / 3600:.1f} h"
