"""Shared parts of image adapters: reading data, mirroring, and image triggers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmdefense.data.batch import Samples
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.protocol import TriggerFamily
from mmdefense_adapters.given import labelled_tensors

__all__ = ["ImageTriggers", "as_labelled_samples", "mirrored"]


def mirrored(batch: LabelledBatch) -> LabelledBatch:
    """Return images or clips mirrored left to right."""
    return batch.with_inputs(batch.inputs.flip(-1))


def as_labelled_samples(data: Any, *, axes: int = 3) -> Samples[LabelledBatch]:
    """Convert the user's data to labelled samples.

    Args:
        data: Samples; or a pair of tensors or arrays, batches, or a data set, see
            :func:`~mmdefense_adapters.given.labelled_tensors`.
        axes: Number of axes of one input: 3 for an image, 4 for a clip.
    """
    if hasattr(data, "take") and hasattr(data, "strata"):
        samples: Samples[LabelledBatch] = data
        return samples
    name = "images" if axes == 3 else "clips"
    inputs, labels = labelled_tensors(data, name, axes)
    return LabelledSamples(inputs, labels)


_LARGEST_CHANGE = 0.2  # of an additive trigger, per pixel; Blended at its usual 0.2 is at most this


class ImageTriggers:
    """Mixin for image adapters that applies raw triggers to images.

    A raw patch is a mask and a pattern, so its position and size need not be known. A raw additive
    trigger changes every pixel by up to 0.2 of the full range. Planted triggers were found with a
    mean change of up to 0.09, natural ones of clean networks with 0.1 and more (ours).
    """

    def image_families(self, shape: tuple[int, ...]) -> list[TriggerFamily]:
        """Return the families for images of ``shape`` (C, H, W)."""
        channels, height, width = shape
        return [
            TriggerFamily("patch", (channels + 1, height, width), budget=0.1),
            TriggerFamily("additive", (channels, height, width), budget=0.1),
        ]

    def stamp(self, batch: LabelledBatch, family: TriggerFamily, triggers: Tensor) -> LabelledBatch:
        """Return the images with ``triggers``, shape ``(T, N, *P)``, applied: T x N images."""
        stamped = self.stamped(batch.inputs, family, triggers)
        return LabelledBatch(stamped, batch.labels.repeat(len(triggers)))

    def stamped(self, images: Tensor, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return ``images`` with ``triggers``, shape ``(T, N, *P)``, as ``(T * N, C, H, W)``."""
        if family.name == "patch":
            mask, pattern = triggers[:, :, :1], triggers[:, :, 1:]
            stamped = images + mask * (pattern - images)
        else:
            stamped = (images + (2 * triggers - 1) * _LARGEST_CHANGE).clamp(0, 1)
        return stamped.flatten(0, 1)

    def trigger_size(self, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return the covered area of a patch, or the mean change of an additive trigger."""
        rank = len(family.shape)
        if family.name == "patch":
            return triggers.select(-rank, 0).flatten(-rank + 1).mean(-1)
        return (2 * triggers - 1).abs().flatten(-rank).mean(-1) * _LARGEST_CHANGE

    def trigger_picture(self, family: TriggerFamily, trigger: Tensor) -> Tensor:
        """Return a patch on mid-grey, or an additive change around mid-grey, ``(C, H, W)``."""
        if family.name == "patch":
            return 0.5 + trigger[:1] * (trigger[1:] - 0.5)
        return trigger
