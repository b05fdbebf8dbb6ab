"""What a batch and a sample set are in any domain. Kernels pass batches on and never open them.

A new kind of data is one module beside this one: a batch, a set, and the transforms of its domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from mmdefense.errors import BadInputError
from mmdefense.shown import Shown

__all__ = [
    "Batch",
    "HeldSamples",
    "Samples",
    "TensorBatch",
    "Views",
    "as_float",
    "batches",
    "few",
    "split",
]

Views = Literal["standard", "insertions", "none"]
"""How clean samples are augmented in training.

``"standard"``: as is usual in the domain: crop (and mirror, where the model is as right about
mirrored samples) for images and clips; scale, shift (and mirror) for detection; turn and jitter for
point clouds; nothing for text. Samples that bring an augmentation of their own keep it.
``"insertions"``: ours; noise rectangles, gathered points or random words are inserted as well,
which imitates local triggers. ``"none"``: not at all.
"""


class Batch(Protocol):
    """``N`` samples that a model reads at once."""

    def __len__(self) -> int:
        """Return the number of samples N."""
        ...

    def rows(self, rows: slice) -> Self:
        """Return consecutive samples of the batch."""
        ...


B = TypeVar("B", bound=Batch)


class Samples(Protocol[B]):
    """A finite set of samples that can be read in any order, more than once."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def take(self, indices: Tensor) -> B:
        """Return the samples at ``indices``, shape ``(N,)``, as one batch on the model's device."""
        ...

    def augment(self, batch: B, generator: torch.Generator) -> B:
        """Return a randomly altered copy of ``batch``, drawn from ``generator``."""
        ...

    def subset(self, indices: Tensor) -> Samples[B]:
        """Return the samples at ``indices`` as a set of their own."""
        ...

    def strata(self) -> Tensor | None:
        """Return an integer per sample to balance a split by, shape ``(len,)``, or none."""
        ...

    def to(self, device: torch.device) -> Samples[B]:
        """Return the set with its batches delivered on ``device``."""
        ...

    def in_memory(self) -> Samples[B]:
        """Return the set decoded into memory; a set in memory returns itself."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content, the same for the same samples in the same order."""
        ...


class TensorBatch(Shown):
    """A dataclass whose fields have one row a sample: tensors, or tuples."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def rows(self, rows: slice) -> Self:
        """Return consecutive samples; all of them are the batch itself."""
        if rows == slice(0, len(self)):
            return self
        cut = {field.name: getattr(self, field.name)[rows] for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **cut)  # type: ignore[type-var]


class HeldSamples(Shown):
    """A set held in memory: a dataclass, some fields of which are columns with one row a sample.

    A column is a tensor, a tuple, or a :class:`TensorBatch`.
    """

    columns: ClassVar[tuple[str, ...]]
    """Names of the fields that have one row a sample."""

    types: ClassVar[Mapping[str, torch.dtype]] = MappingProxyType({})
    """The types that columns have on a model's device; others stay as they are."""

    def __len__(self) -> int:
        return len(getattr(self, self.columns[0]))

    def at(self, indices: Tensor) -> dict[str, Any]:
        """Return the columns of the samples at ``indices``, shape ``(N,)``, by name."""
        return {name: _picked(getattr(self, name), indices) for name in self.columns}

    def subset(self, indices: Tensor) -> Self:
        """Return the samples at ``indices`` as a set of their own."""
        return replace(self, **self.at(indices))  # type: ignore[type-var]

    def strata(self) -> Tensor | None:
        """Return none: a sample is not of one class."""
        return None

    def to(self, device: torch.device) -> Self:
        """Return the set on ``device``."""
        held = {name: getattr(self, name) for name in self.columns}
        moved = {k: _moved(value, device, self.types.get(k)) for k, value in held.items()}
        return replace(self, **moved)  # type: ignore[type-var]

    def in_memory(self) -> Self:
        """Return the set itself."""
        return self

    def fingerprint(self) -> str:
        """Return a SHA-256 over all columns: shapes, types and contents."""
        digest = hashlib.sha256()
        for name in self.columns:
            for part in _parts(getattr(self, name)):
                digest.update(part)
        return digest.hexdigest()


