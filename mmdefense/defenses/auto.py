"""Automatic choice of a defense, from quantities that a defender can measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from annotated_types import MinLen
from torch import Tensor

from mmdefense import registry
from mmdefense.data.batch import Views
from mmdefense.defenses.base import Defense, Purifying
from mmdefense.defenses.guard import KEPT, Guard
from mmdefense.defenses.outcome import Choice
from mmdefense.errors import BadInputError, DivergenceError, UnsupportedError
from mmdefense.kernels.inversion import Search, recover, success_of
from mmdefense.protocol import TaskAdapter, TriggerAdapter, TriggerFamily, missing_members
from mmdefense.runtime.run import OutOfTime, Run
from mmdefense.settings import BatchSize, Share, Whole

__all__ = ["Auto"]

_Pool = tuple[TriggerFamily, int, Tensor]
"""A trigger family, a target, and triggers ``(M, *P)`` for that target."""

_AS_SMALL = 2.0
"""Largest size of a trigger that counts in a purified model, relative to the suspect. Ours."""


@dataclass(frozen=True)
class _Known:
    """The triggers that candidates are judged by.

    Attributes:
        pools: Their families, targets and values; empty if the model cannot be searched.
        suspect: The smallest trigger that was found in the given model, if any was.
    """

    pools: Sequence[_Pool] = ()
    suspect: Mapping[str, Any] | None = None

    def like(self, row: Mapping[str, Any]) -> bool:
        """Return whether a trigger in a purified model may be that of the suspect's backdoor."""
        if self.suspect is None:
            return True
        fits = row["size"] <= _AS_SMALL * self.suspect["size"]
        return bool(fits and row["target"] == self.suspect["target"])


