"""Decode the images of a detection set and transform their boxes with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmdefense.data.detection import DetectionSamples
from mmdefense.errors import BadInputError, one_line
from mmdefense.notes import note
from mmdefense.pictures import open_picture
from mmdefense_tasks.detection_files import ObjectFile
from mmdefense_tasks.image_sets import Fit, in_8_bits

__all__ = ["decode"]

_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap the sides
_SLACK = (2.0, 0.02)  # our choice; pixels, or fraction of a side, that a box may exceed the edge
_SAID = {
    "empty": "dropped {} boxes without area",
    "clipped": "clipped {} boxes that reach beyond their image",
    "turned": "rotated {} images and their boxes as their EXIF data says",
    "scaled": (
        "rescaled the boxes of {} images, since the files are scaled copies of the annotated ones"
    ),
    "unclear": (
        "{} images have an EXIF orientation, and nothing says whether their boxes follow it; "
        "reading them as stored"
    ),
}


def decode(
    files: Sequence[ObjectFile],
    labels: Sequence[int],
    classes: Sequence[str],
    size: tuple[int, int],
    channels: int,
    *,
    fit: Fit | None = None,
    fill: Sequence[float] = (),
) -> DetectionSamples:
    """Return the images in memory, at one size, with their objects.

    Images keep their aspect ratio and are padded with black. Annotations made at another size or
    orientation than that of the file are converted. Boxes slightly beyond the edge are clipped,
    boxes without area dropped; a note says how many.

    Args:
        files: Images and objects.
        labels: The label of each kind of object.
        classes: The name of each label, if known.
        size: Height and width in pixels.
        channels: 1 or 3.
        fit: Resizes images instead of ``size``, such as the geometry of a model's processor. They
            are placed in the upper left corner of the smallest size that fits all.
        fill: The padding colour, in ``[0, 1]``; by default black.

    Raises:
        BadInputError: If an image is damaged, its size does not match the annotation, or a box is
            reversed or outside its image.
    """
    counts: Counter[str] = Counter()
    images, every, numbers = [], [], []
    for entry in files:
        image, stretch = _opened(entry, channels, counts)
        boxes = torch.tensor(entry.boxes, dtype=torch.float32).reshape(-1, 4)
        boxes, kept = _inside(boxes * stretch.repeat(2), image.size, entry.path.name, counts)
        pixels = _resized(image, size, fit)
        images.append(pixels)
        sides = torch.tensor([pixels.shape[2], pixels.shape[1]])
        scale = sides / torch.tensor(image.size)
        # The product may be rounded to slightly beyond the side.
        every.append((boxes[kept] * scale.repeat(2)).minimum(sides.repeat(2)))
        kinds = torch.tensor(entry.kinds, dtype=torch.int64)[kept].tolist()
        numbers.append(torch.tensor([labels[kind] for kind in kinds], dtype=torch.int64))
    for kind, text in _SAID.items():
        if counts[kind]:
            note(text.format(counts[kind]))
    held = _in_one_size(
        images, None if fit else size, fill if len(fill) == channels else (0.0,) * channels
    )
    return DetectionSamples(held, tuple(every), tuple(numbers), classes=tuple(classes))


def _opened(entry: ObjectFile, channels: int, counts: Counter[str]) -> tuple[Image.Image, Tensor]:
    """Return an image as annotated, and the scale of its boxes in x and y."""
    try:
        with open_picture(entry.path) as opened:
            orientation = opened.getexif().get(_ORIENTATION, 1)
            upright = ImageOps.exif_transpose(opened)
            turn, stretch = _matched(entry, opened.size, upright.size, orientation, counts)
            image = in_8_bits(upright if turn else opened)
            image = image.convert("L" if channels == 1 else "RGB")
    except BadInputError:
        raise
    except Exception as error:  # decoders raise many exception types
        raise BadInputError(f"image {entry.path} cannot be decoded: {one_line(error)}") from error
    return image, stretch


def _matched(
    entry: ObjectFile,
    stored: tuple[int, int],
    upright: tuple[int, int],
    orientation: int,
    counts: Counter[str],
) -> tuple[bool, Tensor]:
    """Return whether an image was annotated upright, and the scale of its boxes."""
    size = entry.size or stored
    forms = [(False, stored)] + [(True, upright)] * (orientation in range(2, 9))
    fitting = [form for form in forms if form[1] == size]
    counts["unclear"] += len(fitting) > 1 or (entry.size is None and len(forms) > 1)
    scaled = [form for form in forms if _is_copy(size, form[1])]
    if not (fitting or scaled):
        raise BadInputError(
            f"image {entry.path.name} has {stored[0]}x{stored[1]} pixels, but was annotated with "
            f"{size[0]}x{size[1]}, which is neither a rotation nor a scaled copy; is it the "
            "annotated file?"
        )
    turn, own = (fitting or scaled)[0]
    counts["turned"] += turn
    counts["scaled"] += not fitting
    return turn, torch.tensor(own) / torch.tensor(size)


def _is_copy(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes have the same aspect ratio, up to rounding to a pixel."""
    factor = max(other) / max(size)
    return all(abs(a * factor - b) <= max(1.0, factor) for a, b in zip(size, other, strict=True))


def _inside(
    boxes: Tensor, size: tuple[int, int], name: str, counts: Counter[str]
) -> tuple[Tensor, Tensor]:
    """Return boxes ``(M, 4)`` clipped to an image, and which of them have an area, bool ``(M,)``.

    Args:
        boxes: Boxes in pixels of the image.
        size: Width and height of the image.
        name: Name of its file.
        counts: Counters of changes, for notes.
    """
    limits = torch.tensor([*size, *size], dtype=torch.float32)
    over = torch.maximum(-boxes, boxes - limits)
    reversed_ = ~(boxes[:, 2:] >= boxes[:, :2]).all(1)
    outside = ~(over <= (limits * _SLACK[1]).clamp(min=_SLACK[0])).all(1)
    for wrong, what in ((reversed_, "reversed"), (outside, "outside the image")):
        if wrong.any():
            raise BadInputError(
                f"a box of {name} is {what} ({size[0]}x{size[1]} pixels), got "
                f"{boxes[wrong][0].tolist()} as x1, y1, x2, y2; correct or remove the annotation"
            )
    clipped = boxes.clamp(min=0).minimum(limits)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(1)
    counts["empty"] += int((~kept).sum())
    counts["clipped"] += int(((over > 0.5).any(1) & kept).sum())  # files round to half a pixel
    return clipped, kept


def _resized(image: Image.Image, size: tuple[int, int], fit: Fit | None) -> Tensor:
    """Return an image as uint8 ``(C, h, w)``, resized by ``fit`` or to height and width."""
    if fit is None:
        scale = min(size[1] / image.width, size[0] / image.height)
        sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(sides, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
    return pixels if fit is None else fit(pixels[None])[0]


def _in_one_size(
    images: Sequence[Tensor], size: tuple[int, int] | None, fill: Sequence[float]
) -> Tensor:
    """Pad images of different sizes to one tensor, each in the upper left corner."""
    height, width = size or (max(one.shape[axis] for one in images) for axis in (1, 2))
    colour = (torch.tensor(fill) * 255).round().clamp(0, 255).to(torch.uint8)
    held = colour[None, :, None, None].repeat(len(images), 1, height, width)
    for place, image in zip(held, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return held
