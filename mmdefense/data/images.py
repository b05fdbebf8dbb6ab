"""Random alterations of training images, drawn on the device for a whole batch at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["erased", "random_shift", "random_view", "rectangles"]


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
    """Return each image with a random rotation, scale, shear, shift and brightness.

    The views "insertions" of images. The sizes are our choice.

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
    altered = erased(altered, generator, erase)
    kept = ((draw[8] + 1) / 2 < keep)[:, None, None, None]
    return torch.where(kept, images, altered)


def erased(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Put a rectangle of uniform noise at a random place of a ``share`` of the images."""
    hit = rectangles(images, generator, share)
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(hit, noise, images)


def rectangles(
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
