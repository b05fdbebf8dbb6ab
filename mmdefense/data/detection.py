"""Images with the objects in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense.data.batch import HeldSamples, TensorBatch, as_float
from mmdefense.data.images import erased, rectangles
from mmdefense.errors import BadInputError
from mmdefense.shown import Shown

__all__ = [
    "BoxAugmentation",
    "DetectionBatch",
    "DetectionSamples",
    "Detections",
    "random_boxed_view",
]


@dataclass(frozen=True, slots=True, repr=False)
class DetectionBatch(TensorBatch):
    """``N`` images and the objects in them.

    Attributes:
        images: Shape ``(N, C, H, W)`` in ``[0, 1]``.
        boxes: For each image the corners x1, y1, x2, y2 of its M objects in pixels, ``(M, 4)``.
        labels: For each image the classes of its objects, shape ``(M,)``, int64.
    """

    images: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Detections(Shown):
    """What a detector finds in one image.

    Attributes:
        boxes: Corners x1, y1, x2, y2 in pixels, shape ``(D, 4)``.
        labels: Shape ``(D,)``, int64.
        scores: Confidence in ``[0, 1]``, shape ``(D,)``.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


BoxAugmentation = Callable[
    [Tensor, Sequence[Tensor], Sequence[Tensor], torch.Generator],
    tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]],
]
"""Maps images, boxes and labels to altered ones, boxes moved along."""


@dataclass(frozen=True, repr=False)
class DetectionSamples(HeldSamples):
    """Images of one size with their objects, held in memory on one device.

    Attributes:
        images: Shape ``(N, C, H, W)``; uint8 is scaled to ``[0, 1]`` by batch.
        boxes: For each image the corners of its objects in pixels, ``(M, 4)``.
        labels: For each image the classes of its objects, ``(M,)``.
        augmentation: Alters a batch at random; none leaves it as it is.
        classes: The name of each label, where known.
    """

    columns = ("images", "boxes", "labels")
    types = MappingProxyType({"boxes": torch.float32, "labels": torch.int64})

    images: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    augmentation: BoxAugmentation | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = len(self.images), len(self.boxes), len(self.labels)
        if len(set(counts)) != 1:
            raise BadInputError(
                "images, boxes and labels must have the same length, got {}, {} and {}".format(
                    *counts
                )
            )
        for index, (boxes, labels) in enumerate(zip(self.boxes, self.labels, strict=True)):
            if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise BadInputError(
                    f"image {index} must have boxes (M, 4) and labels (M,), got "
                    f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
                )
        if self.boxes:
            _check_boxes(self.boxes, self.images.shape[-2:])

    def take(self, indices: Tensor) -> DetectionBatch:
        """Return the samples at ``indices`` as one batch, images as float32."""
        chosen = self.at(indices)
        return DetectionBatch(as_float(chosen["images"]), chosen["boxes"], chosen["labels"])

    def augment(self, batch: DetectionBatch, generator: torch.Generator) -> DetectionBatch:
        """Return ``batch`` augmented, boxes included."""
        if self.augmentation is None:
            return batch
        return DetectionBatch(
            *self.augmentation(batch.images, batch.boxes, batch.labels, generator)
        )

    def everything(self) -> DetectionBatch:
        """Return the whole set as one batch."""
        return DetectionBatch(as_float(self.images), self.boxes, self.labels)


def _check_boxes(boxes: Sequence[Tensor], size: Sequence[int]) -> None:
    """Refuse the first box that is empty, reversed, or partly outside an image of ``size`` H, W."""
    flat = torch.cat([part.float() for part in boxes])
    limits = flat.new_tensor([size[1], size[0]])
    empty = ~(flat[:, 2:] > flat[:, :2]).all(1)  # so that NaN counts as empty
    outside = (flat < 0).any(1) | (flat[:, 2:] > limits).any(1)
    for wrong, rule in (
        (empty, "have x1 < x2 and y1 < y2"),
        (outside, f"lie inside the image, 0..{size[1]} x 0..{size[0]} pixels"),
    ):
        if wrong.any():
            first = int(wrong.nonzero()[0])
            image = [index for index, part in enumerate(boxes) for _ in part][first]
            raise BadInputError(
                f"a box must {rule}, got {[round(v, 2) for v in flat[first].tolist()]} in image "
                f"{image}"
            )


