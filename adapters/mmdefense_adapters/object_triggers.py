"""Triggers for images with objects, and the criterion for their success."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdefense.data.detection import DetectionBatch
from mmdefense.protocol import TriggerFamily
from mmdefense_adapters.images import ImageTriggers

__all__ = ["ObjectTriggers"]

_SIDE = 12  # side of a raw trigger on objects in pixels, resized to each box
_BUDGET = 0.25  # fraction of a box that BadDet's patch covers on small objects


class ObjectTriggers(ImageTriggers, ABC):
    """Mixin for detector adapters that applies raw triggers to whole images or to each object.

    A trigger succeeds if it turns *the existing objects* into the target. A target that merely
    appears somewhere is no sign of a backdoor: any detector finds an object that the search has
    drawn. So backdoors that misclassify objects can be found, but not those that generate objects
    or make them disappear.
    """

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes K."""

    @abstractmethod
    def places(self, batch: DetectionBatch) -> tuple[Tensor, Tensor]:
        """Return the model's prediction locations and the class probabilities there.

        Returns:
            Log-probabilities of the classes at each location, ``(N, P, K)``, with grad; and the
            locations x, y in pixels, ``(N, P, 2)``, without.
        """

    @abstractmethod
    def _image_shape(self) -> tuple[int, ...]:
        """Return C, H, W of the images."""

    def trigger_targets(self) -> int:
        """Return K."""
        return self.classes

    def trigger_families(self) -> Sequence[TriggerFamily]:
        """Return patches anywhere in the image, and patches stretched to the box of each object."""
        shape = self._image_shape()
        patch = self.image_families(shape)[0]
        return [patch, TriggerFamily("on-objects", (shape[0] + 1, _SIDE, _SIDE), budget=_BUDGET)]

    def stamp(  # type: ignore[override]
        self, batch: DetectionBatch, family: TriggerFamily, triggers: Tensor
    ) -> DetectionBatch:
        """Return the images with ``triggers``, shape ``(T, N, *P)``, applied: T x N images."""
        count = len(triggers)
        boxes, labels = batch.boxes * count, batch.labels * count
        if family.name == "patch":
            return DetectionBatch(self.stamped(batch.images, family, triggers), boxes, labels)
        images = batch.images.repeat(count, 1, 1, 1)
        return DetectionBatch(_on_objects(images, boxes, triggers.flatten(0, 1)), boxes, labels)

    def trigger_size(self, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return the covered fraction of the image, or of the box of each object."""
        return super().trigger_size(_as_patch(family), triggers)

    def trigger_picture(self, family: TriggerFamily, trigger: Tensor) -> Tensor:
        """Return a patch on mid-grey, ``(C, H, W)``."""
        return super().trigger_picture(_as_patch(family), trigger)

    def target_log_probability(self, batch: DetectionBatch, targets: Tensor) -> Tensor:
        """Return the log-probability that each image's objects are of its target, ``(N,)``.

        For each object of another class, the best location inside its box counts; the result is the
        mean over these objects.
        """
        log_p, centres = self.places(batch)
        own = log_p.gather(2, targets[:, None, None].expand(-1, log_p.shape[1], 1)).squeeze(2)
        boxes = pad_sequence(list(batch.boxes), batch_first=True)
        labels = pad_sequence(list(batch.labels), batch_first=True, padding_value=-1)
        if not boxes.shape[1]:
            return own.amax(1)
        best = own[:, None].masked_fill(~_inside(boxes, centres), -100.0).amax(2)
        counts = (labels >= 0) & (labels != targets[:, None])
        return (best * counts).sum(1) / counts.sum(1).clamp(min=1)

    def not_target(self, batch: DetectionBatch, targets: Tensor) -> Tensor:
        """Return whether the image has an object of a class other than its target."""
        pairs = zip(batch.labels, targets, strict=True)
        return torch.stack([(labels != target).any() for labels, target in pairs])


def _as_patch(family: TriggerFamily) -> TriggerFamily:
    return replace(family, name="patch")


def _inside(boxes: Tensor, centres: Tensor) -> Tensor:
    """Return which locations are in each box, plus the nearest one, bool ``(N, M, P)``."""
    x, y = centres[:, None, :, 0], centres[:, None, :, 1]
    left, top, right, bottom = boxes[..., None].unbind(2)
    inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    distance = (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2
    return inside | (distance == distance.amin(2, keepdim=True))


def _on_objects(images: Tensor, boxes: Sequence[Tensor], triggers: Tensor) -> Tensor:
    """Return images ``(N, C, H, W)`` with triggers ``(N, C + 1, S, S)`` on their objects."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) + 0.5
    columns = torch.arange(width, device=images.device) + 0.5
    # Padding boxes lie outside the image, so that no trigger is visible.
    padded = pad_sequence(list(boxes), batch_first=True, padding_value=-1e6)
    for left, top, right, bottom in (box[..., None].unbind(1) for box in padded.unbind(1)):
        x = 2 * (columns - left) / (right - left).clamp(min=1e-3) - 1
        y = 2 * (rows - top) / (bottom - top).clamp(min=1e-3) - 1
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)])
        placed = F.grid_sample(triggers, grid.movedim(0, -1), align_corners=False)
        images = images + placed[:, :1] * (placed[:, 1:] - images)
    return images
