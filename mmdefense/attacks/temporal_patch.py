"""A patch in a few frames of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdefense.attacks.badnets import BadNets
from mmdefense.errors import BadInputError
from mmdefense.settings import Count

__all__ = ["TemporalPatch"]


@dataclass(frozen=True, kw_only=True)
class TemporalPatch(BadNets):
    """Stamps the patch on a few frames in a row, from a frame that is drawn for each clip.

    Ours: the plainest trigger that is somewhere in time, as a patch is somewhere in space.

    Attributes:
        frames: Frames in a row that carry the patch.
    """

    tasks: ClassVar[tuple[str, ...]] = ("video-classification",)

    frames: Count = 2

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, length = images.shape[:2]
        if self.frames > length:
            raise BadInputError(f"frames must fit into a clip of {length}, got {self.frames}")
        first = torch.randint(length - self.frames + 1, (count, 1), generator=generator)
        since = torch.arange(length) - first  # (N, T)
        carries = ((since >= 0) & (since < self.frames)).to(images.device)
        stamped = super()._stamp(images, generator)
        return torch.where(carries[:, :, None, None, None], stamped, images)
