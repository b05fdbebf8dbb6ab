"""A grid on several processes of one machine, which share nothing but the store."""

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
"""Seconds between two checks of the store."""

_DEATHS = 3
"""Workers that may be killed one after the other without a finished cell in between."""


@dataclass(frozen=True)
class Standing:
    """The progress of a grid.

    Attributes:
        total: Number of cells.
        done: Number of measured cells.
        failed: Number of cells that ended in an error.
        running: Names of the cells that processes are working on.
        training: Number of victims that processes are training.
    """

    total: int
    done: int
    failed: int
    running: tuple[str, ...]
    training: int


def standing(store: Store, cells: Sequence[Planned]) -> Standing:
    """Return the progress of the cells of a grid."""
    status = {entry.digest: entry.status for entry in store.entries("cell")}
    claimed = store.claimed()
    found = [status.get(cell.identity.digest) for cell in cells]
    running = tuple(c.identity.name for c in cells if c.identity.digest in claimed)
    return Standing(
        len(cells),
        found.count("done"),
        found.count("failed"),
        running,
        len(claimed) - len(running),
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
        grid: The grid.
        folder: Folder of the store.
        count: Number of processes.
        display: Shows the progress of the grid, and messages of the workers.
        devices: Assigned to the processes in turn; by default that of the grid.
        threads: Threads of each process.

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
        receiver, sender = context.Pipe(duplex=False)  # one each: no shared lock
        given = (mine, str(folder), threads, sender, os.getpid())
        process = context.Process(target=_work, args=given, name=f"worker {index}")
        process.start()
        sender.close()
        return _Worker(process, receiver)

    workers = {index: start(index) for index in range(count)}
    say = display.say if display is not None else note
    say_once = _without_repeats(say)
    deaths, reached = 0, 0
    try:
        while workers:
            time.sleep(_LOOK)
            now = standing(store, cells)
            if display is not None:
                display.show(now.done, now.failed, now.total, now.running, now.training)
            if now.done + now.failed > reached:
                deaths, reached = 0, now.done + now.failed
            for index, worker in list(workers.items()):
                worker.forward(say_once)
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
                        f"kept in {folder}; repeat the command to continue"
                    )
                say(f"{worker.process.name} was killed (signal {-code}); another one takes over")
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
    """A process, and the pipe that its messages come from."""

    process: Any
    receiver: Any

    def forward(self, say: Callable[[str], None]) -> None:
        """Pass its messages to ``say``."""
        try:
            while self.receiver.poll():
                say(self.receiver.recv())
        except EOFError:  # it has ended
            return


def _without_repeats(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that shows each message once, even if all workers send it."""
    seen: set[str] = set()

    def say_once(text: str) -> None:
        if text not in seen:
            seen.add(text)
            say(text)

    return say_once


def _can_fork(grid: Grid, threads: int) -> bool:
    """Return whether workers can be forks, which inherit all libraries and data sets.

    CUDA does not survive a fork, nor do PyTorch's threads; and a lock that another thread holds
    would never be released.
    """
    single = threads == 1 and threading.active_count() == 1
    return single and sys.platform == "linux" and grid.device == "cpu"


def _work(cells: Sequence[Planned], folder: str, threads: int, sender: Any, parent: int) -> None:
    """Measure cells in a worker process, as long as the process that started it lives."""
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
