"""What every defense is: its settings, ``purify``, and how it is run."""

from __future__ import annotations

import dataclasses
import itertools
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, Generic, Literal, TypeVar, final

import torch
from torch import Tensor, nn

from mmdefense.checkpoints.runs import RunStore
from mmdefense.checkpoints.weights import check_finite
from mmdefense.data.batch import Batch, Samples, split
from mmdefense.defenses.guard import Guard, State, Trial, at_rate, choose
from mmdefense.errors import BadInputError, DivergenceError, UnsupportedError, one_line
from mmdefense.kernels.hooks import recomputed
from mmdefense.kernels.loop import scores
from mmdefense.kernels.precision import half_types, in_float32, rounded, typed_like
from mmdefense.protocol import TaskAdapter, lacking, traits
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.memory import is_out_of_memory, roomy
from mmdefense.runtime.parts import Parts
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

__all__ = ["Defense", "Purifying", "Result", "TrainingDefense", "versions"]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """A purified model and how it came to be.

    Attributes:
        model: The purified copy.
        adapter: An adapter around it; where it is in half precision, around a copy of the same
            values in float32.
        defense: Name of the defense's class.
        settings: All settings of the defense, seed included.
        guard: The verdict of the utility guard.
        history: Figures in order of time, each with its stage and step.
        figures: Tensors for the report, by name.
        seconds: Wall-clock time of the purification, parts before a cut included.
        versions: Of what computed it.
        data: Fingerprint and size of the clean samples.
        stopped: Where the time was up, in words; empty where it was not.
        threads: Number of threads of each part of the run.
        unchanged: Why every weight and buffer is as it was given; empty where one is not.
    """

    model: nn.Module
    adapter: Any
    defense: str
    settings: Mapping[str, Any]
    guard: Guard
    history: list[dict[str, Any]]
    figures: Mapping[str, Any]
    seconds: float
    versions: Mapping[str, str]
    data: Mapping[str, Any]
    stopped: str = ""
    threads: tuple[int, ...] = ()
    unchanged: str = ""


