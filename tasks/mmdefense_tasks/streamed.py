"""Labelled sets that are decoded on access, sample by sample."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdefense.data.batch import Samples
from mmdefense.data.labelled import Augmentation, LabelledBatch, LabelledSamples

__all__ = ["StreamedSamples", "Undecoded"]

_WORKERS = 4
_BYTES_AT_ONCE = 2**26  # decoded at once when reading a whole set


class Undecoded(Protocol):
    """Samples that have not been decoded yet."""

    @property
    def labels(self) -> Tensor:
        """Shape ``(N,)``, int64."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label, if known."""
        ...


S = TypeVar("S", bound=Undecoded)


@dataclass(frozen=True, kw_only=True)
class StreamedSamples(ABC, Generic[S]):
    """A labelled set that decodes on ``take``; the protocol of ``Samples``.

    Attributes:
        source: The undecoded samples.
        shape: Shape of every input.
        indices: Which samples of the source are in the set, shape ``(len,)``.
        augmentation: Augments a batch of inputs at random.
        device: Device for batches.
    """

    source: S
    shape: tuple[int, ...]
    indices: Tensor
    augmentation: Augmentation | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @abstractmethod
    def _array(self, index: int) -> NDArray[np.uint8]:
        """Return the sample at ``index`` of the source, decoded, of the set's shape.

        Raises:
            BadInputError: If it cannot be decoded or does not fit the others.
        """

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Shape ``(len,)``, int64."""
        return self.source.labels[self.indices]

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label, if known."""
        return self.source.classes

    @property
    def bytes(self) -> int:
        """Size of the decoded set in memory."""
        return len(self) * int(np.prod(self.shape))

    def take(self, indices: Tensor) -> LabelledBatch:
        """Return the samples at ``indices`` as one batch, inputs as float32 in ``[0, 1]``."""
        chosen = self.indices[indices.cpu()]
        inputs = self._decode(chosen).to(self.device, non_blocking=True).float() / 255
        return LabelledBatch(inputs, self.source.labels[chosen].to(self.device))

    def augment(self, batch: LabelledBatch, generator: torch.Generator) -> LabelledBatch:
        """Return ``batch`` with its inputs augmented."""
        if self.augmentation is None:
            return batch
        return batch.with_inputs(self.augmentation(batch.inputs, generator))

    def subset(self, indices: Tensor) -> Self:
        """Return the subset of samples at ``indices``."""
        return replace(self, indices=self.indices[indices.cpu()])

    def strata(self) -> Tensor:
        """Return the labels, shape ``(len,)``."""
        return self.labels

    def to(self, device: torch.device) -> Self:
        """Return the set with batches on ``device``."""
        return replace(self, device=device)

    def fingerprint(self) -> str:
        """Return the same SHA-256 as for the set in memory; this decodes every sample."""
        digest = hashlib.sha256(str(((len(self), *self.shape), torch.uint8)).encode())
        for part in self._parts():
            digest.update(self._decode(part).numpy().tobytes())
        digest.update(str((tuple(self.labels.shape), self.labels.dtype)).encode())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def in_memory(self) -> LabelledSamples:
        """Return the set decoded, as uint8."""
        inputs = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        start = 0
        for part in self._parts():
            inputs[start : start + len(part)] = self._decode(part)
            start += len(part)
        return LabelledSamples(inputs, self.labels, self.augmentation, self.classes)

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.split(self.indices, max(1, _BYTES_AT_ONCE // int(np.prod(self.shape))))

    def _decode(self, indices: Tensor) -> Tensor:
        """Return samples as uint8, shape ``(N, ...)``; decoders release the GIL."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            arrays = list(pool.map(self._array, indices.tolist()))
        return torch.from_numpy(np.stack(arrays))


def _protocol(samples: StreamedSamples[S]) -> Samples[LabelledBatch]:
    """Let the type checker verify that this class satisfies the protocol."""
    return samples
