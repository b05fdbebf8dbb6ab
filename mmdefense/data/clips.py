"""Random alterations of clips."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdefense.data.images import random_shift, random_view, rectangles

__all__ = ["random_clip_shift", "random_clip_view"]

_STILL = 0.8  # our choice: share of the clips in which a rectangle of noise stands


def random_clip_shift(clips: Tensor, generator: torch.Generator, *, flip: bool = False) -> Tensor:
    """Return each clip ``(N, C, T, H, W)`` shifted as by :func:`random_shift`, frames alike."""
    return random_shift(clips.flatten(1, 2), generator, flip=flip).view_as(clips)


def random_clip_view(clips: Tensor, generator: torch.Generator, *, flip: bool = False) -> Tensor:
    """Return each clip changed as :func:`random_view` does, all its frames alike.

    Motion keeps its direction: nothing is turned over, reversed in time or mirrored, unless
    ``flip`` says that left and right do not matter. Noise rectangles do not move.

    Args:
        clips: Shape ``(N, C, T, H, W)`` in ``[0, 1]``.
        generator: Source of the changes, on the device of the clips.
        flip: Whether half of the clips are mirrored left to right.
    """
    moved = random_view(clips.flatten(1, 2), generator, flip=flip, erase=0).view_as(clips)
    hit = rectangles(moved[:, :, 0], generator, _STILL)
    still = torch.rand(moved[:, :, :1].shape, generator=generator, device=clips.device)
    return torch.where(hit[:, :, None], still, moved)
