"""Whether a backdoor that was removed stays removed.

Two attacks on a purified model, each beside a clean model that is put through the same:
:func:`retune` trains it on a few poisoned samples, and :func:`reactivate` searches for a trigger
near the known one that still works.

References:
    Min, Qin, Zhang, Shen, Cheng. *Uncovering, Explaining, and Mitigating the Superficial Safety of
    Backdoor Defense*. NeurIPS 2024. arXiv:2410.09838
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from mmdefense.data.batch import Batch, Samples, few
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.loop import mean_score, train
from mmdefense.kernels.perturbations import perturbed, worst_change
from mmdefense.plots.retuning_curves import RetuningCurves
from mmdefense.protocol import InputAdapter, TaskAdapter, missing_members
from mmdefense.runtime.run import Run
from mmdefense.training import Training

if TYPE_CHECKING:
    from mmdefense.attacks.base import Attack

__all__ = ["TUNING", "Reactivation", "Retuned", "Retuning", "reactivate", "retune"]

B = TypeVar("B", bound=Batch)

TUNING = Training(steps=40, batch_size=128, lr=0.01, schedule="constant", augment=False)
"""How the paper retunes: SGD with momentum 0.9 at a constant rate, 5 passes over 1000 samples."""


@dataclass(frozen=True, kw_only=True)
class Retuned:
    """A model after some updates of a retuning attack.

    Attributes:
        updates: Number of updates; 0 is the model as it was given.
        asr: Attack success rate, in ``[0, 1]``.
        acc: Score of clean samples, of a classifier the accuracy, in ``[0, 1]``.
    """

    updates: int
    asr: float
    acc: float

    def __str__(self) -> str:
        return f"ASR {100 * self.asr:.1f} %, ACC {100 * self.acc:.1f} %"


@dataclass(frozen=True, kw_only=True)
class Retuning:
    """A retuning attack: what a few poisoned samples bring back.

    Attributes:
        poisoned: Poisoned samples among those that it trains on.
        clean: Clean samples among these.
        judged: Test samples on which rates are measured; none of them is trained on.
        lr: Learning rate, which is constant.
        batch_size: Samples per update.
        optimizer: ``"sgd"`` or ``"adamw"``.
        model: The model, after more and more updates.
        twin: Its clean twin after the same updates; empty where there is none.
    """

    poisoned: int
    clean: int
    judged: int
    lr: float
    batch_size: int
    optimizer: str
    model: tuple[Retuned, ...]
    twin: tuple[Retuned, ...] = ()

    @property
    def asr(self) -> float:
        """The ASR after the last update."""
        return self.model[-1].asr

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each figure and its value for a person: the mix, then each point."""
        how = f"{self.optimizer} at {self.lr:g}, {self.batch_size} an update"
        twin = "" if self.twin else "; no clean twin to compare with"
        mix = f"{self.poisoned} poisoned and {self.clean} clean samples"
        yield "retuned on", f"{mix}, {how}; judged on {self.judged} others{twin}"
        for number, point in enumerate(self.model):
            s = "" if point.updates == 1 else "s"
            beside = f"; clean twin {self.twin[number]}" if self.twin else ""
            yield f"after {point.updates} update{s}", f"{point}{beside}"

    def plot(self) -> RetuningCurves:
        """Return ASR and ACC over the updates."""
        courses = [self.model, self.twin] if self.twin else [self.model]
        return RetuningCurves(
            models=["the model", "its clean twin"][: len(courses)],
            updates=[[float(point.updates) for point in course] for course in courses],
            asr=[[point.asr for point in course] for course in courses],
            acc=[[point.acc for point in course] for course in courses],
        )


