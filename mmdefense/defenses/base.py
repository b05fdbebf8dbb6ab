"""Base classes of the defenses: settings, ``purify``, and restarts at lower learning rates."""

from __future__ import annotations

import dataclasses
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast, final

import torch
from torch import nn

from mmdefense.checkpoints.runs import RunStore
from mmdefense.data.batch import Batch, Samples, Views, folds
from mmdefense.defenses.guard import Guard, State, at_rate
from mmdefense.defenses.judging import Candidate, Chosen, Fold, Judging
from mmdefense.defenses.outcome import Choice, TriggerSearch
from mmdefense.errors import DivergenceError, UnsupportedError, one_line
from mmdefense.kernels.hooks import recomputed
from mmdefense.kernels.precision import half_types, rounded, typed_like
from mmdefense.plots.base import Plot
from mmdefense.prepared import Prepared, prepare
from mmdefense.protocol import TaskAdapter, ViewingAdapter, missing_members, traits
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.memory import is_out_of_memory, roomy
from mmdefense.runtime.parts import Parts
from mmdefense.runtime.processes import Processes, together
from mmdefense.runtime.run import Event, OutOfTime, Progress, Run, copy_state
from mmdefense.settings import (
    BatchSize,
    NotNegative,
    OpenShare,
    Positive,
    Seed,
    Share,
    Whole,
    check_settings,
)
from mmdefense.shown import Shown
from mmdefense.training import Training

__all__ = [
    "Defense",
    "Purifying",
    "Result",
    "TrainingDefense",
    "versions",
]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """A purified model and the record of how it was obtained.

    Attributes:
        model: The purified copy.
        adapter: An adapter that wraps it; for a half-precision model, it wraps a float32 copy with
            the same values.
        defense: Name of the defense's class.
        settings: All settings of the defense, including the seed.
        guard: The verdict of the utility guard.
        history: Reported values in chronological order, each with its stage and step.
        plots: Plots for the report.
        seconds: Wall-clock time of the purification, including parts before an interruption.
        versions: Software versions and the device.
        data: Fingerprint and size of the clean samples.
        stopped: The stage in which the time limit was reached; empty if it was not.
        threads: Number of CPU threads in each part of the run.
        unchanged: Why no weight or buffer changed; empty if at least one did.
        search: Results of the trigger search; None if there was no search.
        choice: Which defense was chosen, and why; None if there was no choice.
    """

    model: nn.Module
    adapter: Any
    defense: str
    settings: Mapping[str, Any]
    guard: Guard
    history: list[dict[str, Any]]
    plots: tuple[Plot, ...]
    seconds: float
    versions: Mapping[str, str]
    data: Mapping[str, Any]
    stopped: str = ""
    threads: tuple[int, ...] = ()
    unchanged: str = ""
    search: TriggerSearch | None = None
    choice: Choice | None = None