@dataclass
class Purifying(Generic[B]):
    """What a defense works with: a private copy of the model, and the parts of the clean data.

    Attributes:
        adapter: Around a private copy, to be edited in place.
        fit: What to learn from.
        holdout: What to choose by; disjoint from ``fit``.
        run: Seed, progress, states and store.
        figures: Filled with tensors that the report shows; ``"why_unchanged"`` says in words why a
            defense has changed nothing.
        stopped: Where the time was up, in words; empty where it was not.
        types: Of the weights that will be rounded in the end, by name.
    """

    adapter: TaskAdapter[B]
    fit: Samples[B]
    holdout: Samples[B]
    run: Run
    figures: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""
    types: Mapping[str, torch.dtype] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A purification method. Its fields are its whole configuration.

    Attributes:
        seed: Makes the result reproducible.
        max_utility_drop: Largest drop of the task metric on held-out data, in ``[0, 1]``.
        holdout: Share of the clean data that is kept for choosing and for the guard.
    """

    requires: ClassVar[type] = TaskAdapter

    seed: Seed = 0
    max_utility_drop: Share = 0.02
    holdout: OpenShare = 0.2

    def __post_init__(self) -> None:
        check_settings(self)

    @final
    def purify(
        self,
        adapter: TaskAdapter[B],
        clean: Any,
        *,
        progress: Progress | None = None,
        store: RunStore | None = None,
        max_seconds: float | Deadline | None = None,
    ) -> Result:
        """Purify a copy of ``adapter.model``; the given model stays as it is, bit for bit.

        A model in half precision is purified in float32, for a sum of tiny updates would be lost
        in its own type, and handed back in that; the guard judges what it is rounded to.

        Args:
            adapter: The model in its adapter.
            clean: Clean samples, in any form that ``adapter.samples`` reads.
            progress: Called with each :class:`~mmdefense.runtime.run.Event`.
            store: Where to keep states, so that the same call goes on after a kill.
            max_seconds: Within how many seconds to be done, with the best state so far, or by what
                deadline. It is looked at after each update; training ends early enough for the
                utility guard.

        Raises:
            UnsupportedError: If the adapter lacks what this defense asks for.
            BadInputError: If the clean data or the model cannot be used.
            DivergenceError: If the loss stopped being finite.
        """
        if missing := lacking(adapter, self.requires):
            raise UnsupportedError(
                f"{type(self).__name__} needs a {self.requires.__name__}; "
                f"{type(adapter).__name__} lacks {', '.join(missing)}"
            )
        deadline = Deadline.after(max_seconds)
        begin = deadline.clock()
        given = adapter.model
        check_finite(given.state_dict(), type(given).__name__)
        adapter = in_float32(adapter)
        samples = adapter.samples(clean)
        _check_enough(samples, adapter)
        fit, held = split(samples, self.holdout, self.seed)
        parts = Parts(deadline.clock, begin)
        run = Run(seed=self.seed, store=store, deadline=deadline, parts=parts)
        if progress is not None:
            run.progress = progress
        private = adapter.fork() if adapter.model is given else adapter
        work = Purifying(private, fit, held, run, types=half_types(given))
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
            figures=work.figures,
            seconds=parts.seconds,
            versions=versions(),
            data={"fingerprint": samples.fingerprint(), "samples": len(samples)},
            stopped=work.stopped,
            threads=tuple(parts.threads),
            unchanged=self._why_unchanged(work) if _same(given, purified) else "",
        )

    def _why_unchanged(self, work: Purifying[Any]) -> str:
        """Return in words why nothing was changed, where that is so."""
        if "why_unchanged" in work.figures:
            return str(work.figures["why_unchanged"])
        if work.stopped:
            return f"the time was up in {work.stopped}"
        if getattr(self, "steps", None) == 0:
            return "steps=0"
        rounding = " or its changes are lost in rounding" if work.types else ""
        return f"{type(self).__name__} left every weight as it was{rounding}"

    @final
    def attempt(self, work: Purifying[Any]) -> Guard:
        """Run in ``work``, up to its deadline, and leave the state that the guard chose there.

        Where neither the final state nor one near to it keeps the bound, or the loss stops being
        finite, it begins again with :meth:`milder`, and so on.

        Raises:
            DivergenceError: If the loss stopped being finite every time.
        """
        again = getattr(self, "gradient_checkpointing", False)
        thrifty = recomputed(work.adapter.model) if again else nullcontext()
        with roomy(work.run.room), _told_of_memory(), thrifty:
            deadline, begin = work.run.deadline, work.run.deadline.clock()
            work.run.progress(Event("utility before", 0, 1))
            given, before = copy_state(work.adapter.model), scores(work.adapter, work.holdout)
            work.run.progress(Event("utility before", 1, 1))
            work.run.deadline = _before_the_guard(deadline, deadline.clock() - begin)
            trials = self._trials(work, given)
            score = partial(_judged, work, itertools.count(1))
            bound = self.max_utility_drop
            guard, chosen, state = choose(trials, given, before, score, bound, deadline)
            work.adapter.model.load_state_dict(rounded(state, work.types))
        guard = replace(guard, metric=traits(work.adapter).score_name)
        if chosen.work is not work:
            work.run.adopt(at_rate(chosen.rate), chosen.work.run)
            work.figures = chosen.work.figures
        return guard

    def _trials(self, work: Purifying[Any], given: State) -> Iterator[Trial]:
        """Run this defense, and then milder ones, each when it is asked for.

        Yields:
            Each that did not diverge, nor, if it is not the first, was cut off by the deadline.
        """
        defense: Defense | None = self
        part, rate, failure, ended = work, 1.0, None, False
        while defense is not None and not work.stopped:
            if part is not work:
                why = "the loss stopped being finite" if failure else "too much utility is lost"
                note = f"{why}; beginning again {at_rate(rate)}"
                work.run.progress(Event(at_rate(rate), 0, 1, note=note))
                work.adapter.model.load_state_dict(given)
            try:
                defense._run(part)
                failure = None
            except OutOfTime as over:
                work.stopped = str(over)
            except DivergenceError as error:
                failure = error
            if failure is None and (part is work or not work.stopped):
                ended = True
                final = f"{work.stopped}, when the time was up" if work.stopped else "final"
                states = [*part.run.states, (final, copy_state(work.adapter.model))]
                yield Trial(part, rate, states)
            defense, rate = defense.milder(), rate / 2
            part = replace(work, run=work.run.milder(at_rate(rate)), figures={})
        if failure is not None and not ended:
            raise failure

    def milder(self) -> Defense | None:
        """Return the defense to try where this one costs too much utility, if there is one."""
        return None

    @abstractmethod
    def _run(self, work: Purifying[Any]) -> None:
        """Edit ``work.adapter.model`` in place; ``work.run.snapshot`` keeps candidate states."""


@dataclass(frozen=True, kw_only=True)
class TrainingDefense(Defense):
    """A defense that trains on clean data, its rate falling to zero on a cosine.

    Attributes:
        lr: Peak learning rate of SGD.
        layer_norm_factor: What ``lr`` is multiplied by, and ``adamw_lr`` divided by, where the
            adapter says that LayerNorm normalises the model, as in transformers: at SGD's rate for
            nets with BatchNorm a transformer hardly moves, at AdamW's it forgets its task (ours).
        adamw_lr: Peak learning rate of AdamW.
        optimizer: ``"auto"`` takes what the adapter says that models of its kind need: the rate of
            SGD that suits all others moves a detector too little (ours).
        momentum: Of SGD.
        steps: Number of updates.
        batch_size: Clean samples per update.
        max_norm: Largest gradient norm; none does not clip.
        gradient_checkpointing: Whether activations are computed again in the backward pass, for
            models that offer it, as those of Transformers do: less memory, more time.
        restarts: How often to begin again at half of the rate where neither the final state nor
            one near to it keeps the utility bound, or the loss stops being finite (ours).
    """

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
        """Return this defense at half of its rate, as long as ``restarts`` allow it."""
        if self.restarts < 1 or not self.steps:
            return None
        left = self.restarts - 1
        return replace(self, lr=self.lr / 2, adamw_lr=self.adamw_lr / 2, restarts=left)

    def training(self, adapter: TaskAdapter[Any]) -> Training:
        """Return the updates of the adapter's model, as the loop takes them."""
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
        """Return how many times as long the adapter's model makes the steps of SGD; AdamW's, 1."""
        return self._layer_norm_factor(adapter) if self._optimizer(adapter) == "sgd" else 1.0

    def _layer_norm_factor(self, adapter: TaskAdapter[Any]) -> float:
        return self.layer_norm_factor if traits(adapter).layer_norm else 1.0

    def _optimizer(self, adapter: TaskAdapter[Any]) -> Literal["sgd", "adamw"]:
        return traits(adapter).optimizer if self.optimizer == "auto" else self.optimizer

    def trained(self, adapter: TaskAdapter[Any]) -> int:
        """Return how many values are trained."""
        return sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)


