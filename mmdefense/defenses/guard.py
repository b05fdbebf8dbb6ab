"""The utility guard: which state of a purification is returned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "KEPT",
    "UNDECIDED",
    "VIOLATED",
    "Guard",
    "State",
    "at_rate",
    "between",
    "judge",
    "not_decidable",
]

State = dict[str, Tensor]
"""A state dict."""

KEPT: Literal["kept"] = "kept"
VIOLATED: Literal["violated"] = "violated"
UNDECIDED: Literal["not decidable"] = "not decidable"
"""The three verdicts of the guard: the interval of the drop lies entirely within the bound,
entirely beyond it, or contains it."""

_Z = 1.645  # one-sided 95 %

_LOW_RATE = 1 / 64
"""Fraction of the learning rate at which most defenses left a backdoor (docs/appendix.md)."""


@dataclass(frozen=True)
class Guard:
    """The utility of the returned model on held-out clean data, before and after.

    Attributes:
        before: Mean score of the given model, in ``[0, 1]``.
        after: Mean score of the returned state.
        drop: ``before - after``.
        spread: Standard deviation of the per-sample drop.
        bound: The largest allowed drop.
        samples: Number of held-out samples, over all folds.
        state: Which state was returned: ``"final"`` or an earlier one.
        rate: The learning rate at which that state was reached, as a fraction of the defense's.
        metric: Name of the adapter's score.
        folds: Number of cross-validation folds. With more than one, the returned state is that of
            the first fold, and before, after and drop are means over the states of all folds.
    """

    before: float
    after: float
    drop: float
    spread: float
    bound: float
    samples: int
    state: str
    rate: float = 1.0
    metric: str = "accuracy"
    folds: int = 1

    @property
    def margin(self) -> float:
        """Half-width of the 90 % interval of the drop, each end of which is a 95 % bound.

        With few samples and no observed change the standard error is 0, so the floor is half a
        sample.
        """
        return _Z * max(self.spread / math.sqrt(self.samples), 1 / self.samples / 2)

    @property
    def low(self) -> float:
        """Lower end of that interval; no drop is below -1."""
        return max(-1.0, self.drop - self.margin)

    @property
    def high(self) -> float:
        """Upper end of that interval; no drop is above 1."""
        return min(1.0, self.drop + self.margin)

    @property
    def verdict(self) -> Literal["kept", "violated", "not decidable"]:
        """Whether the bound is kept, violated, or not decidable with so few samples."""
        if self.low > self.bound:
            return VIOLATED
        return KEPT if self.high <= self.bound else UNDECIDED

    @property
    def violated(self) -> bool:
        """Whether even the best state drops significantly more than ``bound``."""
        return self.verdict == VIOLATED

    @property
    def passes(self) -> bool:
        """Whether the state may be returned: its drop is within the bound, significantly or not."""
        return self.drop <= self.bound + 1e-6

    @property
    def needed(self) -> int | None:
        """Number of held-out samples needed to decide, assuming the same drop and spread.

        None if the present samples decide already, or if the drop is so close to the bound that no
        realistic number would.
        """
        gap = abs(self.bound - self.drop)
        if self.verdict != UNDECIDED or gap < 1e-4:
            return None
        return math.ceil(max((_Z * self.spread / gap) ** 2, _Z / 2 / gap)) + 1

    @property
    def undecided(self) -> str:
        """A message if the samples are too few to decide, and how many would do; else empty."""
        return not_decidable(self.samples, self.needed) if self.verdict == UNDECIDED else ""

    @property
    def instead(self) -> str:
        """What was returned instead of the final state at the full rate; else empty."""
        if self.rate != 1:
            return f"{self.state}, {at_rate(self.rate)}"
        return "" if self.state == "final" else self.state

    @property
    def message(self) -> str:
        """The verdict as one readable sentence."""
        turns = f" of {self.folds} folds" if self.folds > 1 else ""
        change = (
            f"{self.metric} went from {self.before:.3f} to {self.after:.3f} on {self.samples} "
            f"held-out samples{turns} (drop {self.drop:+.3f} ± {self.margin:.3f}, "
            f"bound {self.bound:g})"
        )
        taken = f"; returned the state {self.instead!r}" if self.instead else ""
        caution = f"; {self.caution}" if self.caution else ""
        return f"utility guard: {self._words()}{taken}: {change}{caution}"

    @property
    def caution(self) -> str:
        """Why a backdoor may remain although the bound is kept; empty if nothing says so."""
        if self.rate > _LOW_RATE:
            return ""
        return (
            f"{at_rate(self.rate)} a backdoor often stays; more clean samples, or a larger "
            "max_utility_drop, let a higher rate pass"
        )

    def _words(self) -> str:
        if self.verdict == VIOLATED:
            return "bound VIOLATED by every state; the one with the smallest drop is returned"
        if self.verdict == KEPT:
            return "bound kept"
        least = "" if self.passes else "; the state with the smallest drop is returned"
        return f"bound {self.undecided}{least}"


def not_decidable(samples: int, needed: int | None) -> str:
    """Say that the held-out samples are too few to decide, and how many would do."""
    would = "" if needed is None else f" (about {needed:,} would decide)"
    return f"not decidable with {samples:,} held-out samples{would}"


def at_rate(rate: float) -> str:
    """Describe a fraction of the learning rate in words."""
    return f"at {rate:g} times the learning rate"


def judge(
    before: Tensor, after: Tensor, bound: float, state: str, rate: float = 1.0, folds: int = 1
) -> Guard:
    """Return the verdict on a state.

    Args:
        before: Per-sample score (each sample's share of the task metric) under the given model,
            ``(N,)``.
        after: The same under the state, shape ``(N,)``.
        bound: The largest allowed drop of the mean, in ``[0, 1]``.
        state: Name of the state.
        rate: The fraction of the learning rate at which it was reached.
        folds: Number of cross-validation folds.
    """
    difference = (before - after).double()
    count = len(difference)
    return Guard(
        before=float(before.mean()),
        after=float(after.mean()),
        drop=float(difference.mean()),
        spread=float(difference.std(unbiased=True)) if count > 1 else 0.0,
        bound=bound,
        samples=count,
        state=state,
        rate=rate,
        folds=folds,
    )


def between(given: State, final: State, share: float) -> State:
    """Interpolate linearly from the given state to the final one."""
    return {
        name: torch.lerp(given[name], value, share) if value.is_floating_point() else value
        for name, value in final.items()
    }