@dataclass
class Purifying(Generic[B]):
    """What a defense works on: a private copy of the model and the splits of the clean data.

    Attributes:
        adapter: Wraps a private copy of the model, which is edited in place.
        fit: Samples to train on.
        holdout: Held-out samples for model selection; disjoint from ``fit``.
        folds: Further splits of the clean data, for the guard; may be empty.
        guard: The guard's verdict, set by a defense that delegates to others already judged.
        run: Seed, progress, snapshots and store.
        plots: Plots for the report, filled by the defense.
        search: Results of the trigger search, if there was one.
        choice: Which defense was chosen, and why, if there were several.
        why_unchanged: Why the defense changed nothing, if known.
        stopped: The stage in which the time limit was reached; empty if it was not.
        types: Half-precision dtypes that weights are rounded to at the end, by name.
    """

    adapter: TaskAdapter[B]
    fit: Samples[B]
    holdout: Samples[B]
    run: Run
    plots: list[Plot] = field(default_factory=list)
    search: TriggerSearch | None = None
    choice: Choice | None = None
    why_unchanged: str = ""
    stopped: str = ""
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    folds: Sequence[tuple[Samples[B], Samples[B]]] = ()
    guard: Guard | None = None

    def on(self, fit: Samples[B], holdout: Samples[B], run: Run) -> Purifying[B]:
        """Return a copy with other splits of the clean data and another run."""
        return Purifying(self.adapter, fit, holdout, run, types=self.types)

    def adopt(self, other: Purifying[B]) -> None:
        """Copy the results of the run whose model is returned."""
        self.plots, self.search, self.choice = other.plots, other.search, other.choice
        self.why_unchanged = other.why_unchanged


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A purification method. Its dataclass fields are its complete configuration.

    Attributes:
        seed: Seed of all random numbers; the same seed gives the same result.
        max_utility_drop: Largest allowed drop of the task metric on held-out data, in ``[0, 1]``.
        holdout: Fraction of the clean data held out for model selection and the guard.
    """

    requires: ClassVar[type] = TaskAdapter
    can_split: ClassVar[bool] = False  # whether weights can be sharded over processes in training

    seed: Seed = 0
    max_utility_drop: Share = 0.02
    holdout: OpenShare = 0.2

    def __post_init__(self) -> None:
        check_settings(self)

    def trains(self, adapter: TaskAdapter[Any]) -> str:
        """Describe what is trained and how many values, for the plan of a dry run."""
        return "nothing"

    @final
    def purify(
        self,
        model: TaskAdapter[B] | Prepared[B],
        clean: Any = None,
        *,
        progress: Progress | None = None,
        store: RunStore | None = None,
        max_seconds: float | Deadline | None = None,
        processes: Processes | None = None,
    ) -> Result:
        """Purify a copy of a model; the given model is not modified.

        A half-precision model is purified in float32, because rounding would lose small updates,
        and returned in its original dtype; the guard evaluates the rounded weights.

        Args:
            model: The model in its adapter; or model and clean data, validated by
                :func:`~mmdefense.prepared.prepare`.
            clean: With an adapter, clean samples in any form that ``adapter.samples`` reads.
            progress: Called with each :class:`~mmdefense.runtime.run.Event`.
            store: Where to save checkpoints, so that repeating the call resumes an interrupted run.
            max_seconds: Time limit in seconds, or a deadline; when it is reached, the best state so
                far is returned. It is checked after each update, and training ends early enough to
                leave time for the utility guard.
            processes: The processes that compute the result together; each makes the same call. By
                default only this process.

        Raises:
            UnsupportedError: If the adapter lacks members that this defense requires, or if the
                defense cannot run in several processes.
            BadInputError: If the clean data or the model is not usable.
            DivergenceError: If the loss became non-finite.
        """
        adapter = model.adapter if isinstance(model, Prepared) else model
        if missing := missing_members(adapter, self.requires):
            raise UnsupportedError(
                f"{type(self).__name__} needs a {self.requires.__name__}; "
                f"{type(adapter).__name__} lacks {', '.join(missing)}"
            )
        processes = processes or Processes()
        if processes.count > 1 and not isinstance(self, TrainingDefense):
            raise UnsupportedError(
                f"--accelerate is for defenses that train, such as fip; {type(self).__name__} "
                "runs in one process: leave --accelerate out"
            )
        if processes.splits and not self.can_split:
            raise UnsupportedError(
                f"{type(self).__name__} needs whole weights: gradients of sharded ones can be "
                "neither masked nor differentiated again; leave out --shard, or use fine-tuning"
            )
        deadline = processes.deadline(Deadline.after(max_seconds))
        begin = deadline.clock()
        prepared = model if isinstance(model, Prepared) else prepare(model, clean)
        (fit, held), *others = folds(prepared.samples, self.holdout, self.seed)
        parts = Parts(deadline.clock, begin)
        run = Run(seed=self.seed, store=processes.store(store), deadline=deadline, parts=parts)
        if progress is not None:
            run.progress = progress
        given = prepared.model
        work = Purifying(
            prepared.adapter.fork(), fit, held, run, types=half_types(given), folds=others
        )
        with together(processes):
            guard = self.attempt(work)
        for module, one in zip(work.adapter.model.modules(), given.modules(), strict=True):
            module.training = one.training
        purified = typed_like(work.adapter.model, given)
        return Result(
            model=purified,
            adapter=work.adapter,
            defense=type(self).__name__,
            settings=dataclasses.asdict(self),
            guard=guard,
            history=run.history,
            plots=tuple(work.plots),
            seconds=parts.seconds,
            versions=versions(),
            data={"fingerprint": prepared.fingerprint, "samples": len(prepared.samples)},
            stopped=work.stopped,
            threads=tuple(parts.threads),
            unchanged=self.why_unchanged(work, given, purified),
            search=work.search,
            choice=work.choice,
        )

    def why_unchanged(self, work: Purifying[Any], given: nn.Module, purified: nn.Module) -> str:
        """Return why no weight or buffer changed; empty if at least one did."""
        if not _same(given, purified):
            return ""
        if work.why_unchanged:
            return work.why_unchanged
        if work.stopped:
            return f"time ran out in {work.stopped}"
        if getattr(self, "steps", None) == 0:
            return "steps=0"
        rounding = ", or its changes were lost in rounding" if work.types else ""
        return f"{type(self).__name__} changed no weight{rounding}"

    @final
    def attempt(self, work: Purifying[Any]) -> Guard:
        """Run on ``work`` until its deadline, and load the state that the guard chose.

        Raises:
            DivergenceError: If the loss became non-finite at every learning rate.
        """
        work.fit = self._viewed(work, work.fit)
        recompute = getattr(self, "gradient_checkpointing", False)
        activations = recomputed(work.adapter.model) if recompute else nullcontext()
        with roomy(work.run.room), _explained_out_of_memory(), activations:
            deadline, begin = work.run.deadline, work.run.deadline.clock()
            work.run.progress(Event("utility before", 0, 1))
            given = copy_state(work.adapter.model)
            others = [Fold(self._viewed(work, fit), held) for fit, held in work.folds]
            judging = Judging(work, given, self.max_utility_drop, deadline, others)
            work.run.progress(Event("utility before", 1, 1))
            work.run.deadline = _before_the_guard(deadline, deadline.clock() - begin)
            self._run_until_kept(work, given, judging)
            chosen = judging.chosen
            assert chosen is not None
            work.adapter.model.load_state_dict(rounded(chosen.state, work.types))
        if chosen.part is not work:
            work.run.adopt(at_rate(chosen.guard.rate), chosen.part.run)
            work.adopt(chosen.part)
        return replace(chosen.guard, metric=traits(work.adapter).score_name)

    def _viewed(self, work: Purifying[B], samples: Samples[B]) -> Samples[B]:
        views: Views | None = getattr(self, "views", None)
        return samples if views is None else viewed(work.adapter, samples, views)

    def _run_until_kept(self, work: Purifying[Any], given: State, judging: Judging) -> None:
        """Try decreasing learning rates until a state meets the utility bound.

        The first rate comes from :meth:`begins`. At each rate the final state is tried first, then
        interpolations between the given and the final state, down to 60 % of the way. If none of
        them meets the bound, or the loss became non-finite, the next rate comes from
        :meth:`milder`. Last come the snapshots that the defense saved at the first rate, latest
        first, and the remaining interpolations at that rate.

        Args:
            work: What the defense works on at the full rate.
            given: The state of the given model.
            judging: Judges the states and keeps the best.

        Raises:
            DivergenceError: If the loss became non-finite at every learning rate.
        """
        defense: Defense | None = self
        rate, failure = 1.0, None
        ended: list[tuple[Purifying[Any], float, State]] = []
        try:
            defense, rate = self.begins(work)
        except OutOfTime as over:
            work.stopped = str(over)
            judging.settles(work, rate, [Candidate(f"{over}, when time ran out", given, 0.0)])
            return
        part = work
        while defense is not None and not work.stopped:
            if ended or failure:
                part = work.on(work.fit, work.holdout, work.run.milder(at_rate(rate)))
                why = "the loss stopped being finite" if failure else "too much utility is lost"
                note = f"{why}; restarting {at_rate(rate)}"
                work.run.progress(Event(at_rate(rate), 0, 1, note=note))
                work.adapter.model.load_state_dict(given)
            try:
                defense._run(part)
                failure = None
            except OutOfTime as over:
                work.stopped = str(over)
            except DivergenceError as error:
                failure = error
            if failure is None and not (ended and work.stopped):
                final = copy_state(work.adapter.model)
                if part.guard is not None:
                    judging.chosen = Chosen(part.guard, part, final)
                    return
                ended.append((part, rate, final))
                label = f"{work.stopped}, when time ran out" if work.stopped else "final"
                near = Candidate.line(given, final, (0.9, 0.8, 0.7, 0.6))
                if judging.settles(
                    part, rate, chain([Candidate(label, final, 1.0)], near), defense._run
                ):
                    return
            defense, rate = defense.milder(), rate / 2
        if failure is not None and not ended:
            raise failure
        part, rate, final = ended[0]
        kept = [Candidate(label, state) for label, state in reversed(part.run.states)]
        far = Candidate.line(given, final, (0.5, 0.4, 0.3, 0.2, 0.1))
        judging.settles(part, rate, chain(kept, far), self._run)

    def begins(self, work: Purifying[Any]) -> tuple[Defense, float]:
        """Return the defense to start with, and its learning rate as a fraction of this one's."""
        return self, 1.0

    def milder(self) -> Defense | None:
        """Return the defense to try next if this one costs too much utility, or None."""
        return None

    @abstractmethod
    def _run(self, work: Purifying[Any]) -> None:
        """Edit ``work.adapter.model`` in place; ``work.run.snapshot`` saves candidate states."""


