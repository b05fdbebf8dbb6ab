"""Random alterations of training images, drawn on the device for a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "random_boxed_view",
    "random_clip_shift",
    "random_clip_view",
    "random_shift",
    "random_view",
    "random_words",
]

_STILL = 0.8  # ours: share of the clips in which a rectangle of noise stands


def random_shift(
    images: Tensor, generator: torch.Generator, *, fraction: float = 1 / 8, flip: bool = False
) -> Tensor:
    """Return each image shifted by up to ``fraction`` of its side, padded with zeros.

    Args:
        images: Shape ``(N, C, H, W)``.
        generator: Source of the shifts, on the device of the images.
        fraction: Largest shift as a share of the side; 1/8 is the usual 4 pixels of 32.
        flip: Whether half of the images are mirrored left to right.
    """
    count, channels, height, width = images.shape
    pad = max(1, round(fraction * min(height, width)))
    device = images.device
    shifts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator, device=device)
    rows = shifts[0, :, None] + torch.arange(height, device=device)
    columns = shifts[1, :, None] + torch.arange(width, device=device)
    if flip:
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad,) * 4)
    samples = torch.arange(count, device=device)[:, None, None, None]
    every = torch.arange(channels, device=device)[None, :, None, None]
    return padded[samples, every, rows[:, None, :, None], columns[:, None, None, :]]


def random_view(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 8.0,
    scale: float = 0.08,
    shear: float = 0.06,
    shift: float = 0.1,
    light: float = 0.15,
    erase: float = 0.6,
    keep: float = 0.4,
    flip: bool = False,
) -> Tensor:
    """Return each image turned, scaled, sheared, shifted and lit a little differently.

    The default for the defender's clean data, which is small: it stands in for samples that are
    not there. The sizes are ours.

    Args:
        images: Shape ``(N, C, H, W)`` in ``[0, 1]``.
        generator: Source of the changes, on the device of the images.
        degrees: Largest rotation.
        scale: Largest change of the logarithm of the size.
        shear: Largest shear.
        shift: Largest shift as a share of the side.
        light: Largest change of brightness; contrast changes by up to ``exp(1.5 light)``.
        erase: Share of the images in which a rectangle of noise, of an eighth to three eighths
            of the side, replaces what was there (random erasing).
        keep: Share of the images that stay as they are.
        flip: Whether half of the images are mirrored left to right.
    """
    count, device = len(images), images.device
    draw = torch.rand(9, count, generator=generator, device=device) * 2 - 1
    angle, size = draw[0] * math.radians(degrees), (draw[1] * scale).exp()
    cos, sin = size * angle.cos(), size * angle.sin()
    mirror = torch.where(draw[7] < 0, -1.0, 1.0) if flip else torch.ones_like(cos)
    rows = (
        torch.stack([mirror * cos, draw[2] * shear * size - sin, 2 * shift * draw[3]], 1),
        torch.stack([mirror * sin, cos, 2 * shift * draw[4]], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid.to(images.dtype), align_corners=False)
    contrast = (1.5 * light * draw[5]).exp()[:, None, None, None]
    brightness = (light * draw[6])[:, None, None, None]
    altered = (moved * contrast + brightness).clamp(0, 1)
    altered = _erase(altered, generator, erase)
    kept = ((draw[8] + 1) / 2 < keep)[:, None, None, None]
    return torch.where(kept, images, altered)


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
    """Return each image scaled, shifted and lit a little differently, its boxes moved along.

    As :func:`random_view`, without what would leave upright boxes loose. The sizes are ours.

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
    views = _erase(views, generator, erase)
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

    A view shows at z what was at ``sizes z + moved``, ``(2, N)`` in x and y, sides from -1 to 1.
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


