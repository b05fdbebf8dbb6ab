"""One purification computed by several processes, each with its own device.

Every process holds the whole model and runs the same code; they share the work on each batch. All
randomness depends on seed, stage and step alone, so all draw the same batch; each computes its own
rows, gradients are summed over the processes, and all take the same step: data parallelism. The
hooks of ``DistributedDataParallel`` do not fit, since they sum in the backward pass, where FIP
first needs the gradient that it differentiates again.

The result is that of one process up to the order in which floats are summed. The exceptions are
those of a batch computed in parts (:mod:`mmdefense.runtime.memory`): BatchNorm in train mode
normalises by the rows of its process (no SyncBatchNorm) and keeps the mean of their statistics,
and Dropout draws a mask for each process.

The main process keeps the time, reads and writes the saved states, and is the only one to report.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mmdefense.checkpoints.runs import RunStore
from mmdefense.errors import BadInputError, LostProcessError, one_line
from mmdefense.libraries import needed
from mmdefense.runtime.deadline import Deadline

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Processes", "joined", "launched", "present", "refuse_launcher", "sharing", "together"]

T = TypeVar("T")

_WAIT = timedelta(minutes=30)  # for a process that neither responds nor ends
_BUCKET = 1 << 24  # entries to sum at once


class Processes:
    """The processes of a run; this class is a single process, the default.

    Attributes:
        index: Number of this process; 0 is the main one.
        count: Number of processes.
        splits: Whether they also shard the weights in training, if the defense can.
    """

    index: int = 0
    count: int = 1
    splits: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process reads and writes for all."""
        return self.index == 0

    def rows(self, total: int) -> slice:
        """Return this process's rows of a batch of ``total``."""
        return slice(*(total * index // self.count for index in (self.index, self.index + 1)))

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum over processes of each tensor, bit-identical in all of them."""
        return list(tensors)

    def average(self, statistics: Sequence[Tensor]) -> None:
        """Replace statistics by their mean over processes, in place; integers stay."""

    def gather(self, values: list[T]) -> list[T]:
        """Return the values of all processes in one list, in their order."""
        return values

    def from_main(self, value: T) -> T:
        """Return the main process's value."""
        return value

    def deadline(self, deadline: Deadline) -> Deadline:
        """Return the main process's deadline, by its clock."""
        return deadline

    def store(self, store: RunStore | None) -> RunStore | None:
        """Return a store that only the main process reads and writes, for all."""
        return store


class _Joined(Processes):
    """Several processes that a launcher started, connected by ``accelerate``."""

    def __init__(self, accelerator: Accelerator, *, splits: bool = False) -> None:
        self.accelerator, self.splits = accelerator, splits
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        summed: list[Tensor] = []
        for some in _buckets(tensors):
            flat = torch.cat([tensor.detach().flatten() for tensor in some])
            with self._explained_loss():
                flat = self.accelerator.reduce(flat, "sum")
            parts = flat.split([tensor.numel() for tensor in some])
            # In the given memory format, or the next steps would be slower.
            summed += [
                torch.empty_like(tensor).copy_(part.view(tensor.shape))
                for tensor, part in zip(some, parts, strict=True)
            ]
        return summed

    def average(self, statistics: Sequence[Tensor]) -> None:
        floats = [tensor for tensor in statistics if tensor.is_floating_point()]
        for tensor, total in zip(floats, self.sum(floats), strict=True):
            tensor.copy_(total / self.count)

    def gather(self, values: list[T]) -> list[T]:
        from accelerate.utils import gather_object, send_to_device

        with self._explained_loss():
            found = gather_object(send_to_device(values, "cpu"))
        gathered: list[T] = send_to_device(found, self.accelerator.device)
        return gathered

    def from_main(self, value: T) -> T:
        from accelerate.utils import broadcast_object_list

        held = [value if self.is_main else None]
        with self._explained_loss():
            broadcast_object_list(held)
        received: T = held[0]  # type: ignore[assignment]
        return received

    def deadline(self, deadline: Deadline) -> Deadline:
        return Deadline(self.from_main(deadline.at), lambda: self.from_main(deadline.clock()))

    def store(self, store: RunStore | None) -> RunStore | None:
        return None if store is None else _SharedStore(store.folder, store.every, processes=self)

    @contextmanager
    def _explained_loss(self) -> Iterator[None]:
        """Explain an error of the connection as the end of another process."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"one of the {self.count} processes has ended; its own message says why "
                f"({one_line(error)})"
            ) from error


@dataclass(frozen=True)
class _SharedStore(RunStore):
    """A store on the disk of the main process."""

    processes: Processes = field(kw_only=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        if self.processes.is_main:
            super().save(name, state)

    def load(self, name: str) -> dict[str, Any] | None:
        return self.processes.from_main(super().load(name) if self.processes.is_main else None)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in order, as many at a time as fit into one message."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(one.numel() for one in some) + tensor.numel() > _BUCKET:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


_ALONE = Processes()
_PRESENT: ContextVar[Processes] = ContextVar("processes", default=_ALONE)


def present() -> Processes:
    """Return the processes that compute the current work together."""
    return _PRESENT.get()


def sharing(total: int) -> Processes:
    """Return the processes that share a batch; with fewer rows than processes, each works alone."""
    processes = present()
    return processes if total >= processes.count else _ALONE


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Share the work inside among ``processes``, each of which must run this block."""
    token = _PRESENT.set(processes)
    try:
        yield
    finally:
        _PRESENT.reset(token)


def launched() -> int:
    """Return the number of processes that a launcher, such as torchrun, reports to have started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_launcher(command: str) -> None:
    """Refuse to run a single-process command in several launched processes.

    Raises:
        BadInputError: If a launcher has started several processes.
    """
    if launched() > 1:
        raise BadInputError(
            f"{command} runs in one process, but a launcher has started {launched()} "
            "(WORLD_SIZE); start it without the launcher"
        )


@contextmanager
def joined(*, splits: bool = False) -> Iterator[tuple[Processes, str]]:
    """Connect the processes that a launcher started.

    Args:
        splits: Whether they also shard the weights in training.

    Yields:
        The processes, and the device of this one.

    Raises:
        BadInputError: If no launcher started several processes.
        UnsupportedError: If ``accelerate`` is not installed.
        LostProcessError: If they cannot be connected.
    """
    if launched() < 2:
        raise BadInputError(
            "--accelerate needs several processes; start them by torchrun --nproc-per-node 2 -m "
            "mmdefense purify ... --accelerate"
        )
    with needed("--accelerate", "accelerate"):
        from accelerate import Accelerator, InitProcessGroupKwargs
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_WAIT)],
        )
    except (RuntimeError, ValueError) as error:
        raise LostProcessError(
            f"the processes of --accelerate cannot be connected: {one_line(error)}"
        ) from error
    try:
        device = accelerator.device
        yield _Joined(accelerator, splits=splits), "cpu" if device.type == "cpu" else str(device)
    finally:
        accelerator.end_training()
