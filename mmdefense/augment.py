"""Random alterations of training images, drawn on the device for a whole batch at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_shift", "random_view"]


def random_shift(
    images: Tensor, generator: torch.Generator, *, fraction: float = 1 / 8, flip: bool = False
) -> Tensor:
    """Return each image shifted by up to ``fraction`` of its side, padded with zeros.

    Args:
        images: Shape ``(N, C, H, W)``.
        generator: Source of the shifts, on the device of the images.
        fraction: Largest shift as a share of the side; 1/8 is the usual 4 pixels of 32.
        keep: Share of the images that stay as they are.
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
    degrees: float = 12.0,
    scale: float = 0.12,
    shear: float = 0.1,
    shift: float = 0.12,
    light: float = 0.2,
    keep: float = 0.25,
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
    kept = ((draw[8] + 1) / 2 < keep)[:, None, None, None]
    return torch.where(kept, images, altered)
