"""A grid over several processes of one machine. They share nothing but the store."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, MMDefenseError
from mmdefense.evaluation.grid import Grid, Planned, work
from mmdefense.notes import note
from mmdefense.report.terminal import CellsDisplay
from mmdefense.runtime.run import Event
from mmdefense.store import Store

__all__ = ["Standing", "run_workers", "standing"]

_LOOK = 0.5
"""Seconds between two looks at the store."""

_DEATHS = 3
"""Workers that may be killed, one after the other, without a cell done in between."""


@dataclass(frozen=True)
class Standing:
    """How far a grid is.

    Attributes:
        total: Number of cells.
        done: Of them, measured.
        failed: Of them, those that ended in an error.
        running: Names of the cells that processes are at work on.
    """

    total: int
    done: int
    failed: int
    running: tuple[str, ...]


def standing(store: Store, cells: Sequence[Planned]) -> Standing:
    """Return how far the cells of a grid are."""
    status = {entry.digest: entry.status for entry in store.entries("cell")}
    claimed = store.claimed()
    found = [status.get(cell.identity.digest) for cell in cells]
    return Standing(
        len(cells),
        found.count("done"),
        found.count("failed"),
        tuple(c.identity.name for c in cells if c.identity.digest in claimed),
    )


def run_workers(
    grid: Grid,
    folder: str | Path,
    count: int,
    display: CellsDisplay | None = None,
    *,
    devices: Sequence[str] = (),
    threads: int = 1,
) -> None:
    """Measure a grid with ``count`` processes; one that is killed is replaced.

    Args:
        grid: What is measured.
        folder: Of the store.
        count: Number of processes.
        display: Shows how far the grid is, and what the workers have to say.
        devices: Dealt out to the processes in turn; by default that of the grid.
        threads: Of each process.

    Raises:
        BadInputError: If a name is unknown, or workers are killed again and again.
    """
    cells, store = grid.planned(), Store(folder)
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()

    def start(index: int) -> Any:
        device = devices[index % len(devices)] if devices else grid.device
        given = (replace(grid, device=device), str(folder), threads, messages, os.getpid())
        worker = context.Process(target=_worker, args=given, name=f"worker {index}")
        worker.start()
        return worker

    workers = {index: start(index) for index in range(count)}
    tell = display.say if display is not None else note
    deaths, reached = 0, 0
    try:
        while workers:
            time.sleep(_LOOK)
            _pass_on(messages, tell)
            now = standing(store, cells)
            if display is not None:
                display.show(now.done, now.failed, now.total, now.running)
            if now.done + now.failed > reached:
                deaths, reached = 0, now.done + now.failed
            for index, worker in list(workers.items()):
                if worker.exitcode is None:
                    continue
                del workers[index]
                if worker.exitcode == 0:
                    continue
                deaths += 1
                if worker.exitcode > 0 or deaths > _DEATHS:
                    raise BadInputError(
                        f"{worker.name} ended with exit code {worker.exitcode}; what was measured "
                        f"is kept in {folder}, and the same command goes on from there"
                    )
                tell(f"{worker.name} was killed (signal {-worker.exitcode}); another takes over")
                workers[index] = start(index)
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()
        _pass_on(messages, tell)


def _pass_on(messages: Any, tell: Callable[[str], None]) -> None:
    while True:
        try:
            tell(messages.get_nowait())
        except queue.Empty:
            return


def _worker(grid: Grid, folder: str, threads: int, messages: Any, parent: int) -> None:
    """Work on a grid in a process of its own, for as long as the one that started it lives."""
    import torch

    torch.set_num_threads(threads)

    def progress(event: Event) -> None:
        if os.getppid() != parent:
            raise SystemExit(1)
        if event.note:
            messages.put(event.note)

    try:
        work(Store(folder), grid.planned(), progress)
    except (MMDefenseError, OSError) as error:
        messages.put(f"a worker stopped: {error}")
        raise SystemExit(2) from error
