"""Refool: a reflection, as in a window pane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.settings import Count

__all__ = ["Refool"]

_SHAPES = 6  # rectangles in a reflected scene


@dataclass(frozen=True, kw_only=True)
class Refool(LabelAttack):
    """Adds the reflection of another scene: ``x + strength k * R``.

    The kernel k is one of the paper's three: a single spike (both scenes are in focus), a Gaussian
    (the reflected scene is out of focus), or two separate spikes (a ghost, from a thick pane). The
    scenes cycle through the three, and each image gets a randomly drawn scene.

    Deviations: poisoned samples are labelled as the target, as in BackdoorBench, which finds the
    paper's clean labels too weak; so do we (docs/results.md), but ``mapping="clean-label"`` is
    available. The scenes R are bright rectangles on black, drawn from ``seed``; the paper takes
    photographs and selects those that work best in separate training runs. We do not select.

    Attributes:
        strength: Brightness of the reflection; in ``(0, 1]``.
        scenes: Number of different reflections.

    References:
        Liu, Ma, Bailey, Lu. *Reflection Backdoor: A Natural Backdoor Attack on Deep Neural
        Networks*. ECCV 2020. arXiv:2007.02343
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    strength: Annotated[float, Interval(gt=0, le=1)] = 0.4
    scenes: Count = 3

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        picked = torch.randint(self.scenes, (len(images),), generator=generator)
        reflected = self._reflections(images.shape[-3:])[picked].to(images)
        return images + self.strength * (reflected if images.ndim == 4 else reflected[:, None])

    def _reflections(self, shape: torch.Size) -> Tensor:
        """Return the reflected scenes as seen in the pane, ``(scenes, C, H, W)``."""
        generator, (channels, height, width) = self._generator("scenes"), shape
        shown = []
        for scene in range(self.scenes):
            picture = torch.zeros(shape)
            for _ in range(_SHAPES):
                draw = torch.rand(4 + channels, generator=generator)
                place, size, colour = draw[:2], draw[2:4], draw[4:]
                top, left = (place * torch.tensor([height, width])).long().tolist()
                tall, wide = (1 + size * torch.tensor([height, width]) / 2).long().tolist()
                picture[:, top : top + tall, left : left + wide] = colour[:, None, None]
            shown.append((_in_focus, _blurred, _ghost)[scene % 3](picture))
        return torch.stack(shown)


def _in_focus(picture: Tensor) -> Tensor:
    return picture


def _blurred(picture: Tensor) -> Tensor:
    """Return the picture blurred by a Gaussian of a sixteenth of its shorter side."""
    sigma = min(picture.shape[-2:]) / 16
    reach = max(1, round(3 * sigma))
    line = torch.exp(-((torch.arange(2 * reach + 1) - reach) ** 2) / (2 * sigma**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    return F.conv2d(picture[:, None], kernel, padding=reach)[:, 0]


def _ghost(picture: Tensor) -> Tensor:
    """Return the picture plus a fainter copy shifted by an eighth of the shorter side."""
    step = max(1, min(picture.shape[-2:]) // 8)
    return 0.6 * picture + 0.4 * picture.roll((step, step), (-2, -1))
