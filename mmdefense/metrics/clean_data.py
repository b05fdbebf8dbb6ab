"""What about a user's clean data is known to make purification worse, as far as it shows cheaply.

A heuristic: it sees classes, counts and the pixels of some images. Samples of other classes, of
another source or with wrong labels pass it.

References:
    Wei, Yang, Liu, Zha. *Revisiting the Auxiliary Data in Backdoor Purification*. 2025.
    arXiv:2502.07231. (Clean data of another source, or altered, makes defenses much worse.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense.data.batch import Samples, few
from mmdefense.protocol import InputAdapter, TaskAdapter, missing_members

__all__ = ["doubts", "noise_level", "sharpness"]

_FEW = 5
"""Ours: samples of a class below which it is named."""

_SOME = 256
"""Samples whose pixels are looked at."""

_NOISE = 0.06
"""Ours: of five sets of real images the level is at most 0.04, and with the noise of
CIFAR-10-C's strongest level at least 0.08."""

_SHARP = 0.1
"""Ours: of these sets it is at least 0.18; of the photographs with a blur of a 32nd of the side at
most 0.09, but not of enlarged scans of digits, whose blur this does not find."""

_SIDE = 32


def doubts(adapter: TaskAdapter[Any], samples: Samples[Any]) -> tuple[str, ...]:
    """Return what about clean samples is a reason to doubt a purification, a sentence each.

    Args:
        adapter: Reads the samples.
        samples: As ``adapter.samples`` returned them.
    """
    return (*_of_classes(adapter, samples), *_of_pixels(adapter, samples))


def _of_classes(adapter: TaskAdapter[Any], samples: Samples[Any]) -> Iterator[str]:
    strata = samples.strata()
    if strata is None:
        return
    classes = round(1 / adapter.chance)
    counts = torch.bincount(strata, minlength=classes)
    names: Sequence[str] = getattr(samples, "classes", ()) or [str(k) for k in range(len(counts))]
    if absent := [names[k] for k in (counts == 0).nonzero().flatten().tolist()]:
        shown = ", ".join(absent[:5]) + (" and more" if len(absent) > 5 else "")
        yield f"{len(absent)} of {classes} classes have no clean sample: {shown}"
    least = int(counts[counts > 0].min())
    if least < _FEW:
        have = f"{least} clean sample{'' if least == 1 else 's'}"
        yield f"some classes have {have}; with fewer than {_FEW} defenses often fail"


def _of_pixels(adapter: TaskAdapter[Any], samples: Samples[Any]) -> Iterator[str]:
    if missing_members(adapter, InputAdapter):
        return
    reader: InputAdapter[Any] = adapter  # type: ignore[assignment]
    some = few(samples, _SOME)
    batch = some.take(torch.arange(len(some)))
    images = reader.inputs(batch)
    if images.ndim < 4 or min(images.shape[-2:]) < 8 or reader.input_bounds(batch) != (0, 1):
        return
    if (level := noise_level(images)) > _NOISE:
        yield f"images look noisy (deviation about {level:.2f} of full scale)"
    if (found := sharpness(images)) < _SHARP:
        yield f"images look blurred (sharpness {found:.2f}; sharp images have {_SHARP} and more)"


def noise_level(images: Tensor) -> float:
    """Return the standard deviation of the noise of images, the median over their channels.

    Args:
        images: Shape ``(N, ..., H, W)`` in ``[0, 1]``, with sides of at least 3.

    References:
        Immerkaer. *Fast Noise Variance Estimation*. Computer Vision and Image Understanding 64(2),
        1996.
    """
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).to(images)
    left = F.conv2d(images.flatten(0, -3)[:, None], kernel[None, None])
    return float(left.abs().flatten(1).mean(1).median()) * math.sqrt(math.pi / 2) / 6


def sharpness(images: Tensor) -> float:
    """Return the mean squared step between neighbours over the variance, the median over channels.

    Args:
        images: Shape ``(N, ..., H, W)`` in ``[0, 1]``; larger ones are reduced to 32 pixels first,
            so that the resolution does not matter.
    """
    flat = images.flatten(0, -3)[:, None]
    height, width = flat.shape[-2:]
    if min(height, width) > _SIDE:
        flat = F.interpolate(flat, size=(_SIDE, _SIDE), mode="area")
    steps = [flat.diff(dim=axis).pow(2).mean((1, 2, 3)) for axis in (-2, -1)]
    return float((sum(steps) / 2 / flat.var((1, 2, 3)).clamp(min=1e-6)).median())
