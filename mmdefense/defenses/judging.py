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
"""Held-out samples that decide, whatever their interval: each fold costs a whole run. Ours."""


@dataclass(frozen=True)
class Candidate:
    """A state that may be returned.

    Attributes:
        label: What it is called.
        state: The state dict.
        share: How far it lies on the line from the given state to the final one; none for a state
            that the defense kept on its way.
    """

    label: str
    state: State
    share: float | None = None

    @classmethod
    def line(cls, given: State, final: State, shares: Iterable[float]) -> Iterable[Candidate]:
        """Yield the states at these shares of the way from the given state to the final one."""
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
    """Clean data split at another place, on which a defense is run again.

    Attributes:
        fit: What to learn from.
        holdout: What to judge by.
        run: Of the defense on this fold, at the last rate.
        before: Each held-out sample's share of the task metric under the given model.
        reached: The final state at the full rate and at the last one, by the share of the rate.
    """

    fit: Samples[Any]
    holdout: Samples[Any]
    run: Run | None = None
    before: Tensor | None = None
    reached: dict[float, State] = field(default_factory=dict)


@dataclass
class Judging:
    """Judges one state after another, and keeps the best of them.

    A state passes if its drop on the held-out samples is within the bound. Where chance may
    explain on which side of the bound the drop is, the defense is run on the other folds of the
    clean data too, until the samples that were held out in turn decide or there are no more, or
    until 400 were judged; then their mean drop counts, here and for the next states at that rate
    (cross-validation).

    Attributes:
        work: Around the model that the states are of.
        given: The state of the given model.
        bound: The largest drop that is allowed.
        deadline: Once it has passed, no further state is judged.
        folds: The other folds of the clean data; with none, the held-out samples alone decide.
        before: Each held-out sample's share of the task metric under the given model, ``(N,)``.
        chosen: The state that passed, or else the one with the smallest drop so far.
        count: How many states were judged.
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
        """Judge states in turn; return whether one passes, or the time is up.

        Args:
            part: The part of the run that reached them.
            rate: The share of the learning rate at which it did.
            states: What to judge, first what to take first.
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
                except DivergenceError:  # this rate is not to be trusted
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
        """Keep a state only if there is no other, and settle nothing."""
        if self.chosen is None:
            self.chosen = Chosen(guard, part, candidate.state)
        return False

    def _cross_validated(
        self, first: Guard, after: Tensor, share: float, again: Callable[[Purifying[Any]], None]
    ) -> Guard:
        """Return the verdict on the held-out samples of as many folds as it takes to decide.

        Args:
            first: The verdict on those of the first fold.
            after: Their scores, shape ``(N,)``.
            share: How far the state lies on the line from the given state to the final one.
            again: Runs the defense at the rate in question on another fold.
        """
        guard, before = first, self.before
        for number, fold in enumerate(self.folds, 2):
            if len(before) >= _ENOUGH:
                break
            try:
                found = self._scores_of(fold, number, first.rate, share, again)
            except OutOfTime:
                self.folds = ()  # no time is left for any
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
            name = f"fold {number} of {len(self.folds) + 1}"
            fold.run = fold.run.milder(at_rate(rate)) if fold.run else self.work.run.part(name)
            self.work.run.progress(
                Event(name, 0, 1, note=f"{len(self.before)} held-out samples do not decide; {name}")
            )
            again(self.work.on(fold.fit, fold.holdout, fold.run))
            full = {1.0: fold.reached[1.0]} if 1.0 in fold.reached else {}
            fold.reached = {**full, rate: copy_state(model)}
        assert fold.before is not None
        state = between(self.given, fold.reached[rate], share)
        return fold.before, self._scores(state, fold.holdout)

    def _scores(self, state: State, samples: Samples[Any]) -> Tensor:
        """Return each sample's share of the task metric under a state, as it is rounded."""
        self.work.adapter.model.load_state_dict(rounded(state, self.work.types))
        return scores(self.work.adapter, samples)
