"""WaNet: a smooth, invisible warp; other warps do not activate the backdoor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from mmdefense.attacks.base import replaced
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.protocol import TaskAdapter
from mmdefense.settings import NotNegative, Positive

__all__ = ["WaNet"]


@dataclass(frozen=True, kw_only=True)
class WaNet(LabelAttack):
    """Moves pixels along one smooth random field, the same for all images.

    The field is ``k x k`` vectors, uniform in ``[-1, 1]``, divided by their mean magnitude and
    upsampled bicubically; pixels are read at ``clip(identity + strength field / side, -1, 1)``.
    Noise-mode samples are warped along the field plus individual jitter, uniform in
    ``[-1, 1] / side``, and keep their true label, so that no other warp activates the backdoor. The
    warped samples are drawn once for the training set; the released code draws anew in each batch.
    Both warp before augmentation.

    Attributes:
        grid: Number k of control points along each side, at least 2.
        strength: Size s of the warp; 0.5 shifts pixels by about a quarter pixel.
        cross_ratio: Noise-mode samples per poisoned one.

    References:
        Nguyen, Tran. *WaNet - Imperceptible Warping-based Backdoor Attack*. ICLR 2021.
        arXiv:2102.10369
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    grid: Annotated[int, Ge(2)] = 4
    strength: Positive = 0.5
    cross_ratio: NotNegative = 2.0

    def poison(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> LabelledSamples:
        """Return the training set with poisoned and noise-mode samples, in the same order.

        Raises:
            BadInputError: If there are too few samples for both.
        """
        poisoned = super().poison(samples, adapter)
        noisy = self.bystanders(samples.labels, self.cross_ratio)
        images = samples.take(noisy).inputs
        frames = images.transpose(1, 2) if images.ndim > 4 else images
        jitter = torch.rand(
            len(images), *images.shape[-2:], 2, generator=self._generator("jitter")
        ).to(images)
        warped = _read(frames, self._field(images) + (2 * jitter - 1) / _sides(images))
        warped = warped.transpose(1, 2) if images.ndim > 4 else warped
        return replace(poisoned, inputs=replaced(poisoned.inputs, noisy, warped.clamp(0, 1)))

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return _read(images, self._field(images))

    def _field(self, images: Tensor) -> Tensor:
        """Return the sampling grid, shape ``(1, H, W, 2)``, x before y, in ``[-1, 1]``."""
        height, width = images.shape[-2:]
        control = torch.rand(1, 2, self.grid, self.grid, generator=self._generator("field"))
        control = 2 * control - 1
        field = F.interpolate(
            control / control.abs().mean(), (height, width), mode="bicubic", align_corners=True
        )
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
        )
        shift = self.strength * field.permute(0, 2, 3, 1).to(images) / _sides(images)
        return (torch.stack([x, y], -1).to(images) + shift).clamp(-1, 1)


def _read(images: Tensor, grid: Tensor) -> Tensor:
    """Sample ``images`` at ``grid``, shape ``(1, H, W, 2)`` or ``(N, H, W, 2)``."""
    grid = grid.clamp(-1, 1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images.flatten(1, -3), grid, align_corners=True).view_as(images)


def _sides(images: Tensor) -> Tensor:
    """Return width and height in pixels, shape ``(2,)``."""
    return torch.tensor([images.shape[-1], images.shape[-2]]).to(images)
