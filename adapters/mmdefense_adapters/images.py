"""What all image adapters share: reading data, augmentation, and the triggers that images carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdefense.augment import random_shift
from mmdefense.batches import LabelledBatch, LabelledSamples, Samples
from mmdefense.errors import BadInputError
from mmdefense.protocol import TriggerFamily

__all__ = ["ImageTriggers", "as_image_samples"]


def as_image_samples(data: Any) -> Samples[LabelledBatch]:
    """Return labelled images from samples, a pair of tensors, batches, or a dataset of pairs."""
    if hasattr(data, "take") and hasattr(data, "strata"):
        samples: Samples[LabelledBatch] = data
        return samples
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, Tensor) for x in data):
        return LabelledSamples(data[0], data[1].long(), augmentation=random_shift)
    pairs = [_pair(item) for item in data]
    if not pairs:
        raise BadInputError("clean data must hold at least one image, got none")
    stack = torch.cat if pairs[0][0].ndim == 4 else torch.stack
    images, labels = stack([x for x, _ in pairs]), torch.cat([y.reshape(-1) for _, y in pairs])
    return LabelledSamples(images, labels.long(), augmentation=random_shift)


def _pair(item: Any) -> tuple[Tensor, Tensor]:
    if isinstance(item, LabelledBatch):
        return item.inputs, item.labels
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Tensor):
        return item[0], torch.as_tensor(item[1])
    raise BadInputError(
        f"clean data must give pairs (image tensor, label), got {type(item).__name__}"
    )


class ImageTriggers:
    """Stamps raw triggers onto images; mixed into the image adapters."""

    def image_families(self, shape: tuple[int, ...]) -> list[TriggerFamily]:
        """Return the families for images of ``shape`` (C, H, W)."""
        channels, height, width = shape
        return [
            TriggerFamily("patch", (channels + 1, height, width)),
            TriggerFamily("additive", (channels, height, width)),
        ]

    def stamp(self, batch: LabelledBatch, family: TriggerFamily, triggers: Tensor) -> LabelledBatch:
        """Return ``batch`` with ``triggers`` applied, one a sample."""
        raise NotImplementedError

    def trigger_size(self, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return how much of the image each trigger alters."""
        raise NotImplementedError