def retune(
    adapter: TaskAdapter[B],
    tuning: Any,
    test: Any,
    attack: Attack[B],
    count: int,
    *,
    twin: TaskAdapter[B] | None = None,
    training: Training = TUNING,
    run: Run | None = None,
) -> Retuning:
    """Fine-tune copies of a model and of its clean twin on a few poisoned samples.

    The attacker replaces ``count`` of the ``tuning`` samples by poisoned ones, as its ``poison``
    does in a training set, and trains all weights on the whole mix. A model that still knows the
    backdoor gets its ASR back within few updates; one that never knew it takes longer.

    Args:
        adapter: The purified model; it is not changed.
        tuning: Clean samples to train on, as the task's ``load`` returns them.
        test: Clean samples to judge by, of the same kind; disjoint from ``tuning``.
        attack: As ``plant`` returned it.
        count: Number of poisoned samples N. (The attack ``clean-image`` takes at most so many.)
        twin: A model of the same task that never had the backdoor.
        training: How; by default as the paper does.
        run: Seed and progress.

    Raises:
        BadInputError: If ``count`` is not between 1 and the number of samples, or fewer can be
            poisoned.
        DivergenceError: If the loss stops being finite.
    """
    if not 1 <= count <= len(tuning):
        raise BadInputError(
            f"the retuning attack must have between 1 and {len(tuning)} poisoned samples, the "
            f"number that it trains on, got {count}"
        )
    if training.steps < 1:
        raise BadInputError("the retuning attack needs at least one update, got steps=0")
    adapter.samples(tuning)  # an adapter knows its classes once it has seen samples
    mixed = attack.with_count(count, tuning).poison(tuning, adapter)
    run = Run() if run is None else run
    courses = [
        _course(one.fork(), mixed, test, attack, training, run, name)
        for name, one in (("model", adapter), ("clean twin", twin))
        if one is not None
    ]
    return Retuning(
        poisoned=count,
        clean=len(tuning) - count,
        judged=len(test),
        lr=training.lr,
        batch_size=min(training.batch_size, len(tuning)),
        optimizer=training.optimizer,
        model=courses[0],
        twin=courses[1] if twin is not None else (),
    )


def _course(
    adapter: TaskAdapter[B],
    mixed: Any,
    test: Any,
    attack: Attack[B],
    training: Training,
    run: Run,
    name: str,
) -> tuple[Retuned, ...]:
    """Train a model in place and return its rates after more and more updates."""
    clean = adapter.samples(test)
    triggered = adapter.samples(attack.triggered(test, adapter).samples)
    found: list[Retuned] = []

    def look(updates: int) -> None:
        if updates in _looks(training.steps):
            asr = float(attack.success(adapter, triggered).mean())
            found.append(Retuned(updates=updates, asr=asr, acc=mean_score(adapter, clean)))

    look(0)
    # The stage names the draws, so that model and twin see the same batches.
    part = run.part(name)
    train(adapter, adapter.samples(mixed), training, part, stage="retune", after_step=look)
    return tuple(found)


def _looks(steps: int) -> list[int]:
    """Return after which updates rates are measured: 0, 1, 2, 5, 10, 20, 50 and so on, the last."""
    rounds = [lead * 10**power for power in range(9) for lead in (1, 2, 5)]
    return [0, *(number for number in rounds if number < steps), steps]