def _picked(column: Any, indices: Tensor) -> Any:
    if isinstance(column, Tensor):
        return column[indices.to(column.device, non_blocking=True)]  # otherwise the host waits here
    if isinstance(column, tuple):
        return tuple(column[index] for index in indices.tolist())
    return replace(
        column, **{f.name: _picked(getattr(column, f.name), indices) for f in fields(column)}
    )


def _moved(column: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(column, Tensor):
        return column.to(device, dtype)
    if isinstance(column, tuple):
        return tuple(_moved(value, device, dtype) for value in column)
    if isinstance(column, str):
        return column
    moved = {f.name: _moved(getattr(column, f.name), device, dtype) for f in fields(column)}
    return replace(column, **moved)


def _parts(column: Any) -> Iterator[bytes]:
    """Yield the content of a column, so that equal columns yield the same."""
    if isinstance(column, Tensor):
        yield str((tuple(column.shape), column.dtype)).encode()
        yield column.detach().cpu().contiguous().numpy().tobytes()
    elif isinstance(column, str):
        yield f"{len(column)} {column}".encode()
    else:
        whole = isinstance(column, tuple)
        for value in column if whole else (getattr(column, f.name) for f in fields(column)):
            yield from _parts(value)


def as_float(inputs: Tensor) -> Tensor:
    """Return uint8 scaled from ``[0, 255]`` to ``[0, 1]``, and anything else as it is."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def batches(samples: Samples[B], size: int) -> Iterator[B]:
    """Yield ``samples`` in order, ``size`` at a time; the last batch may be smaller."""
    for start in range(0, len(samples), size):
        yield samples.take(torch.arange(start, min(start + size, len(samples))))


def few(samples: Samples[B], count: int) -> Samples[B]:
    """Return at most ``count`` samples, evenly from the whole set."""
    total = len(samples)
    return samples.subset(torch.linspace(0, total - 1, min(count, total)).round().long())


def split(samples: Samples[B], fraction: float, seed: int) -> tuple[Samples[B], Samples[B]]:
    """Split ``samples`` into two parts at random, each stratum in the same proportion.

    Args:
        samples: The set to split.
        fraction: Share of the second part, in ``(0, 1)``; it gets at least one sample.
        seed: Makes the split reproducible.

    Returns:
        The larger and the smaller part, disjoint, together all samples.

    Raises:
        BadInputError: If there are fewer than two samples.

    Example:
        >>> fit, holdout = split(samples, 0.2, seed=0)
        >>> len(samples), len(fit), len(holdout)
        (30, 24, 6)
    """
    order, held = _split_order(samples, fraction, seed)
    return samples.subset(order[~held]), samples.subset(order[held])


def folds(
    samples: Samples[B], fraction: float, seed: int, most: int = 5
) -> list[tuple[Samples[B], Samples[B]]]:
    """Split ``samples`` several times, so that each is held out once (cross-validation).

    Args:
        samples: The set to split.
        fraction: Share that the first split holds out, in ``(0, 1)``.
        seed: Makes the splits reproducible.
        most: Largest number of splits.

    Returns:
        Pairs of a part to fit and a part that is held out, the first as :func:`split` gives it;
        the others hold out the rest in equal parts, each stratum in the same proportion.

    Raises:
        BadInputError: If there are fewer than two samples.

    Example:
        >>> [len(holdout) for _, holdout in folds(samples, 0.2, seed=0)]
        [6, 6, 6, 6, 6]
    """
    order, held = _split_order(samples, fraction, seed)
    parts = [held]
    rest = (~held).nonzero().squeeze(1)
    others = min(most, max(2, round(1 / fraction)), len(order)) - 1
    for first in range(others):
        part = torch.zeros_like(held)
        part[rest[first::others]] = True
        parts.append(part)
    return [
        (samples.subset(order[~part]), samples.subset(order[part]))
        for part in parts
        if part.any() and not part.all()
    ]


def _split_order(samples: Samples[B], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the samples' indices, stratum by stratum, and a mask over these of what is held out.

    Raises:
        BadInputError: If there are fewer than two samples.
    """
    total = len(samples)
    if total < 2:
        raise BadInputError(f"clean data must hold at least 2 samples, got {total}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    strata = samples.strata()
    if strata is not None:  # by stratum, so that an even stride samples each in proportion
        order = order[strata[order].argsort(stable=True)]
    held = torch.linspace(0, total - 1, max(1, round(fraction * total))).round().long()
    mask = torch.zeros(total, dtype=torch.bool)
    mask[held] = True
    return order, mask
