"""The evidence of a purification, gathered within a share of its time.

What a piece costs is measured on a few samples before it is begun, in time and in memory; one that
does not fit is left out, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmdefense.analysis.evidence import (
    CURVED,
    EMBEDDED,
    curvature_batch,
    curvature_steps,
    embedding_map,
    layer_changes,
    measured_sharpness,
    smoothness_plot,
)
from mmdefense.data.batch import Samples, few
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.curvature import MOST_TRACE_PROBES, Smoothness, hessian_product
from mmdefense.kernels.fisher import check_second_derivative
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.loop import mean_loss_gradient
from mmdefense.plots.base import Plot
from mmdefense.plots.embedding_map import EmbeddingMap, map_seconds
from mmdefense.plots.loss_smoothness import LossSmoothness
from mmdefense.protocol import TaskAdapter
from mmdefense.report.formats import duration
from mmdefense.report.record import LayerChange
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.memory import is_out_of_memory
from mmdefense.runtime.run import Event, OutOfTime, Progress

__all__ = ["LEVELS", "Curvature", "Evidence", "Level", "check_level", "gather", "most_seconds"]

Level = Literal["none", "fast", "full"]

LEVELS: tuple[Level, ...] = get_args(Level)

SHARE = 0.15
"""Largest part of the purification's time that fast evidence takes."""

TRACE_ERROR = 0.05
"""Ours: standard error of Tr(H), as a share of it, that full evidence measures to."""

_PRODUCT = 4.0
"""Ours: a product with the Hessian takes about as long as four gradients."""

_TRACE_PROBES = 16
"""Ours: products that the stated error of the trace usually takes at most."""


@dataclass(frozen=True)
class Curvature:
    """The curvature of the clean loss at the weights before and after.

    Attributes:
        before: Of the given model.
        after: Of the purified one, on the same samples with the same probe.
        parts: Which of ``"trace"``, ``"lambda_max"`` and ``"spectrum"`` enough products with the
            Hessian were computed for.
        samples: How many samples it was measured on.
    """

    before: Smoothness
    after: Smoothness
    parts: tuple[str, ...]
    samples: int

    def plot(self) -> LossSmoothness:
        """Return the plot of what was measured."""
        return smoothness_plot(self.before, self.after, self.parts)