@dataclass(frozen=True, kw_only=True)
class TrainingDefense(Defense):
    """A defense that trains on clean data; its learning rate decays to zero along a cosine.

    Attributes:
        views: How the clean samples are augmented; see :data:`~mmdefense.data.batch.Views`.
        lr: Peak learning rate of SGD.
        layer_norm_factor: Multiplies ``lr``, and divides ``adamw_lr``, if the adapter reports that
            the model uses LayerNorm, as transformers do: at the SGD rate that suits BatchNorm
            networks a transformer hardly moves, and at their AdamW rate it forgets its task (ours).
        adamw_lr: Peak learning rate of AdamW.
        optimizer: ``"auto"`` uses the optimizer that the adapter recommends for its kind of model:
            the SGD rate that suits all other models moves a detector too little (ours).
        momentum: Momentum of SGD.
        steps: Number of updates.
        batch_size: Clean samples per update. max_norm: Gradient norm to clip at; None disables
            clipping.
        gradient_checkpointing: Whether to recompute activations in the backward pass, for models
            that support it, such as those of Transformers: less memory, more time.
        restarts: How often to restart at half the rate if neither the final state nor one near it
            meets the utility bound, or if the loss becomes non-finite (ours).
    """

    views: Views = "standard"
    lr: NotNegative = 0.01
    layer_norm_factor: Positive = 4.0
    adamw_lr: NotNegative = 0.005
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    momentum: Share = 0.9
    steps: Whole = 100
    batch_size: BatchSize = 64
    max_norm: Positive | None = 5.0
    gradient_checkpointing: bool = False
    restarts: Whole = 3

    def milder(self) -> Defense | None:
        """Return this defense at half its learning rate, or None if no restarts are left."""
        if self.restarts < 1 or not self.steps:
            return None
        left = self.restarts - 1
        return replace(self, lr=self.lr / 2, adamw_lr=self.adamw_lr / 2, restarts=left)

    def training(self, adapter: TaskAdapter[Any]) -> Training:
        """Return the settings of the training loop for the adapter's model."""
        optimizer, factor = self._optimizer(adapter), self._layer_norm_factor(adapter)
        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.adamw_lr / factor if optimizer == "adamw" else self.lr * factor,
            optimizer=optimizer,
            momentum=self.momentum,
            max_norm=self.max_norm,
        )

    def factor(self, adapter: TaskAdapter[Any]) -> float:
        """Return the factor on SGD's learning rate for the adapter's model; 1 for AdamW."""
        return self._layer_norm_factor(adapter) if self._optimizer(adapter) == "sgd" else 1.0

    def _layer_norm_factor(self, adapter: TaskAdapter[Any]) -> float:
        return self.layer_norm_factor if traits(adapter).layer_norm else 1.0

    def _optimizer(self, adapter: TaskAdapter[Any]) -> Literal["sgd", "adamw"]:
        return traits(adapter).optimizer if self.optimizer == "auto" else self.optimizer

    def trains(self, adapter: TaskAdapter[Any]) -> str:
        """Describe what is trained and how many values, for the plan of a dry run."""
        return f"{self.trained(adapter):,} values"

    def trained(self, adapter: TaskAdapter[Any]) -> int:
        """Return the number of trained values."""
        return sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)


