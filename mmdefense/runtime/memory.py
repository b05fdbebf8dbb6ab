"""Batches that do not fit into memory, computed in parts with the same result.

When memory runs out, partial results are discarded, random states and statistics are restored, and
the same is computed in parts of half the size, down to one sample. The size is kept for the rest of
the run, separately for each kind of work: a second derivative needs more memory than a score.

A sum over samples is the same in parts. Three things differ in their bits: BatchNorm in train mode
normalises by its part and updates its statistics once per part; Dropout draws a mask for each part;
and on CUDA a part draws other random signs than the whole batch.

If several processes compute a run (:mod:`mmdefense.runtime.processes`), each computes its rows of a
batch in its own parts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Batch
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.notes import note
from mmdefense.runtime.processes import sharing

__all__ = [
    "RandomState",
    "Room",
    "add_up",
    "each_fitted",
    "fitted",
    "gradient_in_parts",
    "in_parts",
    "is_out_of_memory",
    "roomy",
    "saved_bytes",
    "shared",
]

B = TypeVar("B", bound=Batch)
T = TypeVar("T")

_SIGNS = (
    "can't allocate memory",  # the allocator of the CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


_ONE_VALUE = "more than 1 value per channel"  # in the error of PyTorch's BatchNorm for one sample


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@dataclass
class Room:
    """How many samples fit into memory at once, as far as is known.

    Attributes:
        sizes: Number of samples by kind of work; work that is not listed has always fitted.
        notify: Called once, with a sentence, after a smaller size has worked.
        notified: Whether it was called.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    notify: Callable[[str], None] = note
    notified: bool = False

    def served(self, what: str, count: int) -> None:
        """Notify the user, once, that work continues in parts."""
        if not self.notified:
            self.notified = True
            self.notify(
                f"memory ran out in {what} with {count} samples at once; continuing with "
                f"micro-batches of at most {self.sizes[what]}, and smaller ones if needed"
            )


_ROOM: ContextVar[Room | None] = ContextVar("room", default=None)
_ROOMS: WeakKeyDictionary[nn.Module, Room] = WeakKeyDictionary()  # by model, outside of a run


@contextmanager
def roomy(room: Room) -> Iterator[None]:
    """Use ``room`` for all work inside."""
    token = _ROOM.set(room)
    try:
        yield
    finally:
        _ROOM.reset(token)


