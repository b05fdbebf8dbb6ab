"""Search for the triggers that a model responds to, with a generator per target and level.

The max-entropy staircase approximator learns a distribution of triggers, not a single one: a
generator at level ``e`` maps noise to triggers and raises their success up to ``e``, but no
further. Above that it diversifies them, as measured by a neural estimate of the mutual information
between noise and trigger. All generators are small networks of the same shape; their weights are
stacked and they run in parallel. If triggers of a family have a position or a word that must be
right before there is a gradient to follow, the search starts from the best of many random triggers
(:class:`TriggerFamily`).

A screened search runs cheap searches first, and a full search only for the targets that stand out
in one of them: a backdoor's trigger is far smaller than what other targets need (Neural Cleanse,
Wang et al., S&P 2019), and some networks respond to natural triggers for classes that no attacker
chose. One of the cheap searches ends early. A pattern over the whole input works after a few
updates, when nothing does for other targets, and later no longer stands out; a small patch in one
place takes many updates to find.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdefense.data.batch import Batch, Samples, batches
from mmdefense.kernels.hooks import frozen, mode
from mmdefense.protocol import TriggerAdapter, TriggerFamily
from mmdefense.runtime.memory import each_fitted, fitted
from mmdefense.runtime.processes import present
from mmdefense.runtime.run import Run

__all__ = ["Recovered", "Search", "recover", "recover_once", "some_of", "success_of"]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of a search.

    Attributes:
        levels: Staircase levels of target probability, ascending, in ``(0, 1)``.
        steps: Updates of all generators of a family.
        batch_size: Clean samples per generator and step.
        noise: Entries of a generator's input, uniform in ``[0, 1]``.
        hidden: Width of generators and estimators.
        lr: Learning rate of Adam.
        entropy: Weight of the mutual information.
        size: Weight of the trigger's size, times the fraction of its level that a generator has
            reached (ours), so that no trigger is shrunk before it works.
        threshold: Minimum success rate, on samples of classes other than the target, for a
            generator to be accepted: the paper's tau.
        screening: Updates of a first search over all targets, at one level with half of the
            samples, which is run for two fifths of them as well; 0 for none.
        judged: Largest number of clean samples to evaluate each generator on.
    """

    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    steps: int = 40
    batch_size: int = 8
    noise: int = 16
    hidden: int = 64
    lr: float = 0.04
    entropy: float = 0.1
    size: float = 1.0
    threshold: float = 0.9
    screening: int = 0
    judged: int = 256

    @property
    def screens(self) -> tuple[Search, Search]:
        """The first searches: the middle level, and half of the samples per step."""
        level = sorted(self.levels)[len(self.levels) // 2]
        size = max(1, self.batch_size // 2)
        whole = dataclasses.replace(
            self, levels=(level,), steps=self.screening, batch_size=size, screening=0
        )
        return dataclasses.replace(whole, steps=math.ceil(_EARLY * self.screening)), whole

    @property
    def nearby(self) -> Search:
        """The search from a good starting point: smaller and more steps, so as to stay near it."""
        return dataclasses.replace(self, lr=self.lr / 4, steps=2 * self.steps)


class _Stack(nn.Module):
    """``count`` perceptrons with one hidden layer, evaluated in parallel."""

    def __init__(self, count: int, sizes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for before, after in pairwise(sizes):
            start = torch.randn(count, before, after, generator=generator) / math.sqrt(before)
            self.weights.append(nn.Parameter(start))
            self.biases.append(nn.Parameter(torch.zeros(count, 1, after)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(count, N, before)`` to ``(count, N, after)``."""
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(bias, inputs, weight)
            if index + 1 < len(self.weights):
                inputs = F.leaky_relu(inputs, 0.2)
        return inputs


class _Generators:
    """A generator and an estimator for each target at each of L levels of one family."""

    def __init__(
        self, family: TriggerFamily, targets: Tensor, search: Search, seed: torch.Generator
    ) -> None:
        self.family, self.search = family, search
        self.levels = torch.tensor(search.levels).repeat(len(targets))
        self.targets = targets.repeat_interleave(len(search.levels))
        size = math.prod(family.shape)
        count = len(self.targets)
        self.maker = _Stack(count, [search.noise, search.hidden, size], seed)
        self.critic = _Stack(count, [search.noise + size, search.hidden, 1], seed)

    def to(self, device: torch.device) -> _Generators:
        self.levels, self.targets = self.levels.to(device), self.targets.to(device)
        self.maker.to(device)
        self.critic.to(device)
        return self

    def start_at(self, triggers: Tensor) -> None:
        """Initialise each generator to produce triggers near one, shape ``(G, *P)``."""
        with torch.no_grad():
            raw = triggers.flatten(1).clamp(_EDGE, 1 - _EDGE)
            self.maker.biases[-1].copy_(raw.logit()[:, None])
            self.maker.weights[-1].mul_(_NARROW)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return noise ``(G, count, z)`` and the triggers made from it, ``(G, count, *P)``."""
        device = self.targets.device
        noise = torch.rand(
            len(self.targets), count, self.search.noise, generator=generator, device=device
        )
        made = torch.sigmoid(self.maker(noise - 0.5))
        return noise, made.view(*made.shape[:2], *self.family.shape)

    def information(self, noise: Tensor, triggers: Tensor) -> Tensor:
        """Return a lower bound of I(noise; trigger) for each generator, shape ``(G,)`` (MINE).

        ``mean T(z, t) - log mean exp T(z', t)`` with z' the noise of other triggers.
        """
        flat = triggers.flatten(2)
        joint: Tensor = self.critic(torch.cat([noise - 0.5, flat], 2)).squeeze(-1)
        other: Tensor = self.critic(torch.cat([noise.roll(1, dims=1) - 0.5, flat], 2)).squeeze(-1)
        return joint.mean(1) - (other.logsumexp(1) - math.log(other.shape[1]))


@dataclass(frozen=True)
class Recovered:
    """The triggers of one family that were found.

    Attributes:
        family: Their family.
        targets: Target of each generator, shape ``(G,)``.
        levels: Staircase level of each, shape ``(G,)``.
        success: Fraction of clean samples that its triggers send to the target, shape ``(G,)``.
        size: Mean fraction of an input that they change, shape ``(G,)``.
        accepted: Whether success reaches the threshold within the family's budget, ``(G,)``. A
            screened search accepts only the targets with about the smallest triggers, relative to
            the budgets of all families.
        pool: Triggers drawn from each generator, shape ``(G, M, *P)``.
    """

    family: TriggerFamily
    targets: Tensor
    levels: Tensor
    success: Tensor
    size: Tensor
    accepted: Tensor
    pool: Tensor


def recover(
    adapter: TriggerAdapter[B],
    samples: Samples[B],
    search: Search,
    run: Run,
    *,
    stage: str = "recover",
    pool: int = 16,
    targets: Tensor | None = None,
) -> list[Recovered]:
    """Search for triggers of every family, target and level, and keep a pool of each.

    The model is in eval mode, so that samples do not interact, and is not changed.

    Args:
        adapter: The model.
        samples: Clean samples.
        search: Settings of the search.
        run: Seed and progress.
        stage: Name of the stage.
        pool: Triggers M to draw from each generator.
        targets: Targets to search for, ``(T,)``; by default all.

    Returns:
        One record per family.
    """
    every = torch.arange(adapter.trigger_targets()) if targets is None else targets
    found = []
    with mode(adapter.model, train=False), frozen(adapter.model):
        for family in adapter.trigger_families():
            name = f"{stage}/{family.name}"

            def searched(
                targets: Tensor, how: Search, name: str, family: TriggerFamily = family
            ) -> Recovered:
                seed = run.generator(f"{name}/start")
                generators = _Generators(family, targets, how, seed).to(_device(adapter))
                if family.starts > 1:
                    generators.start_at(_starts(adapter, samples, generators, run, name))
                    generators.search = how.nearby
                _fit(adapter, samples, generators, run, name)
                return _judge(adapter, samples, generators, run, name, pool)

            if not search.screening or len(every) < 3:  # neither of two targets can stand out
                found.append(searched(every, search, name))
                continue
            screened = [
                searched(every, how, f"{name}/screening {how.steps}") for how in search.screens
            ]
            suspects = torch.unique(torch.cat([_suspects(record) for record in screened]))
            full = searched(suspects, search, name) if len(suspects) else None
            found.append(_joined(screened[-1], full))
    return _smallest(found) if search.screening else found


def recover_once(
    adapter: TriggerAdapter[B],
    samples: Samples[B],
    search: Search,
    run: Run,
    *,
    stage: str,
    at_any_rate: bool = True,
) -> list[Recovered]:
    """Return what :func:`recover` finds; a resumed run reads it from its store.

    Args:
        adapter: The model.
        samples: Clean samples.
        search: Settings of the search.
        run: Seed, progress and store.
        stage: Name of the stage.
        at_any_rate: Whether restarts at a lower rate reuse the result, because the given model is
            searched.
    """

    def compute() -> dict[str, Any]:
        found = recover(adapter, samples, search, run, stage=stage)
        # Every process searches; all use the results of the main one.
        return {"found": present().from_main([dataclasses.asdict(record) for record in found])}

    kept = run.once(stage, compute, at_any_rate=at_any_rate)
    return [
        Recovered(**{**record, "family": TriggerFamily(**record["family"])})
        for record in kept["found"]
    ]


def _device(adapter: TriggerAdapter[Any]) -> torch.device:
    return next(adapter.model.parameters()).device


_AT_ONCE = 8192
"""Ours: largest number of inputs to evaluate generators on at once."""

_EARLY, _OUTSTANDING, _AS_SMALL = 2 / 5, 1 / 2, 2.0
"""Share of the screening's updates after which it is read for the first time; largest cost of a
suspect relative to the median target; and largest ratio of the smallest trigger of an accepted
target to the smallest overall. If all sizes are equal, success decides."""


def _suspects(screened: Recovered) -> Tensor:
    """Return the targets whose cost is far below that of the median target, ascending.

    The cost is the fraction of samples missed plus the fraction of an input changed.
    """
    cost = 1 - screened.success + screened.size
    return screened.targets[cost <= _OUTSTANDING * cost.median()]


def _joined(screened: Recovered, full: Recovered | None) -> Recovered:
    """Return the rows of the full search, and those of the screening for the other targets.

    Only rows of the full search are accepted.
    """
    if full is None:
        return dataclasses.replace(screened, accepted=torch.zeros_like(screened.accepted))
    rest = ~torch.isin(screened.targets, full.targets)
    rows = {
        name: torch.cat([getattr(screened, name)[rest], getattr(full, name)])
        for name in ("targets", "levels", "success", "size", "pool")
    }
    none = torch.zeros(int(rest.sum()), dtype=torch.bool)
    return Recovered(family=full.family, accepted=torch.cat([none, full.accepted]), **rows)


def _smallest(found: Sequence[Recovered]) -> list[Recovered]:
    """Accept only targets whose smallest trigger is about the smallest over all families."""
    sizes = [
        (record.size / record.family.budget).masked_fill(~record.accepted, math.inf)
        for record in found
    ]
    targets = torch.unique(torch.cat([record.targets for record in found]))
    each = torch.stack(
        [
            torch.cat([s[r.targets == target] for s, r in zip(sizes, found, strict=True)]).min()
            for target in targets
        ]
    )
    kept = targets[each <= _AS_SMALL * each.min()]
    return [
        dataclasses.replace(r, accepted=r.accepted & torch.isin(r.targets, kept)) for r in found
    ]


_EDGE, _NARROW = 0.02, 0.1  # ours: distance of a start from 0 and 1, and its standard deviation
_TRIED, _TRIED_ON = 64, 4  # random triggers to try at once, and samples to try them on


@torch.no_grad()
def _starts(
    adapter: TriggerAdapter[B], samples: Samples[B], generators: _Generators, run: Run, name: str
) -> Tensor:
    """Return for each generator the best of many random triggers, shape ``(G, *P)``."""
    family, device = generators.family, generators.targets.device
    batch = samples.take(some_of(len(samples), _TRIED_ON))
    tried = len(batch)
    targets, place = torch.unique(generators.targets, return_inverse=True)
    seed = run.generator(f"{name}/starts")
    random = torch.rand(family.starts, *family.shape, generator=seed).to(device)

    def target_likelihood(some: Tensor, row: slice) -> Tensor:
        mine = some[row, None].expand(-1, tried, *family.shape)
        stamped = adapter.stamp(batch, family, mine)
        log_p = [
            adapter.target_log_probability(stamped, target.expand(len(mine) * tried))
            for target in targets
        ]
        return torch.stack(log_p).view(len(targets), len(mine), tried).mean(2)

    found = []
    for some in torch.split(random, _TRIED):
        run.report(name, 0, generators.search.steps)
        parts = each_fitted(partial(target_likelihood, some), len(some), _SEARCHING, adapter.model)
        found.append(torch.cat(parts, 1))
    return random[torch.cat(found, 1).argmax(1)[place]]


def _fit(
    adapter: TriggerAdapter[B], samples: Samples[B], generators: _Generators, run: Run, name: str
) -> None:
    search = generators.search
    device = generators.targets.device
    parameters = [*generators.maker.parameters(), *generators.critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=search.lr, betas=(0.5, 0.999), foreach=True)
    picks, noise = run.generator(f"{name}/order"), run.generator(f"{name}/noise", device)
    for step in range(search.steps):
        run.check_time(name, step, search.steps)
        batch = samples.take(torch.randint(len(samples), (search.batch_size,), generator=picks))

        def compute(rows: Sequence[slice], batch: B = batch) -> Tensor:
            source, triggers = generators.draw(search.batch_size, noise)
            p = _log_probability(adapter, batch, generators, triggers, rows).exp()
            # Success above the level earns nothing: the clamp is the staircase's max(0, level - p).
            miss = (generators.levels[:, None] - p).clamp(min=0).mean(1)
            # While p is about 0, so is its gradient, and the size term alone would shrink the
            # trigger to nothing.
            reached = (p.detach().mean(1) / generators.levels).clamp(max=1)
            size = adapter.trigger_size(generators.family, triggers).mean(1)
            information = generators.information(source, triggers)
            # The critic maximises the same bound, so one backward pass is enough for both.
            loss = miss + search.size * reached * size - search.entropy * information
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss.sum())
            return miss.detach()

        miss = fitted(compute, search.batch_size, _SEARCHING, adapter.model, noise)
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == search.steps:
            run.report(name, step + 1, search.steps, miss=float(miss.min()))


_SEARCHING = "the search for triggers"


def _log_probability(
    adapter: TriggerAdapter[B],
    batch: B,
    generators: _Generators,
    triggers: Tensor,
    rows: Sequence[slice],
) -> Tensor:
    """Return log-probabilities of each generator's target on each sample, ``(G, N)``.

    With several ``rows``, activations are recomputed in the backward pass instead of stored.
    """

    def of(triggers: Tensor, some: B) -> Tensor:
        stamped = adapter.stamp(some, generators.family, triggers)
        targets = generators.targets.repeat_interleave(triggers.shape[1])
        return adapter.target_log_probability(stamped, targets).view(triggers.shape[:2])

    if len(rows) == 1:
        return of(triggers, batch)
    parts = [checkpoint(of, triggers[:, row], batch.rows(row), use_reentrant=False) for row in rows]
    return torch.cat(parts, 1)


@torch.no_grad()
def _judge(
    adapter: TriggerAdapter[B],
    samples: Samples[B],
    generators: _Generators,
    run: Run,
    name: str,
    pool: int,
) -> Recovered:
    """Measure each generator on clean samples of classes other than its target."""
    device = generators.targets.device
    noise = run.generator(f"{name}/judge", device)
    count = len(generators.targets)
    hits, tried = torch.zeros(count, device=device), torch.zeros(count, device=device)
    some = samples.subset(some_of(len(samples), generators.search.judged))
    for batch in batches(some, max(1, min(32, _AT_ONCE // count))):
        drawn_for = len(batch)
        _, triggers = generators.draw(drawn_for, noise)

        def judged(
            row: slice, batch: B = batch, triggers: Tensor = triggers
        ) -> tuple[Tensor, Tensor]:
            mine = triggers[:, row]
            targets = generators.targets.repeat_interleave(mine.shape[1])
            stamped = adapter.stamp(batch.rows(row), generators.family, mine)
            log_p = adapter.target_log_probability(stamped, targets).view(count, -1)
            counts = adapter.not_target(stamped, targets).view(count, -1)
            return ((log_p.exp() > 0.5) & counts).sum(1), counts.sum(1)

        for hit, counted in each_fitted(judged, drawn_for, "scoring triggers", adapter.model):
            hits += hit
            tried += counted
    _, drawn = generators.draw(pool, noise)
    size = adapter.trigger_size(generators.family, drawn).mean(1)
    success = hits / tried.clamp(min=1)
    accepted = (success >= generators.search.threshold) & (size <= generators.family.budget)
    return Recovered(
        family=generators.family,
        targets=generators.targets.cpu(),
        levels=generators.levels.cpu(),
        success=success.cpu(),
        size=size.cpu(),
        accepted=accepted.cpu(),
        pool=drawn.cpu(),
    )


def some_of(total: int, count: int) -> Tensor:
    """Return up to ``count`` random indices below ``total``, ascending; the same in every call.

    The first samples of a data set are not representative: many are sorted by class.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[:count].sort().values


@torch.no_grad()
def success_of(
    adapter: TriggerAdapter[B],
    samples: Samples[B],
    family: TriggerFamily,
    target: int,
    triggers: Tensor,
) -> float:
    """Return the success rate of ``triggers`` ``(M, *P)`` on samples of other classes.

    It uses up to 128 samples, cycling through the triggers, in eval mode.
    """
    device = next(adapter.model.parameters()).device
    indices = some_of(len(samples), 128)
    batch, count = samples.take(indices), len(indices)
    targets = torch.full((count,), target, device=device)
    chosen = triggers[torch.arange(count) % len(triggers)].to(device)

    def hits(row: slice) -> Tensor:
        stamped = adapter.stamp(batch.rows(row), family, chosen[None, row])
        return adapter.target_log_probability(stamped, targets[row]).exp() > 0.5

    with mode(adapter.model, train=False):
        hit = torch.cat(each_fitted(hits, count, "scoring triggers", adapter.model))
    counts = adapter.not_target(batch, targets)
    return float((hit & counts).sum() / counts.sum().clamp(min=1))
