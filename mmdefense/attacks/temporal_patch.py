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
    """Applies the patch to a few consecutive frames, at a random start for each clip.

    Ours: the simplest trigger that is localised in time, as a patch is localised in space.

    Attributes:
        frames: Number of consecutive frames with the patch.
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
