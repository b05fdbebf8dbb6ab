"""Which state of a purification is returned: states judged one by one on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdefense.data.batch import Samples
from mmdefense.defenses.guard import UNDECIDED, Guard, State, at_rate, between, judge
from mmdefense.errors import DivergenceError
from mmdefense.kernels.loop import scores
from mmdefense.kernels.precision import rounded
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.run import Event, OutOfTime, Run, copy_state

if TYPE_CHECKING:
    from mmdefense.defenses.base import Purifying

__all__ = ["Candidate", "Chosen", "Fold", "Judging"]

_ENOUGH = 400
"""Number of held-out samples at which no more folds are run, since each costs a whole run. Ours."""


@dataclass(frozen=True)
class Candidate:
    """A state that may be returned.

    Attributes:
        label: Its name.
        state: The state dict.
        share: Its interpolation factor between the given state (0) and the final one (1); None for
            a snapshot taken during the run.
    """

    label: str
    state: State
    share: float | None = None

    @classmethod
    def line(cls, given: State, final: State, shares: Iterable[float]) -> Iterable[Candidate]:
        """Yield interpolations from the given state to the final one, one for each factor."""
        for share in shares:
            yield cls(
                f"{share:.0%} of the way to the final state", between(given, final, share), share
            )


@dataclass(frozen=True)
class Chosen:
    """A state that was judged, with its verdict and the part of the run that reached it."""

    guard: Guard
    part: Purifying[Any]
    state: State


@dataclass
class Fold:
    """Another split of the clean data, on which a defense is run again.

    Attributes:
        fit: Samples to train on.
        holdout: Held-out samples to judge by.
        run: The defense's run on this fold, at the latest rate.
        before: Per-sample score on the held-out samples under the given model.
        reached: The final states at the full rate and at the latest one, by fraction of the rate.
    """

    fit: Samples[Any]
    holdout: Samples[Any]
    run: Run | None = None
    before: Tensor | None = None
    reached: dict[float, State] = field(default_factory=dict)


@dataclass
class Judging:
    """Judges states in turn and keeps the best of them.

    A state passes if its drop on the held-out samples is within the bound. If the drop is not
    significantly on one side of the bound, the defense is also run on the other folds of the clean
    data (cross-validation), until the held-out samples of all folds decide, no fold is left, or 400
    samples have been judged. From then on the mean drop over the folds counts, also for the next
    states at that rate.

    Attributes:
        work: Wraps the model into which the states are loaded.
        given: The state of the given model.
        bound: The largest allowed drop.
        deadline: After it, no further state is judged.
        folds: The other folds of the clean data; if empty, only ``work.holdout`` decides.
        before: Per-sample score on the held-out samples under the given model, ``(N,)``.
        chosen: The state that passed, or else the one with the smallest drop so far.
        count: Number of states judged.
    """

    work: Purifying[Any]
    given: State
    bound: float
    deadline: Deadline
    folds: Sequence[Fold] = ()
    before: Tensor = field(init=False)
    chosen: Chosen | None = None
    count: int = 0

    def __post_init__(self) -> None:
        self.before = scores(self.work.adapter, self.work.holdout)

    def settles(
        self,
        part: Purifying[Any],
        rate: float,
        states: Iterable[Candidate],
        again: Callable[[Purifying[Any]], None] | None = None,
    ) -> bool:
        """Judge states in turn; return whether one passes or the time is up.

        Args:
            part: The part of the run that produced them.
            rate: Its learning rate, as a fraction of the defense's.
            states: Candidate states in order of preference.
            again: Runs the defense at that rate on another fold; without it there is no
                cross-validation. If it diverges there, no further state of this call is judged.
        """
        for candidate in states:
            if self.chosen is not None and self.deadline.passed:
                return True
            self.work.run.progress(Event("guard", self.count, 0))
            after = self._scores(candidate.state, self.work.holdout)
            guard = judge(self.before, after, self.bound, candidate.label, rate)
            if again and candidate.share and guard.verdict == UNDECIDED:
                try:
                    guard = self._cross_validated(guard, after, candidate.share, again)
                except DivergenceError:  # this rate is unstable
                    return self._refused(guard, part, candidate)
            self.count += 1
            self.work.run.progress(Event("guard", self.count, 0))
            best = self.chosen
            if best is None or guard.passes or guard.drop < best.guard.drop:
                self.chosen = Chosen(guard, part, candidate.state)
            if guard.passes:
                return True
        return False

    def _refused(self, guard: Guard, part: Purifying[Any], candidate: Candidate) -> bool:
        """Keep a state only if there is no other, and return False."""
        if self.chosen is None:
            self.chosen = Chosen(guard, part, candidate.state)
        return False

    def _cross_validated(
        self, first: Guard, after: Tensor, share: float, again: Callable[[Purifying[Any]], None]
    ) -> Guard:
        """Return the verdict over as many folds as are needed to decide.

        Args:
            first: The verdict on the first fold.
            after: Scores of the first fold's held-out samples, shape ``(N,)``.
            share: The state's interpolation factor between the given state and the final one.
            again: Runs the defense at the same rate on another fold.
        """
        guard, before = first, self.before
        for number, fold in enumerate(self.folds, 2):
            if len(before) >= _ENOUGH:
                break
            try:
                found = self._scores_of(fold, number, first.rate, share, again)
            except OutOfTime:
                self.folds = ()  # no time left for further folds
                return guard
            before, after = torch.cat([before, found[0]]), torch.cat([after, found[1]])
            guard = judge(before, after, self.bound, first.state, first.rate, folds=number)
            if guard.verdict != UNDECIDED:
                break
        return guard

    def _scores_of(
        self,
        fold: Fold,
        number: int,
        rate: float,
        share: float,
        again: Callable[[Purifying[Any]], None],
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of a fold's held-out samples, before and after the defense."""
        model = self.work.adapter.model
        if rate not in fold.reached:
            model.load_state_dict(self.given)
            if fold.before is None:
                fold.before = scores(self.work.adapter, fold.holdout)
            most = len(self.folds) + 1
            name = f"fold {number} of {most}"
            if number == 2 and fold.run is None:
                few = f"{len(self.before)} held-out samples are too few to decide"
                note = f"{few}; repeating the training on up to {most} folds of the clean data"
                self.work.run.progress(Event(name, 0, 1, note=note))
            fold.run = fold.run.milder(at_rate(rate)) if fold.run else self.work.run.part(name)
            again(self.work.on(fold.fit, fold.holdout, fold.run))
            full = {1.0: fold.reached[1.0]} if 1.0 in fold.reached else {}
            fold.reached = {**full, rate: copy_state(model)}
        assert fold.before is not None
        state = between(self.given, fold.reached[rate], share)
        return fold.before, self._scores(state, fold.holdout)

    def _scores(self, state: State, samples: Samples[Any]) -> Tensor:
        """Return the per-sample score under a state, with its weights rounded as when returned."""
        self.work.adapter.model.load_state_dict(rounded(state, self.work.types))
        return scores(self.work.adapter, samples)