@dataclass(frozen=True, kw_only=True)
class Auto(Defense):
    """Try defenses in turn, and return the first that is good enough.

    BAERASER comes first, since it unlearns what the search finds; then come the others, cheap ones
    first. A search finds triggers in the given model. The smallest of them, relative to the budget
    of its family, is the suspect: larger ones are often natural, and go on working when a backdoor
    is gone. A defense is good enough if the utility guard passes and the suspect succeeds on at
    most ``tolerated`` of the held-out samples, and so does every trigger that a search in the
    purified model finds to the same target and at most twice as large. If no defense is good
    enough, the result with the lowest success among those that pass the guard is returned; one that
    changes nothing, only if no other passes. If none halves the success of these triggers, they are
    natural or out of reach, and the result of the defense that is named first in ``fallback`` is
    returned.

    If no trigger is found in the given model, and none of a bank of random ones succeeds, there is
    no criterion to choose by, and ``fallback`` is tried instead, judged by the guard alone.
    **Triggers of families that are not searched for go unnoticed**, here as everywhere.

    Attributes:
        candidates: Names of defenses, in the order in which they are tried.
        fallback: Those that are tried if no trigger is found: the first one that the model supports
            and that passes the guard. By default fine-pruning, which leaves least in the mean of
            the development victims (docs/results.md, "Traffic signs"), then FIP.
        tolerated: Largest acceptable success rate of these triggers, in ``[0, 1]``.
        search_steps: Updates of the trigger search.
        bank: Number of random triggers per family.
        views: How each candidate augments the clean samples.
        steps: Updates of each candidate; None uses the candidate's default.
        batch_size: Clean samples per update; None uses the candidate's default.
        gradient_checkpointing: Passed to the candidates that support it: less memory, more time.
    """

    candidates: Annotated[tuple[str, ...], MinLen(1)] = (
        "baeraser",
        "distillation",
        "fine-pruning",
        "fip",
        "tsbd",
    )
    fallback: Annotated[tuple[str, ...], MinLen(1)] = ("fine-pruning", "fip")
    tolerated: Share = 0.1
    search_steps: Whole = 100
    bank: Whole = 16
    views: Views = "standard"
    steps: Whole | None = None
    batch_size: BatchSize | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*self.candidates, *self.fallback):
            if registry.load("defenses", name) is Auto:
                raise BadInputError("candidates must be other defenses, got 'auto' itself")

    def trains(self, adapter: TaskAdapter[Any]) -> str:
        """Describe which defenses train copies of the model."""
        names, without = ", ".join(self.candidates), ", ".join(self.fallback)
        return (
            f"copies, by {names} in turn until one is good enough, or by {without} "
            "if no trigger is found"
        )

    def _run(self, work: Purifying[Any]) -> None:
        names, known, why, success = self._plan(work)
        trials: list[_Trial] = []
        for name in names:
            trial = self._try(work, name, known)
            why.append(f"{name}: {trial.words(self.tolerated)}")
            trials.append(trial)
            if trial.stopped or trial.is_good(self.tolerated):
                break
        best = min(trials, key=lambda trial: trial.rank)
        if success is not None and best.success is not None and best.success > success / 2:
            why.append("none halves the success of these triggers, so they are no criterion")
            best = min(trials, key=lambda trial: (*trial.rank[:3], self._preference(trial.name)))
        if best.failure is not None:
            raise best.failure
        assert best.work is not None
        why.append(f"chosen: {best.name}; triggers of families not searched for would go unnoticed")
        work.adapter.model.load_state_dict(best.work.adapter.model.state_dict())
        work.stopped, work.guard = trial.stopped, best.guard
        work.adopt(best.work)
        work.why_unchanged = best.unchanged
        work.choice = Choice(
            defense=best.name,
            settings=dataclasses.asdict(self._made(best.name)),
            why=tuple(why),
            success_before=success,
            success_after=best.success,
        )

    def _preference(self, name: str) -> int:
        """Return the place of a defense where there is no criterion: in ``fallback``, or last."""
        return self.fallback.index(name) if name in self.fallback else len(self.fallback)

    def _plan(
        self, work: Purifying[Any]
    ) -> tuple[tuple[str, ...], _Known, list[str], float | None]:
        """Return the candidates, the known triggers, the reasons, and the current success rate."""
        if missing_members(work.adapter, TriggerAdapter):
            why = "the adapter cannot apply triggers to this model's inputs"
            return self.fallback, _Known(), [why], None
        adapter = cast("TriggerAdapter[Any]", work.adapter)
        found = work.run.once("search", lambda: {"found": self._found(work)})["found"]
        if found:
            suspect = min(found, key=lambda row: float(row["size"]))
            known = _Known([_pool(suspect)], suspect)
            success = _success(adapter, work.holdout, known.pools)
            why = (
                f"{len(found)} triggers were found in the given model; the smallest "
                f"({suspect['family']['name']} to target {suspect['target']}) succeeds on "
                f"{success:.0%} of the held-out samples"
            )
            return self.candidates, known, [why], success
        known = _Known(list(_bank(adapter, self.bank, work.run)))
        success = _success(adapter, work.holdout, known.pools)
        why = f"no trigger was found in the given model (random ones succeed on {success:.0%})"
        if success > self.tolerated:
            return self.candidates, known, [why], success
        return self.fallback, _Known(), [f"{why}, so there is nothing to choose by"], None

    def _found(self, work: Purifying[Any]) -> list[dict[str, Any]]:
        """Return the triggers that a search finds, as plain values, with their relative size."""
        adapter = cast("TriggerAdapter[Any]", work.adapter)
        search = Search(steps=self.search_steps, screening=self.search_steps)
        records = recover(adapter, work.fit, search, work.run, stage="search")
        return [
            {
                "family": dataclasses.asdict(record.family),
                "target": target,
                "triggers": pool,
                "size": size / record.family.budget,
            }
            for record in records
            for target, pool, size, yes in zip(
                record.targets.tolist(),
                record.pool,
                record.size.tolist(),
                record.accepted.tolist(),
                strict=True,
            )
            if yes
        ]

    def _made(self, name: str) -> Defense:
        """Return a candidate with this defense's seed, utility bound and training budget."""
        kind = registry.load("defenses", name)
        budget = ("views", "steps", "batch_size", "gradient_checkpointing")
        shared = ("seed", "max_utility_drop", "holdout", *budget)
        given = {field: getattr(self, field) for field in shared}
        known = {field.name for field in dataclasses.fields(kind)}
        kept = {k: v for k, v in given.items() if k in known and v is not None}
        made: Defense = kind(**kept)
        return made

    def _try(self, work: Purifying[Any], name: str, known: _Known) -> _Trial:
        """Run a candidate on a fork, and measure the remaining trigger success."""
        part = Purifying(
            work.adapter.fork(),
            work.fit,
            work.holdout,
            work.run.part(name),
            types=work.types,
            folds=work.folds,
        )
        candidate = self._made(name)
        try:
            if missing := missing_members(part.adapter, candidate.requires):
                raise UnsupportedError(f"{name} needs {', '.join(missing)}")
            guard = candidate.attempt(part)
            success = self._left(part, known) if known.pools else None
        except (UnsupportedError, DivergenceError) as error:
            return _Trial(name, failure=error)
        work.run.adopt(name, part.run)
        unchanged = candidate.why_unchanged(part, work.adapter.model, part.adapter.model)
        return _Trial(name, part, guard, success, part.stopped, unchanged)

    def _left(self, part: Purifying[Any], known: _Known) -> float:
        """Return the largest success of a trigger that counts on a candidate's purified model."""
        adapter = cast("TriggerAdapter[Any]", part.adapter)
        success = _success(adapter, part.holdout, known.pools)
        if part.stopped or success > self.tolerated:
            return success
        try:
            new = [_pool(row) for row in self._found(part) if known.like(row)]
        except OutOfTime as over:
            part.stopped = f"the trigger search in the purified model ({over})"
            return success
        return max(success, _success(adapter, part.holdout, new))


