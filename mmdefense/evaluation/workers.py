"""A grid over several processes of one machine. They share nothing but the store."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

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
        BadInputError: If a name is unknown, devices are of two kinds, or workers are killed again
            and again.
    """
    _check_one_kind(devices)
    cells, store = grid.planned(), Store(folder)
    context: Any = multiprocessing.get_context("fork" if _can_fork(grid, threads) else "spawn")

    def start(index: int) -> _Worker:
        device = devices[index % len(devices)] if devices else grid.device
        mine = [replace(cell, device=device) for cell in cells]
        heard, sender = context.Pipe(duplex=False)  # each has its own: no lock to be killed with
        given = (mine, str(folder), threads, sender, os.getpid())
        process = context.Process(target=_work, args=given, name=f"worker {index}")
        process.start()
        sender.close()
        return _Worker(process, heard)

    workers = {index: start(index) for index in range(count)}
    say = display.say if display is not None else note
    tell = _once(say)
    deaths, reached = 0, 0
    try:
        while workers:
            time.sleep(_LOOK)
            now = standing(store, cells)
            if display is not None:
                display.show(now.done, now.failed, now.total, now.running)
            if now.done + now.failed > reached:
                deaths, reached = 0, now.done + now.failed
            for index, worker in list(workers.items()):
                worker.pass_on(tell)
                code = worker.process.exitcode
                if code is None:
                    continue
                del workers[index]
                if code == 0:
                    continue
                deaths += 1
                if code > 0 or deaths > _DEATHS:
                    raise BadInputError(
                        f"{worker.process.name} ended with exit code {code}; finished cells are "
                        f"kept in {folder}; the same command continues"
                    )
                say(f"{worker.process.name} was killed (signal {-code}); another takes over")
                workers[index] = start(index)
    finally:
        for worker in workers.values():
            worker.process.terminate()
            worker.process.join()


def _check_one_kind(devices: Sequence[str]) -> None:
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise BadInputError(
            f"workers must compute on devices of one kind, got {', '.join(devices)}: results "
            "differ between kinds in their last bits"
        )


@dataclass(frozen=True)
class _Worker:
    """A process, and the end of the pipe that its messages come out of."""

    process: Any
    heard: Any

    def pass_on(self, tell: Callable[[str], None]) -> None:
        """Tell what it has to say."""
        try:
            while self.heard.poll():
                tell(self.heard.recv())
        except EOFError:  # it has ended
            return


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Return what tells each sentence once, though all workers say it."""
    said: set[str] = set()

    def tell_once(text: str) -> None:
        if text not in said:
            said.add(text)
            tell(text)

    return tell_once


def _can_fork(grid: Grid, threads: int) -> bool:
    """Say whether workers can be forks, which have all libraries and data sets of this process.

    CUDA does not survive a fork, nor do the threads of PyTorch; and a lock that another thread
    holds would be held forever.
    """
    single = threads == 1 and threading.active_count() == 1
    return single and sys.platform == "linux" and grid.device == "cpu"


def _work(cells: Sequence[Planned], folder: str, threads: int, sender: Any, parent: int) -> None:
    """Measure cells in a process of its own, for as long as the one that started it lives."""
    torch.set_num_threads(threads)

    def warned(message: Warning | str, *_: Any) -> None:
        sender.send(str(message))

    warnings.showwarning = warned  # type: ignore[assignment]

    def progress(event: Event) -> None:
        if os.getppid() != parent:
            raise SystemExit(1)
        if event.note:
            sender.send(event.note)

    try:
        work(Store(folder), cells, progress)
    except (MMDefenseError, OSError) as error:
        sender.send(f"a worker stopped: {error}")
        raise SystemExit(2) from error
