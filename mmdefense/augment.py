"""Random alterations of training images, drawn on the device for a whole batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_shift"]


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
