"""How the curvature of the clean loss, ACC and ASR move while a model is trained or purified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmdefense.analysis.evidence import measured_sharpness
from mmdefense.data.batch import Samples
from mmdefense.kernels.curvature import Smoothness
from mmdefense.kernels.loop import mean_score
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.plots.smoothness_course import SmoothnessCourse
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Event, Run

__all__ = ["Course", "CoursePoint", "smoothness_course"]


@dataclass(frozen=True)
class CoursePoint:
    """A model after some updates.

    Attributes:
        step: Updates done.
        acc: ACC on test samples, in ``[0, 1]``.
        asr: ASR on triggered ones; none where there is no attack.
        smoothness: Curvature of the clean loss.
    """

    step: int
    acc: float
    asr: float | None
    smoothness: Smoothness


@dataclass(frozen=True)
class Course:
    """The points of a training, first to last.

    Attributes:
        name: What is trained.
        points: In order of their steps.
    """

    name: str
    points: tuple[CoursePoint, ...]

    def plot(self) -> SmoothnessCourse:
        """Return the plot, with the spectra of the first, the middle and the last point."""
        shown = [self.points[0], self.points[len(self.points) // 2], self.points[-1]]
        spectra = {f"{point.step} updates": point.smoothness.spectrum for point in shown}
        attacked = all(point.asr is not None for point in self.points)
        return SmoothnessCourse(
            [point.step for point in self.points],
            [point.acc for point in self.points],
            [point.asr or 0.0 for point in self.points] if attacked else None,
            [point.smoothness.lambda_max for point in self.points],
            [point.smoothness.trace for point in self.points],
            {name: (held.nodes, held.weights) for name, held in spectra.items()},
            of=self.name,
        )


def smoothness_course(
    name: str,
    adapter: TaskAdapter[Any],
    train: Callable[[Run], object],
    clean: Samples[Any],
    test: Samples[Any],
    triggered: TriggeredSamples[Any] | None,
    *,
    stage: str,
    every: int,
    seed: int = 0,
    trace_error: float | None = 0.1,
) -> Course:
    """Measure a model before, during and after a training.

    The curvature is that of the mean loss over at most 128 clean samples, always the same, with the
    same probes. Measuring draws no random numbers of the training, which is as without it.

    Args:
        name: What is trained, for the plot.
        adapter: Around the model that ``train`` changes in place.
        train: Trains it with the run that it is given.
        clean: Clean samples that the curvature is measured on.
        test: Clean test samples.
        triggered: Triggered test samples; none of a clean model.
        stage: The stage of the run that is watched, ``"victim"`` or ``"purify"``.
        every: Updates between two points; rounded up to the next look at the loss.
        seed: Of the run and the probes.
        trace_error: Standard error of Tr(H) to reach, as a share of it.

    Returns:
        The points, of which the first is before the first update.
    """
    points: list[CoursePoint] = []

    def measure(step: int) -> None:
        points.append(
            CoursePoint(
                step,
                mean_score(adapter, test),
                None if triggered is None else mean_score(adapter, triggered.samples),
                measured_sharpness(adapter, clean, seed, trace_error=trace_error),
            )
        )

    def watch(event: Event) -> None:
        if event.stage != stage or event.step <= points[-1].step:
            return
        if event.step >= points[-1].step + every or event.step == event.total:
            measure(event.step)

    measure(0)
    train(Run(seed, progress=watch))
    return Course(name, tuple(points))