def random_clip_shift(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Return each clip ``(N, C, T, H, W)`` shifted as by :func:`random_shift`, frames alike."""
    return random_shift(clips.flatten(1, 2), generator).view_as(clips)


def random_clip_view(clips: Tensor, generator: torch.Generator, *, flip: bool = False) -> Tensor:
    """Return each clip changed as :func:`random_view` does, all its frames alike.

    What moves goes on moving the same way: nothing is turned over, run backwards or mirrored
    unless ``flip`` says that left and right do not matter. Rectangles of noise stand still.

    Args:
        clips: Shape ``(N, C, T, H, W)`` in ``[0, 1]``.
        generator: Source of the changes, on the device of the clips.
        flip: Whether half of the clips are mirrored left to right.
    """
    moved = random_view(clips.flatten(1, 2), generator, flip=flip, erase=0).view_as(clips)
    hit = _rectangles(moved[:, :, 0], generator, _STILL)
    still = torch.rand(moved[:, :, :1].shape, generator=generator, device=clips.device)
    return torch.where(hit[:, :, None], still, moved)


def _erase(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Put a rectangle of uniform noise at a random place of a ``share`` of the images."""
    hit = _rectangles(images, generator, share)
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(hit, noise, images)


def _erase_objects(
    images: Tensor, boxes: Sequence[Tensor], generator: torch.Generator, share: float
) -> Tensor:
    """Put a rectangle of uniform noise at a random place of a ``share`` of the objects."""
    hit = torch.zeros_like(images[:, :1], dtype=torch.bool)
    padded = torch.nn.utils.rnn.pad_sequence(list(boxes), batch_first=True)
    for corners in padded.unbind(1):  # one object of every image at a time: memory stays small
        hit |= _rectangles(images, generator, share, corners)
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(hit, noise, images)


def _rectangles(
    images: Tensor, generator: torch.Generator, share: float, boxes: Tensor | None = None
) -> Tensor:
    """Return where a rectangle lies in a ``share`` of the images, bool ``(N, 1, H, W)``.

    Its sides are an eighth to three eighths of the image's, or of those of ``boxes``, ``(N, 4)``.
    """
    count, _, height, width = images.shape
    device = images.device
    draw = torch.rand(5, count, 1, generator=generator, device=device)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    shares = whole if boxes is None else boxes / boxes.new_tensor([width, height, width, height])
    low, extent = shares[:, :2], shares[:, 2:] - shares[:, :2]
    rows, columns = (
        (
            torch.linspace(0, 1, side, device=device)
            - low[:, axis, None]
            - extent[:, axis, None] * place
        ).abs()
        < extent[:, axis, None] * (0.125 + 0.25 * size) / 2
        for axis, side, place, size in ((1, height, draw[0], draw[1]), (0, width, draw[2], draw[3]))
    )
    return rows[:, None, :, None] & columns[:, None, None, :] & (draw[4] < share)[:, :, None, None]


def random_words(
    tokens: Tensor,
    content: Tensor,
    vocabulary: Tensor,
    generator: torch.Generator,
    *,
    replace: float = 0.05,
    keep: float = 0.4,
) -> Tensor:
    """Return each prompt with a few of its tokens replaced by any of the vocabulary's.

    The default for the defender's clean data in language: what a rectangle of noise is to an image.
    The answer stays, though a word of it may have lost its reason: so the share, which is ours, is
    small.

    Args:
        tokens: Shape ``(N, L)``, int64.
        content: Which tokens may change, bool ``(N, L)``.
        vocabulary: What to draw from, shape ``(W,)``, int64.
        generator: Source of the changes, on the device of the tokens.
        replace: Share of the tokens that are replaced.
        keep: Share of the prompts that stay as they are.
    """
    device = tokens.device
    altered = torch.rand(len(tokens), 1, generator=generator, device=device) >= keep
    chosen = torch.rand(tokens.shape, generator=generator, device=device) < replace
    drawn = torch.randint(len(vocabulary), tokens.shape, generator=generator, device=device)
    return torch.where(content & altered & chosen, vocabulary[drawn], tokens)
