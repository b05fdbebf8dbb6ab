"""Progress on a terminal as bars, and elsewhere as a line for each stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mmdefense.errors import printable
from mmdefense.report.formats import duration
from mmdefense.runtime.run import Event
from mmdefense.runtime.run import Progress as Listener

__all__ = ["CellsDisplay", "ProgressDisplay", "in_training", "shown"]


@contextmanager
def shown(progress: Listener | Literal["auto", False] | None) -> Iterator[Listener | None]:
    """Give the callback for progress that was asked for.

    Args:
        progress: A callback; ``"auto"`` shows progress where somebody looks: on a terminal and in
            a notebook; None and False show nothing.

    Yields:
        What is to be called, if anything.
    """
    if progress != "auto":
        yield progress or None
    elif sys.stderr.isatty() or _in_notebook():
        with ProgressDisplay() as display:
            yield display
    else:
        yield None


def _in_notebook() -> bool:
    """Say whether IPython runs this; it is not loaded to find that out."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return shell is not None and shell() is not None


_LONG = 10.0
"""Seconds after which a stage that still runs is announced where there is no terminal."""


@dataclass
class _Stage:
    """A stage that has been heard of."""

    begun: float
    step: int = 0
    total: int = 0
    bar: TaskID | None = None
    announced: bool = False
    ended: bool = False


class _Steps(MofNCompleteColumn):
    """Steps done, of all; of a stage that ended before them, that it stopped."""

    def render(self, task: Task) -> Text:
        shown = super().render(task)
        return Text("stopped at ") + shown if task.fields.get("stopped") else shown


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step, of a stage that runs; nothing of one with few steps."""

    def render(self, task: Task) -> Text:
        rate = task.speed
        if not rate or task.stop_time is not None or (task.total or 0) <= 1:
            return Text("")
        shown = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        return Text(shown, style="progress.data.speed")


class _Remaining(TimeRemainingColumn):
    """The time that is left; nothing of a stage that has ended."""

    def render(self, task: Task) -> Text:
        if task.stop_time is not None or task.finished or task.total is None:
            return Text("")
        return Text("left ", style="progress.remaining") + super().render(task)


class ProgressDisplay:
    """A callback for progress; what it shows goes to standard error.

    A stage ends when it says so, when all its steps are done, or when another one begins. Use it
    as a context manager, so that the terminal is left in order.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool = False,
    ) -> None:
        """Show progress on ``console``, by default on standard error; nothing if ``quiet``."""
        self.console = console or Console(stderr=True, quiet=quiet)
        self.clock = clock
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Steps(),
            TimeElapsedColumn(),
            _Rate(),
            _Remaining(),
            TextColumn("{task.fields[values]}", style="dim"),
            console=self.console,
            get_time=clock,
            speed_estimate_period=600,  # seconds; a step may take minutes
        )
        self._stages: dict[str, _Stage] = {}
        self._running = ""
        self.title = ""

    def __call__(self, event: Event) -> None:
        """Show one sign of progress, or a note as a line of its own."""
        if event.note:
            self.console.print(printable(event.note), markup=False, highlight=False)
            if self.console.is_terminal:
                self._bars.refresh()  # below it, as they are now
            return
        name = f"{self.title}: {event.stage}" if self.title else event.stage
        if self._running != name:
            self._end()
        stage = self._stages.get(name)
        if stage is None or stage.ended:
            stage = self._begin(name, stage)
        self._running = name
        stage.step, stage.total = event.step, event.total
        values = "  ".join(f"{key} {value:.3g}" for key, value in event.values.items())
        if stage.bar is not None:
            self._bars.update(
                stage.bar, completed=event.step, total=event.total or None, values=values
            )
        if event.ended or 0 < event.total <= event.step:
            self._end(values)
        elif stage.bar is None and not stage.announced and self.clock() - stage.begun > _LONG:
            stage.announced = True
            self._print(f"{name}: {event.step} of {event.total or '?'} after {self._took(stage)}")

    def _begin(self, name: str, before: _Stage | None) -> _Stage:
        """Return a stage that begins now, or again."""
        stage = self._stages[name] = _Stage(self.clock())
        if self.console.is_terminal:
            if before is not None and before.bar is not None:
                self._bars.remove_task(before.bar)  # the one of now stands at the end
            stage.bar = self._bars.add_task(name, total=None, values="", stopped=False)
        return stage

    def _end(self, values: str = "") -> None:
        """End the stage that runs, if one does: stop its clock, or print its line."""
        stage = self._stages.get(self._running)
        if stage is None or stage.ended:
            return
        stage.ended = True
        if stage.bar is None:
            if stage.step < stage.total <= 1:  # it failed at once; the error says why
                return
            tail = f", {values}" if values else ""
            self._print(f"{self._running}: {self._reached(stage)} in {self._took(stage)}{tail}")
            return
        stopped = stage.step < stage.total
        self._bars.update(stage.bar, total=stage.total or max(stage.step, 1), stopped=stopped)
        self._bars.stop_task(stage.bar)

    def _took(self, stage: _Stage) -> str:
        return f"{self.clock() - stage.begun:.3g} s"

    @staticmethod
    def _reached(stage: _Stage) -> str:
        if stage.step < stage.total:
            return f"stopped at {stage.step} of {stage.total}"
        return "done" if stage.total <= 1 else f"{stage.total} of {stage.total}"

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        if self.console.is_terminal:
            self._bars.stop()


def in_training(count: int) -> str:
    """Return how many victims are being trained, in words."""
    return f"{count} victim{'s' if count > 1 else ''} in training"


class CellsDisplay:
    """How far a grid is: a live table on a terminal, elsewhere a line whenever that changes.

    Use it as a context manager, so that the terminal is left in order.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool = False,
    ) -> None:
        """Show it on ``console``, by default on standard error; nothing if ``quiet``."""
        self.console = console or Console(stderr=True, quiet=quiet)
        self.clock = clock
        self._begun, self._at_first, self._last = clock(), -1, (-1, -1)
        self._live = Live(console=self.console, auto_refresh=False)

    def show(
        self, done: int, failed: int, total: int, running: Sequence[str], training: int = 0
    ) -> None:
        """Show the number of cells that are done, failed and running, and the time left.

        Args:
            done: Number of measured cells.
            failed: Number of failed cells.
            total: Number of cells.
            running: Names of the cells that are being measured.
            training: Number of victims that are being trained.
        """
        ready = done + failed
        if self._at_first < 0:
            self._at_first = ready
        counts = f"{done} of {total} cells done, {failed} failed, {len(running)} running"
        if training:
            counts += f", {in_training(training)}"
        if ready > self._at_first and ready < total:
            each = (self.clock() - self._begun) / (ready - self._at_first)
            counts += f", about {duration(each * (total - ready))} left"
        if self.console.is_terminal:
            table = Table(counts, title_justify="left", box=None)
            for name in running:
                table.add_row(Text(printable(name)))
            self._live.update(table, refresh=True)
        elif (ready, training) != self._last:
            self.console.print(counts, markup=False, highlight=False, soft_wrap=True)
        self._last = ready, training

    def say(self, text: str) -> None:
        """Print a sentence above the table."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
