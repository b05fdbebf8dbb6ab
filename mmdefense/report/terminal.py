"""Progress on a terminal as bars, and elsewhere as a line for each stage."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from mmdefense.kernels.run import Event

__all__ = ["ProgressDisplay"]


class ProgressDisplay:
    """A callback for progress; what it shows goes to standard error.

    Use it as a context manager, so that the terminal is left in order.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Show progress on ``console``; by default on standard error."""
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=self.console,
        )
        self._stages: dict[str, TaskID] = {}
        self.title = ""

    def __call__(self, event: Event) -> None:
        """Show one sign of progress, or a note as a line of its own."""
        if event.note:
            self.console.print(event.note, markup=False, highlight=False)
            return
        name = f"{self.title}: {event.stage}" if self.title else event.stage
        if not self.console.is_terminal:
            if name not in self._stages:
                self._stages[name] = TaskID(len(self._stages))
                self.console.print(f"{name} ...", markup=False, highlight=False)
            return
        if name not in self._stages:
            self._stages[name] = self._bars.add_task(name, total=event.total, figures="")
        figures = "  ".join(f"{key} {value:.3g}" for key, value in event.figures.items())
        self._bars.update(
            self._stages[name], completed=event.step, total=event.total, figures=figures
        )

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
        if self.console.is_terminal:
            self._bars.stop()