def viewed(adapter: TaskAdapter[B], samples: Samples[B], views: Views) -> Samples[B]:
    """Return the samples augmented by ``views``.

    Raises:
        UnsupportedError: If other than standard views are requested and the adapter has no
            ``viewed``; standard views come from the samples.
    """
    if missing_members(adapter, ViewingAdapter):
        if views == "standard":
            return samples
        raise UnsupportedError(
            f"views={views!r} needs an adapter with viewed(), and {type(adapter).__name__} has "
            "none; set views=standard"
        )
    return cast("ViewingAdapter[B]", adapter).viewed(samples, views)


def _same(given: nn.Module, purified: nn.Module) -> bool:
    """Return whether all weights and buffers of two models are bitwise equal."""
    before, after = given.state_dict(), purified.state_dict()
    return before.keys() == after.keys() and all(
        torch.equal(value, after[name].to(value.device)) for name, value in before.items()
    )


def _before_the_guard(deadline: Deadline, evaluation: float) -> Deadline:
    """Return when training must end to leave time for the guard.

    A tenth of the remaining time is reserved, but at least one evaluation and at most six: the
    final state and five interpolations towards the given one.

    Args:
        deadline: When the whole run must end.
        evaluation: Duration of one evaluation in seconds.
    """
    tenth = deadline.left / 10
    return deadline.earlier(max(evaluation, min(tenth, 6 * evaluation)))


@contextmanager
def _explained_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error that smaller batches would not fix into a one-line message.

    Raises:
        UnsupportedError: Instead of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UnsupportedError(
            "memory ran out, and smaller batches would not help; free some, use a device with "
            f"more memory, or a defense that needs less, such as fine-tuning ({one_line(error)})"
        ) from error


def versions() -> dict[str, str]:
    """Return the versions of the software used, and the device."""
    return {
        "mmdefense": version("mmdefense"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