@dataclass(frozen=True, kw_only=True)
class Reactivation:
    """A search for a trigger near the known one.

    Attributes:
        radius: Largest change of an input value.
        searched: Triggered samples that the search saw.
        judged: Triggered samples on which rates are measured; the search saw none of them.
        before: ASR of the known trigger on the model, in ``[0, 1]``.
        after: ASR of the trigger that was found.
        change_alone: Share of the same samples, without the trigger, that the change alone turns
            into the attacker's target; as large as ``after`` where the change is an attack of its
            own on any model.
        twin_before: ASR of the known trigger on the clean twin; none where there is no twin.
        twin_after: ASR of what the same search finds on the clean twin.
        transferred: ASR on the clean twin of the trigger that was found on the model.
    """

    radius: float
    searched: int
    judged: int
    before: float
    after: float
    change_alone: float
    twin_before: float | None = None
    twin_after: float | None = None
    transferred: float | None = None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each figure and its value for a person."""
        yield "trigger near the known one", f"within {self.radius:.4g}, on {self.judged} samples"
        for name, value in (
            ("known trigger", self.before),
            ("found trigger", self.after),
            ("change without the trigger", self.change_alone),
            ("clean twin, known trigger", self.twin_before),
            ("clean twin, trigger found on it", self.twin_after),
            ("clean twin, trigger found on the model", self.transferred),
        ):
            if value is not None:
                yield name, f"ASR {100 * value:.1f} %"


def reactivate(
    adapter: TaskAdapter[B],
    search: Any,
    test: Any,
    attack: Attack[B],
    *,
    twin: TaskAdapter[B] | None = None,
    radius: float = 16 / 255,
    steps: int = 50,
    most: int = 256,
) -> Reactivation:
    """Search for one change of the triggered inputs that brings the attacker's answer back.

    Projected gradient descent on the mean loss of the attacker's labels, one change for all
    samples, each value within ``radius``. The paper trains an autoencoder that changes each sample
    otherwise, on models' outputs and with a clean model in its loss; here the clean twin is a
    control: what the same search finds on it, and whether what was found on the model works there.

    Args:
        adapter: The purified model, with continuous inputs.
        search: Clean samples to search with, as the task's ``load`` returns them.
        test: Clean samples to judge by; disjoint from ``search``.
        attack: As ``plant`` returned it.
        twin: A model of the same task that never had the backdoor.
        radius: Largest change of an input value; by default the paper's.
        steps: Number of steps, each of ``2.5 radius / steps``.
        most: Triggered samples to search with, at most.

    Raises:
        UnsupportedError: If inputs are not continuous, or not all of one shape.
        BadInputError: If no sample can be triggered.
    """
    models = [adapter] if twin is None else [adapter, twin]
    for one in models:
        if missing := missing_members(one, InputAdapter):
            raise UnsupportedError(
                "the search for triggers needs gradients with respect to inputs; "
                f"{type(one).__name__} lacks "
                f"{', '.join(missing)}"
            )
    adapter.samples(search)
    seen, unseen = attack.triggered(search, adapter), attack.triggered(test, adapter)
    count = min(most, len(seen))
    changes = [_change(one, seen.samples, count, radius, steps) for one in models]

    def rate(one: Any, change: Tensor, *, alone: bool = False) -> float:
        wanted = one.samples(unseen.samples)
        inputs = one.samples(unseen.clean) if alone else wanted
        moved: Any = _Changed(one, wanted, inputs, change)
        return float(attack.success(one, moved).mean())

    none = torch.zeros_like(changes[0])
    return Reactivation(
        radius=radius,
        searched=count,
        judged=len(unseen),
        before=rate(adapter, none),
        after=rate(adapter, changes[0]),
        change_alone=rate(adapter, changes[0], alone=True),
        twin_before=None if twin is None else rate(twin, none),
        twin_after=None if twin is None else rate(twin, changes[1]),
        transferred=None if twin is None else rate(twin, changes[0]),
    )


def _change(adapter: Any, triggered: Any, count: int, radius: float, steps: int) -> Tensor:
    """Return one change of all inputs, ``(1, ...)``, that raises the attacker's success."""
    batch = few(adapter.samples(triggered), count)
    with mode(adapter.model, train=False):
        return worst_change(
            adapter,
            batch.take(torch.arange(len(batch))),
            radius=radius,
            steps=steps,
            step_size=2.5 * radius / max(1, steps),
            universal=True,
            loss=lambda moved: -adapter.per_sample_loss(moved),
        )


@dataclass(frozen=True)
class _Changed(Generic[B]):
    """Samples whose inputs are those of others, moved by one change; labels stay as they are.

    It is no whole set of samples: it has what reading them in batches needs.
    """

    adapter: InputAdapter[B]
    wanted: Samples[B]
    inputs: Samples[B]
    change: Tensor

    def __len__(self) -> int:
        return len(self.wanted)

    def take(self, indices: Tensor) -> B:
        """Return the samples at ``indices`` with the moved inputs."""
        given = self.inputs.take(indices)
        read = self.adapter.inputs(given)
        if read.shape[1:] != self.change.shape[1:]:
            raise UnsupportedError(
                f"a universal perturbation needs inputs of one shape, got {tuple(read.shape[1:])} "
                f"and {tuple(self.change.shape[1:])}"
            )
        moved = perturbed(self.adapter, given, self.change)
        return self.adapter.with_inputs(self.wanted.take(indices), self.adapter.inputs(moved))
