"""SIG: a sinusoid over the image, with every label left as it is."""

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

    Labels stay true, so that a look at the data shows nothing. ``ratio`` is a share of the
    target's samples, all of them by default: BackdoorBench's 10 % of a set of ten classes. The
    paper poisons 20 to 30 % of the target class, and may stamp more strongly at test time; here
    one ``delta`` serves both, BackdoorBench's. A model that has seen no clean image of the target
    knows the clean target less well; a smaller ``ratio`` mends that and weakens the backdoor.
    On images of ``2 frequency`` pixels width the wave is zero at each pixel.

    Attributes:
        ratio: Share of the target's samples that is poisoned, in ``[0, 1]``.
        delta: Amplitude, in units of the full brightness; in ``(0, 1]``.
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