class RandomState:
    """All random states and statistics that a pass over a batch changes, to restore them."""

    def __init__(self, model: nn.Module, generator: torch.Generator | None = None) -> None:
        """Save the global generators, ``generator``, and the statistics that ``model`` updates."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.device = device if device.type == "cuda" else None
        self.host = torch.get_rng_state()
        self.cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)
        self.generator = generator
        self.drawn = None if generator is None else generator.get_state()
        self.statistics = [(b, b.clone()) for b in _statistics(model)]

    def restore(self) -> None:
        """Restore all of them."""
        torch.set_rng_state(self.host)
        if self.device is not None and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        if self.generator is not None and self.drawn is not None:
            self.generator.set_state(self.drawn)
        for buffer, value in self.statistics:
            buffer.copy_(value)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            yield from module.buffers(recurse=False)


def saved_bytes(compute: Callable[[], object], model: nn.Module) -> int:
    """Return how many bytes the graph of a computation keeps for its backward pass.

    The weights of ``model`` are not counted.
    """
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = compute()  # with its graph, or the addresses would be reused
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del held
    return sum(sizes.values())


def fitted(
    compute: Callable[[Sequence[slice]], T],
    count: int,
    what: str,
    model: nn.Module,
    generator: torch.Generator | None = None,
    *,
    share: slice | None = None,
) -> T:
    """Return ``compute(rows)``, where ``rows`` are the parts of a batch that fit into memory.

    Args:
        compute: Computes a batch in the given parts, one after the other; it is called again from
            the start if memory runs out in one. It must leave nothing behind when it fails.
        count: Number N of samples in the batch.
        what: The kind of work, as it is named in messages.
        model: The model that runs; its statistics are restored after a failed attempt.
        generator: A generator that ``compute`` draws from besides the global ones.
        share: Rows of the batch to compute; by default all.

    Raises:
        UnsupportedError: If even one sample does not fit.
        BadInputError: If BatchNorm would have to normalise by one sample.
    """
    room = _ROOM.get() or _ROOMS.setdefault(model, Room())
    share = slice(0, count) if share is None else share
    count = share.stop - share.start
    first = size = min(count, room.sizes.get(what, count))
    while True:
        before = RandomState(model, generator)
        try:
            result = compute(_rows(share, size))
        except ValueError as error:
            if _ONE_VALUE not in str(error):
                raise
            raise BadInputError(
                "BatchNorm in train mode needs at least 2 samples at a time to normalise by, got "
                f"{size} of {count}; use larger batches (--set batch_size=32)"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= 1:
                raise UnsupportedError(
                    f"memory ran out in {what} with one sample at a time; free some memory, or use "
                    "smaller inputs, a device with more memory, or a defense that needs less, such "
                    "as fine-tuning"
                ) from error
        else:
            if size < first:
                room.served(what, first)
            return result
        # Not in the except block, where the error would keep the failed attempt's tensors alive.
        before.restore()
        size = room.sizes[what] = size // 2
        gc.collect()
        if before.device is not None:
            torch.cuda.empty_cache()


def _rows(share: slice, size: int) -> list[slice]:
    """Return as few parts of at most ``size`` as possible, about equally large."""
    count = share.stop - share.start
    parts = -(-count // max(1, size)) or 1
    edges = [share.start + count * index // parts for index in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def shared(
    compute: Callable[[Sequence[slice]], Sequence[Tensor]],
    count: int,
    what: str,
    model: nn.Module,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return tensors that are sums over the samples of a batch, each process computing its rows.

    See :func:`fitted` for the arguments.
    """
    processes = sharing(count)
    rows = processes.rows(count)
    found = processes.sum(fitted(compute, count, what, model, generator, share=rows))
    processes.average(list(_statistics(model)))
    return found


def each_fitted(
    compute: Callable[[slice], T],
    count: int,
    what: str,
    model: nn.Module,
    generator: torch.Generator | None = None,
) -> list[T]:
    """Return ``compute`` of each part of a batch that fits into memory; see :func:`fitted`.

    Each of several processes computes its rows, and all get all parts.
    """
    processes = sharing(count)

    def each(rows: Sequence[slice]) -> list[T]:
        return [compute(row) for row in rows]

    share = processes.rows(count)
    return processes.gather(fitted(each, count, what, model, generator, share=share))


def in_parts(
    compute: Callable[[B], T],
    batch: B,
    what: str,
    model: nn.Module,
    generator: torch.Generator | None = None,
) -> list[T]:
    """Return ``compute`` of each part of a batch, as :func:`each_fitted` does of its rows."""
    count = len(batch)
    return each_fitted(lambda row: compute(batch.rows(row)), count, what, model, generator)


def gradient_in_parts(
    value: Callable[[slice], tuple[Tensor, Tensor]],
    count: int,
    parameters: Sequence[Tensor],
    what: str,
    model: nn.Module,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss of a batch, and the gradient of an objective, also a mean.

    Args:
        value: Returns the loss and the objective of some rows of the batch, with graph.
        count: Number N of samples in the batch.
        parameters: What to differentiate with respect to.
        what: The kind of work, as it is named in messages.
        model: The model that runs.
        generator: A generator that ``value`` draws from besides the global ones.
    """

    def compute(rows: Sequence[slice]) -> list[Tensor]:
        mean: Any = 0
        gradient: list[Tensor] = []
        for row in rows:
            share = (row.stop - row.start) / count
            loss, objective = value(row)
            found = torch.autograd.grad(objective * share, parameters, materialize_grads=True)
            add_up(gradient, found)
            mean = mean + share * loss.detach()
        return [mean, *gradient]

    mean, *gradient = shared(compute, count, what, model, generator)
    return mean, gradient


def add_up(total: list[Tensor], more: Sequence[Tensor]) -> None:
    """Add tensors to ``total``, which may still be empty."""
    total[:] = torch._foreach_add(total, list(more)) if total else more
