"""Clean data as another camera would have taken it: what a user's own data is like at its worst."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense.data.batch import as_float
from mmdefense.errors import UnsupportedError

__all__ = ["SHIFTS", "Shift", "blurred", "noisy", "shifted"]

Shift = Literal["noisy", "blurred"]
"""How images differ from those that a model was trained on."""

SHIFTS: tuple[Shift, ...] = ("noisy", "blurred")

_COLUMNS = ("inputs", "images")
"""Names of the columns of sample sets that hold images or clips."""


def shifted(samples: Any, shift: Shift, generator: torch.Generator) -> Any:
    """Return samples whose images or clips are shifted; labels and boxes stay as they are.

    Args:
        samples: Held in memory.
        shift: How they are altered.
        generator: Source of the noise, on the CPU.

    Raises:
        UnsupportedError: If they are neither images nor clips.
    """
    column = next((name for name in _COLUMNS if hasattr(samples, name)), "")
    images = getattr(samples, column, None)
    if not isinstance(images, Tensor) or images.ndim < 4:
        raise UnsupportedError(
            f"clean data of kind {shift!r} is for images and clips, not for "
            f"{type(samples).__name__}; use seen or unseen"
        )
    images = as_float(images)
    altered = noisy(images, generator) if shift == "noisy" else blurred(images)
    return replace(samples, **{column: altered})


def noisy(images: Tensor, generator: torch.Generator, *, deviation: float = 0.1) -> Tensor:
    """Return images with Gaussian noise on every pixel.

    Args:
        images: Shape ``(N, ..., H, W)`` in ``[0, 1]``, on any device.
        generator: Source of the noise, on the CPU.
        deviation: Standard deviation of the noise; by default that of the strongest of
            CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv:1903.12261).
    """
    noise = torch.randn(images.shape, generator=generator)
    return (images + deviation * noise.to(images)).clamp(0, 1)


def blurred(images: Tensor, *, sigma: float = 1 / 32) -> Tensor:
    """Return images smoothed by a Gaussian.

    Args:
        images: Shape ``(N, ..., H, W)``.
        sigma: Its standard deviation as a share of the side; by default one pixel of 32, the
            strongest blur of CIFAR-10-C.
    """
    flat = images.flatten(0, -3)[:, None]
    for axis in (-2, -1):
        side = images.shape[axis]
        reach = min(max(1, math.ceil(3 * sigma * side)), side - 1)
        places = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
        weights = (-0.5 * (places / (sigma * side)) ** 2).exp()
        kernel = (weights / weights.sum()).view((-1, 1) if axis == -2 else (1, -1))
        pad = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        flat = F.conv2d(F.pad(flat, pad, mode="reflect"), kernel[None, None])
    return flat[:, 0].view(images.shape)
