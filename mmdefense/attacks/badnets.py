"""BadNets: a small patch with fixed pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.errors import BadInputError
from mmdefense.settings import Count

__all__ = ["BadNets", "checkerboard", "patch_side"]


@dataclass(frozen=True, kw_only=True)
class BadNets(LabelAttack):
    """Overwrites a square of ``size`` pixels: ``x[p] = pattern`` for p in the square.

    On a clip the same patch is at the same place in every frame (arXiv:2301.00986, static trigger).
    The patch touches the image border, as in BackdoorBench, whose patch is white.

    Attributes:
        size: Side of the patch in pixels; None takes 3 pixels of 32, in proportion for larger
            images and at least 2 (3 from 15 pixels up) for smaller ones.
        pattern: ``"checkerboard"``, with white corners if ``size`` is odd, or ``"white"``.
        position: ``"corner"`` is the bottom right one; ``"any"`` is drawn for each image.

    References:
        Gu, Dolan-Gavitt, Garg. *BadNets: Identifying Vulnerabilities in the Machine Learning Model
        Supply Chain*. 2017. arXiv:1708.06733
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    size: Count | None = None
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    position: Literal["corner", "any"] = "corner"

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        size = patch_side(self.size, min(height, width))
        rows, columns = self._corners(len(images), (height - size, width - size), generator)
        every = torch.arange(len(images))[:, None, None]
        within = torch.arange(size)
        patch = torch.ones(size, size) if self.pattern == "white" else checkerboard(size)
        stamped = images.flatten(1, -3).clone()  # the frames of a clip as channels
        # advanced indices around a slice move its axis to the end: (N, size, size, C)
        where = (every, slice(None), (rows + within)[:, :, None], (columns + within)[:, None, :])
        stamped[where] = patch.to(images)[None, :, :, None]
        return stamped.view_as(images)

    def _corners(
        self, count: int, room: tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the first row and column of each patch, each of shape ``(count, 1)``."""
        if self.position == "corner":
            return torch.tensor(room[0]).expand(count, 1), torch.tensor(room[1]).expand(count, 1)
        rows, columns = (
            torch.randint(extent + 1, (count, 1), generator=generator) for extent in room
        )
        return rows, columns


def patch_side(size: int | None, shortest: int) -> int:
    """Return the side of a patch on images whose shorter side is ``shortest`` pixels.

    Raises:
        BadInputError: If ``size`` does not fit.
    """
    side = size or max(2, min(3, shortest // 5), 3 * shortest // 32)
    if side > shortest:
        raise BadInputError(f"size must fit into an image of {shortest} pixels, got {side}")
    return side


def checkerboard(side: int) -> Tensor:
    """Return alternating black and white pixels, white in the corner, shape ``(side, side)``."""
    cells = torch.arange(side)
    return 1 - ((cells[:, None] + cells) % 2).float()