@dataclass(frozen=True)
class Evidence:
    """What was measured of a purification beyond its verdict.

    Attributes:
        level: ``"none"``, ``"fast"`` or ``"full"``.
        seconds: How long it took.
        skipped: What was left out and why, a sentence each.
        layers: How far each layer moved.
        curvature: The curvature before and after.
        embedding: The map of the penultimate layer before and after.
    """

    level: Level = "none"
    seconds: float = 0.0
    skipped: tuple[str, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    curvature: Curvature | None = None
    embedding: EmbeddingMap | None = None

    def plots(self) -> list[Plot]:
        """Return the plots of the page."""
        curved = None if self.curvature is None else self.curvature.plot()
        return [plot for plot in (curved, self.embedding) if plot is not None]


def check_level(level: str) -> Level:
    """Return a level of evidence.

    Raises:
        BadInputError: If there is none of that name.
    """
    for known in LEVELS:
        if level == known:
            return known
    raise BadInputError(f"evidence must be one of {', '.join(LEVELS)}, got {level!r}")


def gather(
    before: TaskAdapter[Any],
    after: TaskAdapter[Any],
    samples: Samples[Any],
    level: Level = "fast",
    *,
    seconds: float,
    slowness: float = 1.0,
    seed: int = 0,
    deadline: Deadline | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Measure what a purification did to a model.

    Args:
        before: The given model.
        after: The purified one.
        samples: Clean samples, as the adapters read them.
        level: ``"fast"`` takes at most 15 % of the purification's time, ``"full"`` what is left
            until the deadline, ``"none"`` measures nothing.
        seconds: What the purification took.
        slowness: How many seconds by the clock a second of its computation took.
        seed: Of the probe of the curvature.
        deadline: When to be done in any case.
        progress: Called with each sign of progress.
    """
    if level == "none":
        return Evidence()
    deadline = deadline or Deadline()
    begin = deadline.clock()
    limit = deadline.within(SHARE * seconds) if level == "fast" else deadline
    why = "before the time limit"
    if limit.at < deadline.at:
        why = f"of {SHARE:.0%} of the purification's time; --evidence full measures it"
    tell = progress or (lambda _: None)
    error = TRACE_ERROR if level == "full" else None
    work = _Gathering(before, after, samples, seed, limit, why, tell, slowness, error)
    work.run()
    return Evidence(
        level=level,
        seconds=deadline.clock() - begin,
        skipped=tuple(work.skipped),
        layers=work.layers,
        curvature=work.curvature,
        embedding=work.embedding,
    )


def most_seconds(samples: int, gradient: float) -> float:
    """Return about how long full evidence takes, as the gradient of one sample tells."""
    products = 2 * (16 + _TRACE_PROBES) * min(CURVED[0], samples)
    return products * _PRODUCT * gradient + map_seconds(2 * min(EMBEDDED, samples))


@dataclass
class _Gathering:
    """Evidence in the making: what is measured, until when, and what has come of it."""

    before: TaskAdapter[Any]
    after: TaskAdapter[Any]
    samples: Samples[Any]
    seed: int
    limit: Deadline
    why: str
    tell: Progress
    slowness: float
    trace_error: float | None
    skipped: list[str] = field(default_factory=list)
    layers: tuple[LayerChange, ...] = ()
    curvature: Curvature | None = None
    embedding: EmbeddingMap | None = None

    def run(self) -> None:
        """Measure piece after piece, the cheapest first where there is no time for all."""
        if self._fits("the change of each layer", 0.0):
            with self._stage("layers"):
                self.layers = layer_changes(self.before, self.after)
        with self._stage("estimate"):
            pieces = [
                (self._cost_of("the map of the penultimate layer", self._map_cost), self._map),
                (self._cost_of("the curvature", self._product_cost), self._curvature),
            ]
        needed = sum(cost or 0.0 for cost, _ in pieces)
        if needed > self.limit.left:  # else the curvature, of which there may be more, comes last
            pieces.sort(key=lambda pair: pair[0] or 0.0)
        for cost, piece in pieces:
            if cost is not None:
                piece(cost)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Tell that a stage of one step begins, and that it is done."""
        self.tell(Event(f"evidence: {name}", 0, 1))
        yield
        self.tell(Event(f"evidence: {name}", 1, 1))

    def _fits(self, what: str, cost: float) -> bool:
        """Say whether there is time for a piece; note it as left out if there is not."""
        left = self.limit.left
        if cost < left:
            return True
        short = f"it takes about {duration(cost)}, and {duration(left)} were left"
        self._leave_out(what, f"{short if left > 0 else 'no time was left'} {self.why}")
        return False

    def _leave_out(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: not measured; {why}")

    def _cost_of(self, what: str, measure: Callable[[], float | None]) -> float | None:
        """Return what a piece costs in seconds; none where it cannot be, or there is no time."""
        if not self._fits(what, 0.0):
            return None
        try:
            return measure()
        except UnsupportedError as error:
            self._leave_out(what, str(error))
        except (RuntimeError, MemoryError) as error:  # evidence is no reason to lose a model over
            if not is_out_of_memory(error):
                raise
            self._leave_out(what, "memory ran out")
        return None

    def _timed(self, compute: Callable[[Samples[Any]], object], samples: Samples[Any]) -> float:
        begin = self.limit.clock()
        compute(samples)
        return self.limit.clock() - begin

    def _per_sample(
        self, compute: Callable[[Samples[Any]], object], samples: Samples[Any]
    ) -> float:
        """Return about how many seconds a sample takes among others.

        More samples at once are timed only while that is cheap.
        """
        size, took = 1, self._timed(compute, few(samples, 1))
        for larger in (8, 32):
            cheap = took / size * larger < min(self.limit.left / 20, 0.5)
            if not cheap or larger > len(samples):
                break
            size, took = larger, self._timed(compute, few(samples, larger))
        return took / size

    def _map_cost(self) -> float | None:
        """Return what the map costs; none where the samples have no labels."""
        part = few(self.samples, EMBEDDED)
        if part.strata() is None or len(part) < 3:
            return None
        with mode(self.before.model, train=False), torch.no_grad():
            one = self._per_sample(lambda some: self.before.embedding(_whole(some)), part)
        passes = 2 * len(part) * one
        return passes + map_seconds(2 * len(part), self.slowness)

    def _map(self, cost: float) -> None:
        if self._fits("the map of the penultimate layer", cost):
            with self._stage("map"):
                self.embedding = embedding_map(self.before, self.after, self.samples)

    def _product_cost(self) -> float | None:
        """Return what the least of the curvature costs: its trace, on the fewest samples."""
        adapter = self.before
        part = few(self.samples, CURVED[-1])
        weights: list[Tensor] = [p for p in adapter.model.parameters() if p.requires_grad]
        curvature_steps(adapter)
        with mode(adapter.model, train=False):
            gradient = self._timed(
                lambda some: mean_loss_gradient(adapter, _whole(some), weights), few(part, 1)
            )
        if not self._fits("the curvature", 2 * len(part) * _PRODUCT * gradient / _ALONE):
            return None
        check_second_derivative(adapter, part, weights)
        largest = curvature_batch(adapter, part)
        one = self._per_sample(
            lambda some: hessian_product(adapter, some, weights, largest)(weights), part
        )
        return 2 * len(part) * one

    def _curvature(self, cost: float) -> None:
        """Measure as much of the curvature as there is time for, on as many samples as there is."""
        one = cost / (2 * len(few(self.samples, CURVED[-1])))
        most = curvature_steps(self.before)
        for count in CURVED:
            part = few(self.samples, count)
            both = 2 * _SLACK * len(part) * one  # of a product with either model
            if most * both < self.limit.left:
                enough = (most + MOST_TRACE_PROBES) * both < self.limit.left
                error = self.trace_error if enough else None
                return self._sharpness(part, most, ("trace", "lambda_max", "spectrum"), error)
        what = "the spectrum of the Hessian"
        self._fits(what, most * both)
        if _SOME * both < self.limit.left:
            return self._sharpness(part, int(self.limit.left / both), ("trace", "lambda_max"))
        self.skipped[-1] = self.skipped[-1].replace(what, "the largest eigenvalue and " + what)
        return self._sharpness(part, 1, ("trace",)) if self._fits("the trace", both) else None

    def _sharpness(
        self,
        part: Samples[Any],
        steps: int,
        parts: tuple[str, ...],
        trace_error: float | None = None,
    ) -> None:
        most = steps + (0 if trace_error is None else MOST_TRACE_PROBES)
        total = 2 * most
        found: list[Smoothness] = []

        def watch(products: int) -> None:
            done = most * len(found) + products
            self.tell(Event("evidence: curvature", done, total))
            if self.limit.passed:
                raise OutOfTime(f"product {done} of {total}")

        try:
            for adapter in (self.before, self.after):
                found.append(
                    measured_sharpness(
                        adapter,
                        part,
                        self.seed,
                        steps=steps,
                        trace_error=trace_error,
                        watch=watch,
                    )
                )
        except OutOfTime as over:
            self._leave_out("the curvature", f"time ran out in {over}")
            return
        self.tell(Event("evidence: curvature", total, total))
        self.curvature = Curvature(found[0], found[1], parts, len(part))


def _whole(samples: Samples[Any]) -> Any:
    return samples.take(torch.arange(len(samples)))


_SOME = 5
"""Ours: products from which on the largest Ritz value is taken for the largest eigenvalue."""

_SLACK = 1.2
"""Ours: what is measured may take so much longer than a few samples tell."""

_ALONE = 8
"""Ours: a sample alone may take up to so many times as long as one among others."""
