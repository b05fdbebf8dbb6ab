"""The batch types that adapters and tasks share. Kernels carry them and never open one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmdefense.errors import BadInputError

__all__ = ["Augmentation", "LabelledBatch", "LabelledSamples", "Samples", "batches", "split"]

B_out = TypeVar("B_out", covariant=True)
B = TypeVar("B")

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


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

    def fingerprint(self) -> str:
        """Return a hash of the content, the same for the same samples in the same order."""
        ...


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """``N`` inputs and their class labels.

    Attributes:
        inputs: Shape ``(N, ...)``; images are ``(N, C, H, W)`` in ``[0, 1]``.
        labels: Shape ``(N,)``, int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def with_inputs(self, inputs: Tensor) -> LabelledBatch:
        """Return the same labels on other inputs."""
        return replace(self, inputs=inputs)


@dataclass(frozen=True)
class LabelledSamples:
    """A labelled set held in memory, on one device.

    Attributes:
        inputs: Shape ``(N, ...)``; uint8 is read as ``[0, 255]`` and scaled to ``[0, 1]`` by batch.
        labels: Shape ``(N,)``, int64.
        augmentation: Maps a batch of inputs to randomly altered ones; none leaves them as they are.
        classes: The name of each label, where known.
    """

    inputs: Tensor
    labels: Tensor
    augmentation: Augmentation | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise BadInputError(
                f"inputs and labels must have one length, got {len(self.inputs)} and "
                f"{len(self.labels)}"
            )
        if self.labels.ndim != 1 or self.labels.is_floating_point():
            raise BadInputError(
                f"labels must be whole numbers of shape (N,), got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> LabelledBatch:
        """Return the samples at ``indices`` as one batch, inputs as float32."""
        indices = indices.to(self.labels.device, non_blocking=True)  # or the host waits here
        return LabelledBatch(_as_float(self.inputs[indices]), self.labels[indices])

    def augment(self, batch: LabelledBatch, generator: torch.Generator) -> LabelledBatch:
        """Return ``batch`` with its inputs augmented."""
        if self.augmentation is None:
            return batch
        return batch.with_inputs(self.augmentation(batch.inputs, generator))

    def subset(self, indices: Tensor) -> LabelledSamples:
        """Return the samples at ``indices`` as a set of their own."""
        indices = indices.to(self.labels.device)
        return replace(self, inputs=self.inputs[indices], labels=self.labels[indices])

    def strata(self) -> Tensor:
        """Return the labels, shape ``(len,)``."""
        return self.labels.cpu()

    def to(self, device: torch.device) -> LabelledSamples:
        """Return the set on ``device``."""
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device).long())

    def fingerprint(self) -> str:
        """Return a SHA-256 over inputs and labels."""
        import hashlib

        digest = hashlib.sha256()
        for tensor in (self.inputs, self.labels):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def everything(self) -> LabelledBatch:
        """Return the whole set as one batch."""
        return LabelledBatch(_as_float(self.inputs), self.labels)


def _as_float(inputs: Tensor) -> Tensor:
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def batches(samples: Samples[B], size: int) -> Iterator[B]:
    """Yield ``samples`` in order, ``size`` at a time; the last batch may be smaller."""
    for start in range(0, len(samples), size):
        yield samples.take(torch.arange(start, min(start + size, len(samples))))


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
    """
    total = len(samples)
    if total < 2:
        raise BadInputError(f"clean data must hold at least 2 samples, got {total}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    strata = samples.strata()
    if strata is not None:
        order = _spread(order, strata)
    held = torch.linspace(0, total - 1, max(1, round(fraction * total))).round().long()
    mask = torch.zeros(total, dtype=torch.bool)
    mask[held] = True
    return samples.subset(order[~mask]), samples.subset(order[mask])


def _spread(order: Tensor, strata: Tensor) -> Tensor:
    """Sort a random ``order`` by stratum, so that an even stride visits each in proportion."""
    return order[strata[order].argsort(stable=True)]


def describe(batch: Any) -> str:
    """Return a short description of a batch for messages."""
    return f"{type(batch).__name__} of {len(batch)}"
