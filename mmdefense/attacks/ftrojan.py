"""FTrojan: a change of two frequencies of the chroma channels, invisible in the pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.settings import Positive

__all__ = ["FTrojan"]

_RGB = torch.tensor([[0.0, -0.395, 2.032], [1.140, -0.581, 0.0]])  # of one unit of U and of V


@dataclass(frozen=True, kw_only=True)
class FTrojan(LabelAttack):
    """Raises two coefficients of the discrete cosine transform of each block of U and V.

    They are a middle and the highest frequency, ``(block / 2 - 1, block / 2 - 1)`` and
    ``(block - 1, block - 1)``. Since the transform is linear, this adds one fixed pattern, which is
    computed in closed form. If images do not have three channels, the pattern is added to each
    channel, and pixels beyond the last whole block are not changed (both ours).

    Attributes:
        magnitude: Amount added to each of the two coefficients of the orthonormal transform,
            relative to full brightness.
        block: Side of a block in pixels; smaller images are one block.

    References:
        Wang, Yao, Xu, An, Tong, Wang. *An Invisible Black-box Backdoor Attack through Frequency
        Domain*. ECCV 2022. doi:10.1007/978-3-031-19778-9_23
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    magnitude: Positive = 30 / 255
    block: Annotated[int, Ge(2)] = 32

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images + self._picture(images.shape[-3:]).to(images)

    def _picture(self, shape: torch.Size) -> Tensor:
        """Return the pattern to add to images of ``shape`` (C, H, W)."""
        channels, height, width = shape
        side = min(self.block, height, width)
        tile = _wave(side, side // 2 - 1) + _wave(side, side - 1)
        plane = torch.zeros(height, width)
        rows, columns = height // side, width // side
        plane[: rows * side, : columns * side] = self.magnitude * tile.repeat(rows, columns)
        weights = _RGB.sum(0) if channels == 3 else torch.ones(channels)
        return weights[:, None, None] * plane


def _wave(side: int, order: int) -> Tensor:
    """Return the basis image of coefficient ``(order, order)``, shape ``(side, side)``."""
    scale = math.sqrt((1 if order == 0 else 2) / side)
    line = scale * torch.cos(math.pi * (torch.arange(side) + 0.5) * order / side)
    return line[:, None] * line