def _check_enough(samples: Samples[Any], adapter: TaskAdapter[Any]) -> None:
    """Refuse labelled data with fewer samples than the model has classes.

    Raises:
        BadInputError: Naming both numbers.
    """
    classes = round(1 / adapter.chance)
    if samples.strata() is not None and len(samples) < classes:
        raise BadInputError(
            f"clean data must hold at least one sample per class ({classes}), got {len(samples)}"
        )


def _same(given: nn.Module, purified: nn.Module) -> bool:
    """Say whether all weights and buffers of two models are equal, bit for bit."""
    before, after = given.state_dict(), purified.state_dict()
    return before.keys() == after.keys() and all(
        torch.equal(value, after[name].to(value.device)) for name, value in before.items()
    )


def _judged(work: Purifying[Any], numbers: Iterator[int], state: State) -> Tensor:
    """Return the scores of a state for the guard, and say how many were judged."""
    number = next(numbers)
    work.run.progress(Event("guard", number - 1, 0))
    found = _scores(work, state)
    work.run.progress(Event("guard", number, 0))
    return found


def _scores(work: Purifying[Any], state: State) -> Tensor:
    """Return each held-out sample's share of the task metric under a state, as it is rounded."""
    work.adapter.model.load_state_dict(rounded(state, work.types))
    return scores(work.adapter, work.holdout)


def _before_the_guard(deadline: Deadline, evaluation: float) -> Deadline:
    """Return when training must end so that the guard can judge, as the first evaluation tells.

    Kept is a tenth of the time that is left, but at least one evaluation and at most six: those of
    the final state and of five nearer to the given one.
    """
    tenth = deadline.left / 10
    return deadline.earlier(max(evaluation, min(tenth, 6 * evaluation)))


@contextmanager
def _told_of_memory() -> Iterator[None]:
    """Say in one line that memory ran out where smaller batches are no remedy.

    Raises:
        UnsupportedError: In place of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UnsupportedError(
            "memory ran out, and not for the size of a batch; free some, take a device with more, "
            f"or a defense that needs less, such as fine-tuning ({one_line(error)})"
        ) from error


def versions() -> dict[str, str]:
    """Return the versions of what computes a purification, and the device."""
    return {
        "mmdefense": version("mmdefense"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
