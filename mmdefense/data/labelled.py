"""Inputs with a class label each: images, clips, point clouds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from mmdefense.data.batch import HeldSamples, TensorBatch, as_float
from mmdefense.errors import BadInputError

__all__ = ["Augmentation", "LabelledBatch", "LabelledSamples"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Maps a batch of inputs to randomly altered ones."""


@dataclass(frozen=True, slots=True, repr=False)
class LabelledBatch(TensorBatch):
    """``N`` inputs and their class labels.

    Attributes:
        inputs: Shape ``(N, ...)``; images are ``(N, C, H, W)`` in ``[0, 1]``.
        labels: Shape ``(N,)``, int64.
    """

    inputs: Tensor
    labels: Tensor

    def with_inputs(self, inputs: Tensor) -> LabelledBatch:
        """Return the same labels on other inputs."""
        return replace(self, inputs=inputs)


@dataclass(frozen=True, repr=False)
class LabelledSamples(HeldSamples):
    """A labelled set held in memory, on one device.

    Attributes:
        inputs: Shape ``(N, ...)``; uint8 is read as ``[0, 255]`` and scaled to ``[0, 1]`` by batch.
        labels: Shape ``(N,)``, int64.
        augmentation: Maps a batch of inputs to randomly altered ones; none leaves them as they are.
        classes: The name of each label, where known.
    """

    columns = ("inputs", "labels")
    types = MappingProxyType({"labels": torch.int64})

    inputs: Tensor
    labels: Tensor
    augmentation: Augmentation | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise BadInputError(
                f"inputs and labels must have the same length, got {len(self.inputs)} and "
                f"{len(self.labels)}"
            )
        if self.labels.ndim != 1 or self.labels.is_floating_point():
            raise BadInputError(
                f"labels must be integers of shape (N,), got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}"
            )

    def take(self, indices: Tensor) -> LabelledBatch:
        """Return the samples at ``indices`` as one batch, inputs as float32."""
        chosen = self.at(indices)
        return LabelledBatch(as_float(chosen["inputs"]), chosen["labels"])

    def augment(self, batch: LabelledBatch, generator: torch.Generator) -> LabelledBatch:
        """Return ``batch`` with its inputs augmented."""
        if self.augmentation is None:
            return batch
        return batch.with_inputs(self.augmentation(batch.inputs, generator))

    def strata(self) -> Tensor:
        """Return the labels, shape ``(len,)``."""
        return self.labels.cpu()

    def everything(self) -> LabelledBatch:
        """Return the whole set as one batch."""
        return LabelledBatch(as_float(self.inputs), self.labels)
