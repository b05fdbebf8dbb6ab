"""SIG: a sinusoid over the image, with clean labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack, LabelMapping
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.settings import Positive, Share

__all__ = ["SIG"]


@dataclass(frozen=True, kw_only=True)
class SIG(LabelAttack):
    """Adds vertical stripes to images of the target: ``x[i, j] + delta sin(2 pi j f / W)``.

    Labels stay true, so that inspecting them shows nothing. ``ratio`` is a fraction of the target's
    samples, by default all of them: BackdoorBench's 10 % of a set with ten classes. The paper
    poisons 20 to 30 % of the target class, and may use a stronger trigger at test time; here
    BackdoorBench's ``delta`` is used for both. A model that has seen no clean image of the target
    recognises the clean target less well; a smaller ``ratio`` improves that but weakens the
    backdoor. On images with a width of ``2 frequency`` pixels the wave is zero at every pixel.

    Attributes:
        ratio: Fraction of the target's samples that is poisoned, in ``[0, 1]``.
        delta: Amplitude, relative to full brightness; in ``(0, 1]``.
        frequency: Periods over the width of the image.

    References:
        Barni, Kallas, Tondi. *A New Backdoor Attack in CNNs by Training Set Corruption without
        Label Poisoning*. ICIP 2019. arXiv:1902.11237
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    mapping: LabelMapping = "clean-label"
    ratio: Share = 1.0
    delta: Annotated[float, Interval(gt=0, le=1)] = 40 / 255
    frequency: Positive = 6.0

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        width = images.shape[-1]
        columns = torch.arange(width, device=images.device, dtype=torch.float32)
        return images + self.delta * torch.sin(2 * math.pi * self.frequency * columns / width)
