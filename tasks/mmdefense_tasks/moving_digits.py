"""Handwritten digits that move in one of eight ways: clips that need no download."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError

__all__ = ["MOTIONS", "moving_digits"]

MOTIONS = (
    "left", "right", "up", "down", "clockwise", "counterclockwise", "growing", "shrinking"
)  # fmt: skip
_SIDE, _FRAMES = 24, 8
_COUNTS = {"train": 2400, "test": 400}
_SIZES = (0.32, 0.72)  # smallest and largest half side of a digit, in half sides of the frame


def moving_digits(split: str = "train", seed: int = 0) -> LabelledSamples:
    """Return clips ``(1, 8, 24, 24)`` of scikit-learn's real 8x8 scans in motion, labelled by it.

    No single frame reveals the motion: a digit that leaves on one side enters on the other, one
    that has grown to full size starts small again, and the initial position, size and angle have
    the same distribution for all motions. Each clip has its own drift, lighting and noise. Train
    and test split use different scans. The ranges are our choice.

    Args:
        split: ``"train"`` (2400 clips) or ``"test"`` (400).
        seed: Makes clips and split reproducible.

    Raises:
        BadInputError: If there is no such split.
    """
    if split not in _COUNTS:
        raise BadInputError(f"split must be 'train' or 'test', got {split!r}")
    count, generator = _COUNTS[split], torch.Generator().manual_seed(seed)
    scans = _scans(split, generator)
    generator.manual_seed(2 * seed + (split == "test"))
    labels = torch.arange(count) * len(MOTIONS) // count
    digits = scans[torch.randint(len(scans), (count,), generator=generator)]
    parts = zip(torch.split(digits, 400), torch.split(labels, 400), strict=True)
    clips = torch.cat([_filmed(*part, generator) for part in parts])
    return LabelledSamples((clips * 255).round().to(torch.uint8), labels, classes=MOTIONS)


def _scans(split: str, generator: torch.Generator) -> Tensor:
    """Return the scans of a split, ``(M, 1, 8, 8)`` in ``[0, 1]``."""
    from sklearn.datasets import load_digits

    scans = torch.from_numpy(load_digits().images).float().div(16)[:, None]
    order = torch.randperm(len(scans), generator=generator)
    fifth = len(scans) // 5
    return scans[order[:fifth] if split == "test" else order[fifth:]]


def _filmed(digits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return a clip of each digit, ``(N, 1, T, H, W)`` in ``[0, 1]``."""
    count = len(digits)
    draw = torch.rand(4, count, 1, 1, 1, 1, generator=generator)
    shown = _rendered(digits, *_paths(labels, generator))
    contrast, light = 0.45 + 0.45 * draw[0], 0.3 * draw[1]
    noise = torch.randn(shown.shape, generator=generator)
    return (light + contrast * shown + (0.04 + 0.1 * draw[2]) * noise).clamp(0, 1)


def _paths(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre ``(N, T, 2)``, angle ``(N, T)`` and half side ``(N, T)`` in every frame."""
    count = len(labels)
    start = torch.rand(4, count, 1, generator=generator) * 2 - 1
    speed = 0.5 + torch.rand(count, 1, generator=generator)
    drift = torch.randn(4, count, 1, generator=generator) * 0.15
    time = torch.arange(_FRAMES)
    # One row per motion: change of x, y, angle and size per frame at full speed.
    ways = torch.zeros(len(MOTIONS), 4)
    ways[torch.arange(8), torch.arange(8) // 2] = torch.tensor([-1.0, 1.0]).repeat(4)
    ways[[4, 5]] = ways[[5, 4]]  # clockwise is positive, since y points down
    ways[[6, 7]] = ways[[7, 6]]
    rate = (ways[labels].T[:, :, None] * speed + drift) * time  # (4, N, T)
    scale = torch.tensor([0.11, 0.11, math.radians(14), 0.09])
    x, y, angle, size = rate * scale[:, None, None] + start * torch.tensor(
        [1.0, 1.0, math.pi, 0.5]
    )[:, None, None]  # fmt: skip
    low, high = (math.log(value) for value in _SIZES)
    half_side = (low + (size + 0.5).remainder(1) * (high - low)).exp()
    return torch.stack([x, y], -1), angle, half_side


def _rendered(digits: Tensor, centre: Tensor, angle: Tensor, half_side: Tensor) -> Tensor:
    """Render each digit ``(1, 8, 8)`` along its path, on a frame that wraps around."""
    ticks = (torch.arange(_SIDE) + 0.5) * 2 / _SIDE - 1
    place = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)
    apart = (place - centre[:, :, None, None] + 1).remainder(2) - 1  # (N, T, H, W, 2)
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    turned = torch.stack(
        [cos * apart[..., 0] + sin * apart[..., 1], cos * apart[..., 1] - sin * apart[..., 0]], -1
    )
    grid = turned / half_side[..., None, None, None]
    flat = F.grid_sample(digits, grid.flatten(1, 2), align_corners=False)
    return flat.view(*flat.shape[:2], _FRAMES, _SIDE, _SIDE)