def mirrored(batch: DetectionBatch) -> DetectionBatch:
    """Return images mirrored left to right, boxes included."""
    width = batch.images.shape[-1]
    boxes = tuple(
        torch.stack([width - part[:, 2], part[:, 1], width - part[:, 0], part[:, 3]], 1)
        for part in batch.boxes
    )
    return DetectionBatch(batch.images.flip(-1), boxes, batch.labels)


def random_boxed_view(
    images: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    generator: torch.Generator,
    *,
    scale: float = 0.15,
    shift: float = 0.12,
    light: float = 0.15,
    erase: float = 0.8,
    keep: float = 0.1,
    flip: bool = False,
    visible: float = 0.4,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return each image with a random scale, shift and brightness, boxes included.

    As :func:`random_view`, without rotation and shear, which would loosen upright boxes. The sizes
    are our choice.

    Args:
        images: Shape ``(N, C, H, W)`` in ``[0, 1]``.
        boxes: For each image the corners of its objects in pixels, ``(M, 4)``.
        labels: For each image the classes of its objects, ``(M,)``.
        generator: Source of the changes, on the device of the images.
        scale: Largest change of the logarithm of the size.
        shift: Largest shift as a share of the side.
        light: Largest change of brightness; contrast changes by up to ``exp(1.5 light)``.
        erase: Share of the images, and then of the objects, in which noise replaces a rectangle
            (image- and object-aware random erasing: Zhong et al. 2020, arXiv:1708.04896).
        keep: Share of the images that stay as they are.
        flip: Whether half of the images are mirrored left to right.
        visible: Share of a box's area that must stay inside for its object to be kept.

    Returns:
        Altered images, boxes and labels.
    """
    count, _, height, width = images.shape
    draw = torch.rand(7, count, generator=generator, device=images.device) * 2 - 1
    altered = (draw[6] + 1) / 2 >= keep
    size = torch.where(altered, (draw[0] * scale).exp(), 1.0)
    mirror = torch.where((draw[5] < 0) & altered, -1.0, 1.0) if flip else torch.ones_like(size)
    moved = torch.where(altered, 2 * shift * draw[1:3], 0.0)
    zero = torch.zeros_like(size)
    rows = (torch.stack([mirror * size, zero, moved[0]], 1), torch.stack([zero, size, moved[1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid.to(images.dtype), align_corners=False)
    contrast = (1.5 * light * draw[3]).exp()[:, None, None, None]
    views = (views * contrast + (light * draw[4])[:, None, None, None]).clamp(0, 1)
    views = erased(views, generator, erase)
    views = torch.where(altered[:, None, None, None], views, images)
    sizes = torch.stack([mirror * size, size])
    moved_boxes, kept = _follow(boxes, labels, sizes, moved, (width, height), visible)
    hidden = _erase_objects(views, moved_boxes, generator, erase)
    return torch.where(altered[:, None, None, None], hidden, views), moved_boxes, kept


def _follow(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    sizes: Tensor,
    moved: Tensor,
    extent: tuple[int, int],
    visible: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return boxes where a view puts them, clipped; those that are mostly outside are dropped.

    A view maps position ``sizes z + moved`` to z, ``(2, N)`` in x and y, with sides from -1 to 1.
    """
    counts = [len(part) for part in boxes]
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(moved.device)
    half = moved.new_tensor(extent) / 2
    ends = torch.cat(list(boxes)).view(-1, 2, 2) / half - 1  # (M, corner, x and y)
    ends = (ends - moved.T[image, None]) / sizes.T[image, None]
    ends = ((ends + 1) * half).sort(1)[0]  # a mirrored box has its corners swapped
    cut = torch.minimum(ends.clamp(min=0), 2 * half)
    areas = [(corners[:, 1] - corners[:, 0]).prod(1) for corners in (cut, ends)]
    parts = torch.split(areas[0] > visible * areas[1], counts)
    followed = torch.split(cut.flatten(1), counts)
    return (
        tuple(part[keep] for part, keep in zip(followed, parts, strict=True)),
        tuple(part[keep] for part, keep in zip(labels, parts, strict=True)),
    )


def _erase_objects(
    images: Tensor, boxes: Sequence[Tensor], generator: torch.Generator, share: float
) -> Tensor:
    """Put a rectangle of uniform noise at a random place of a ``share`` of the objects."""
    hit = torch.zeros_like(images[:, :1], dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence(list(boxes), batch_first=True)
    for corners in padded.unbind(1):  # one object of every image at a time: memory stays small
        hit |= rectangles(images, generator, share, corners)
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(hit, noise, images)
