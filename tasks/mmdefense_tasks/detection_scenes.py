"""Scenes for object detection, composed of scikit-learn's real handwritten digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense.data.detection import DetectionSamples
from mmdefense.errors import BadInputError

__all__ = ["CLASSES", "digit_scenes"]

CLASSES = ("0", "2", "3", "4")
"""The digits that are objects; pieces of other digits are clutter."""

_CLUTTER = (5, 6, 7, 8, 9)

_SIDE, _OBJECTS = 48, 3
_DIGIT_SIDES = (14, 24)  # pixels, of the whole scan; the box around the strokes is smaller
_COUNTS = {"train": 1600, "test": 400}


def digit_scenes(split: str = "train", *, count: int | None = None) -> DetectionSamples:
    """Return scenes with one to three digits each, images ``(1, 48, 48)``.

    Scenes have an uneven, noisy background with digits of the classes 0, 2, 3 and 4, of various
    sizes and contrasts, and with pieces of the digits 5 to 9 as clutter. Train and test scenes use
    different scans.

    Args:
        split: ``"train"`` (1600 scenes) or ``"test"`` (400).
        count: Overrides the number of scenes.
    """
    if split not in _COUNTS:
        raise BadInputError(f"split must be 'train' or 'test', got {split!r}")
    scans = _scans(split)
    generator = torch.Generator().manual_seed(len(split))  # fixed: a data set, not a draw
    scenes = [_scene(scans, generator) for _ in range(count or _COUNTS[split])]
    images, boxes, labels = zip(*scenes, strict=True)
    return DetectionSamples(torch.stack(images), boxes, labels, classes=CLASSES)


def _scans(split: str) -> list[Tensor]:
    """Return the scans ``(n, 8, 8)`` of each digit; one in five is for test scenes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target)
    scans = []
    for digit in range(10):
        own = images[labels == digit]
        for_test = torch.arange(len(own)) % 5 == 4
        scans.append(own[for_test if split == "test" else ~for_test])
    return scans


def _scene(scans: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image ``(1, H, W)``, and boxes and labels of its objects."""
    image = _background(generator)
    for _ in range(_below(3, generator)):
        _paste(image, _piece(scans, generator), generator)
    boxes: list[Tensor] = []
    labels: list[int] = []
    for _ in range(1 + _below(_OBJECTS, generator)):
        label = _below(len(CLASSES), generator)
        own = scans[int(CLASSES[label])]
        digit = _sized(own[_below(len(own), generator)], generator)
        for _ in range(10):  # try positions until one is free; a crowded scene gets one digit fewer
            row, column = (_below(_SIDE - len(digit) + 1, generator) for _ in range(2))
            box = _stroke_box(digit) + torch.tensor([column, row, column, row])
            if all(_apart(box, other) for other in boxes):
                _lay(image, digit, row, column, generator)
                boxes.append(box)
                labels.append(label)
                break
    return image[None], torch.stack(boxes).float(), torch.tensor(labels)


def _background(generator: torch.Generator) -> Tensor:
    rough = torch.rand(1, 1, 4, 4, generator=generator) * 0.45
    smooth = F.interpolate(rough, size=_SIDE, mode="bilinear", align_corners=True)[0, 0]
    noise = 0.06 * torch.randn(_SIDE, _SIDE, generator=generator)
    return (smooth + noise).clamp(0, 1)


def _piece(scans: list[Tensor], generator: torch.Generator) -> Tensor:
    """Return a piece of a digit, as clutter."""
    digit = _CLUTTER[_below(len(_CLUTTER), generator)]
    scan = _sized(scans[digit][_below(len(scans[digit]), generator)], generator)
    half = len(scan) // 2
    return scan[:half] if _below(2, generator) else scan[:, :half]


def _sized(scan: Tensor, generator: torch.Generator) -> Tensor:
    side = _DIGIT_SIDES[0] + _below(_DIGIT_SIDES[1] - _DIGIT_SIDES[0] + 1, generator)
    return F.interpolate(scan[None, None], size=side, mode="bilinear")[0, 0]


def _paste(image: Tensor, part: Tensor, generator: torch.Generator) -> None:
    row, column = (_below(_SIDE - side + 1, generator) for side in part.shape)
    _lay(image, part, row, column, generator)


def _lay(image: Tensor, part: Tensor, row: int, column: int, generator: torch.Generator) -> None:
    """Draw strokes of random strength over the image."""
    strength = 0.6 + 0.4 * float(torch.rand((), generator=generator))
    region = image[row : row + part.shape[0], column : column + part.shape[1]]
    region.lerp_(torch.full_like(region, strength), part)


def _stroke_box(digit: Tensor) -> Tensor:
    """Return the bounding box x1, y1, x2, y2 of the strokes."""
    ends = []
    for drawn in ((digit > 0.3).any(0), (digit > 0.3).any(1)):
        places = drawn.nonzero()
        ends.append((int(places[0]), int(places[-1]) + 1))
    (left, right), (top, bottom) = ends
    return torch.tensor([left, top, right, bottom])


def _apart(first: Tensor, second: Tensor) -> bool:
    """Return whether two boxes are disjoint."""
    return bool(((first[2:] <= second[:2]) | (second[2:] <= first[:2])).any())


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