def _pool(row: Mapping[str, Any]) -> _Pool:
    return TriggerFamily(**row["family"]), row["target"], row["triggers"]


@dataclass(frozen=True)
class _Trial:
    """The outcome of one candidate: its purified model and measurements, or why it failed.

    ``success`` is None if there is no trigger to judge it by. ``unchanged`` says why it changed
    nothing, if so.
    """

    name: str
    work: Purifying[Any] | None = None
    guard: Guard | None = None
    success: float | None = None
    stopped: str = ""
    unchanged: str = ""
    failure: Exception | None = None

    @property
    def rank(self) -> tuple[bool, bool, bool, float]:
        """Sort key, smaller is better: it ran, it passes the guard, it changed something, success.

        Of random triggers an unchanged model may well be the one on which fewest succeed.
        """
        passes = self.guard is not None and self.guard.passes
        return self.guard is None, not passes, bool(self.unchanged), self.success or 0.0

    def is_good(self, tolerated: float) -> bool:
        passes = self.guard is not None and self.guard.passes
        return passes and not self.unchanged and (self.success or 0.0) <= tolerated

    def words(self, tolerated: float) -> str:
        if self.guard is None:
            return f"could not run ({self.failure})"
        if self.unchanged:
            return f"changed nothing ({self.unchanged})"
        verdict = "good enough" if self.is_good(tolerated) else "not good enough"
        ended = f"; time ran out in {self.stopped}" if self.stopped else ""
        bound = "" if self.guard.verdict == KEPT else f" (bound {self.guard.verdict})"
        utility = f"utility {self.guard.before:.3f} to {self.guard.after:.3f}{bound}"
        if self.success is not None:
            utility += f", known triggers succeed on up to {self.success:.0%}"
        return f"{utility}: {verdict}{ended}"


def _success(adapter: TriggerAdapter[Any], samples: Any, pools: Sequence[_Pool]) -> float:
    """Return the largest success rate of the pools on the samples, in ``[0, 1]``; 0 if empty."""
    return max((success_of(adapter, samples, *pool) for pool in pools), default=0.0)


_MOST_TARGETS = 16
"""Targets that the bank is tried on; trying all of a thousand would take a thousand passes."""


def _bank(adapter: TriggerAdapter[Any], count: int, run: Run) -> Iterator[_Pool]:
    """Yield ``count`` random triggers of each family towards each of some targets."""
    generator = run.generator("bank")
    every = torch.randperm(adapter.trigger_targets(), generator=generator)
    for family in adapter.trigger_families():
        drawn = _random_triggers(adapter, family, count, generator)
        for target in every[:_MOST_TARGETS].sort().values.tolist() if len(drawn) else ():
            yield family, target, drawn


def _random_triggers(
    adapter: TriggerAdapter[Any], family: TriggerFamily, count: int, generator: torch.Generator
) -> Tensor:
    """Return up to ``count`` raw triggers ``(M, *P)`` of blocks, within the family's budget.

    Each channel is noise on a grid of 4 cells a side, thresholded at a random level; raw noise
    fills up if too few thresholded blocks fit the budget.
    """
    first, *rest = family.shape
    drawn = torch.rand(64 * count, first, *(min(4, side) for side in rest), generator=generator)
    heights = torch.rand(64 * count, first, *(1 for _ in rest), generator=generator)
    blocks = torch.cat([(drawn > heights).float(), drawn]) if rest else drawn
    for axis, side in enumerate(rest, 2):
        blocks = blocks.index_select(axis, torch.arange(side) * min(4, side) // side)
    fits = adapter.trigger_size(family, blocks) <= family.budget
    return blocks[fits & (blocks.flatten(1).amax(1) > 0)][:count]
