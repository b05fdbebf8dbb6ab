"""BppAttack: images quantised to a few levels, dithered so that no steps are visible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from mmdefense.attacks.base import replaced
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.protocol import TaskAdapter
from mmdefense.settings import NotNegative

__all__ = ["BppAttack"]


@dataclass(frozen=True, kw_only=True)
class BppAttack(LabelAttack):
    """Quantises each channel to few levels, with Floyd-Steinberg dithering.

    Negative samples get the quantisation error of another image and keep their label, so that the
    model learns the quantisation itself and not just any noise.

    Deviations: the paper also trains on adversarial examples as negatives (contrastive adversarial
    learning) and draws poisoned and negative samples anew in each batch. Here the training data is
    poisoned once, with only the negatives of the released code, and with dithering, which the
    released code disables by default. A small network with short training reaches an ASR of only
    about 60 % (docs/results.md).

    Attributes:
        levels: Number of values that a pixel can take.
        cross_ratio: Negative samples per poisoned one; BackdoorBench uses equal numbers.

    References:
        Wang, Zhai, Ma. *BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural
        Networks via Image Quantization and Contrastive Adversarial Learning*. CVPR 2022.
        arXiv:2205.13383
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    levels: Annotated[int, Ge(2)] = 8
    cross_ratio: NotNegative = 1.0

    def poison(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> LabelledSamples:
        """Return the training set with poisoned and negative samples, in the same order.

        Raises:
            BadInputError: If there are too few samples for both.
        """
        poisoned = super().poison(samples, adapter)
        negative = self.bystanders(samples.labels, self.cross_ratio)
        order = torch.randperm(len(samples), generator=self._generator("donors"))
        donors = samples.take(order[: len(negative)].to(negative.device)).inputs
        residual = self.stamp(donors) - donors
        changed = (samples.take(negative).inputs + residual).clamp(0, 1)
        return replace(poisoned, inputs=replaced(poisoned.inputs, negative, changed))

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return dithered(images, self.levels)


def dithered(images: Tensor, levels: int) -> Tensor:
    """Quantise images to ``levels`` values by Floyd-Steinberg error diffusion.

    Pixels (x, y) with equal ``x + 2 y`` do not depend on each other and are rounded together.

    Args:
        images: Shape ``(..., H, W)``, in ``[0, 1]``.
        levels: At least 2.
    """
    height, width = images.shape[-2:]
    # padding on the left, right and bottom receives errors that leave the image
    room = torch.nn.functional.pad(images, (1, 1, 0, 1))
    for wave in range(width + 2 * height - 2):
        y = torch.arange(max(0, (wave - width + 2) // 2), min(height, wave // 2 + 1))
        x = wave - 2 * y + 1
        old = room[..., y, x]
        new = (old.clamp(0, 1) * (levels - 1)).round() / (levels - 1)
        room[..., y, x] = new
        for right, down, share in ((1, 0, 7), (-1, 1, 3), (0, 1, 5), (1, 1, 1)):
            room[..., y + down, x + right] += (old - new) * share / 16
    return room[..., :height, 1 : width + 1]
