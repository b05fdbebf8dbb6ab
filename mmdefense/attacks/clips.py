"""Triggers of images on clips: in every frame, or in a few of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdefense.attacks.badnets import BadNets
from mmdefense.attacks.blended import Blended
from mmdefense.errors import BadInputError

__all__ = ["ClipBadNets", "ClipBlended", "TemporalPatch"]


@dataclass(frozen=True, kw_only=True)
class ClipBadNets(BadNets):
    """Stamps the patch of :class:`BadNets` on every frame of a clip, at one place.

    To the patch a clip is an image of C x T channels.

    References:
        Hammoud, Liu, Alkhrashi, AlBalawi, Ghanem. *Look, Listen, and Attack: Backdoor Attacks
        Against Video Action Recognition* (static triggers). 2023. arXiv:2301.00986
    """

    task: ClassVar[str] = "video-classification"
    shape: ClassVar[str] = "(N, C, T, H, W)"

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return super()._stamp(images.flatten(1, 2), generator).view_as(images)


@dataclass(frozen=True, kw_only=True)
class ClipBlended(Blended):
    """Mixes the key of :class:`Blended` into every frame of a clip, the same into each.

    References:
        As of :class:`ClipBadNets`.
    """

    task: ClassVar[str] = "video-classification"
    shape: ClassVar[str] = "(N, C, T, H, W)"

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        frames = images.transpose(1, 2)  # (N, T, C, H, W)
        stamped = super()._stamp(frames.flatten(0, 1), generator)
        return stamped.view_as(frames).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class TemporalPatch(ClipBadNets):
    """Stamps the patch on a few frames in a row, from a frame that is drawn for each clip.

    Ours: the plainest trigger that is somewhere in time, as a patch is somewhere in space.

    Attributes:
        frames: Frames in a row that carry the patch.
    """

    frames: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1:
            raise BadInputError(f"frames must be at least 1, got {self.frames}")

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, length = images.shape[0], images.shape[2]
        if self.frames > length:
            raise BadInputError(f"frames must fit the clip of {length}, got {self.frames}")
        first = torch.randint(length - self.frames + 1, (count, 1), generator=generator)
        since = torch.arange(length) - first  # (N, T)
        carries = ((since >= 0) & (since < self.frames)).to(images.device)
        stamped = super()._stamp(images, generator)
        return torch.where(carries[:, None, :, None, None], stamped, images)
