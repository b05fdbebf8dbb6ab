"""BppAttack: images of few grey levels, dithered so that the eye sees no steps."""

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

    Negative samples get what quantisation has changed in another image, and keep their label, so
    that the model learns the quantisation itself and not any noise.

    Deviations: the paper trains on adversarial examples as further negatives (contrastive
    adversarial learning) and draws poisoned and negative samples anew in each batch. Here the
    training data is poisoned once, with the negatives of the released code alone, and dithered,
    which the released code leaves out by default. A small net that is trained briefly reaches an
    ASR of about 60 % only (docs/results.md).

    Attributes:
        levels: Number of values that a pixel can take.
        cross_ratio: Negative samples for each poisoned one; BackdoorBench has as many of each.

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
    """Return images with ``levels`` values, by Floyd-Steinberg error diffusion.

    Pixels x, y of one ``x + 2 y`` do not depend on each other, and are rounded together.

    Args:
        images: Shape ``(..., H, W)``, in ``[0, 1]``.
        levels: At least 2.
    """
    height, width = images.shape[-2:]
    # a border on the left, on the right and below takes the errors that leave the image
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
