"""Adaptive-Blend and Adaptive-Patch: partial triggers, also on samples that keep their label."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from mmdefense.attacks.base import replaced
from mmdefense.attacks.blended import Blended
from mmdefense.attacks.label_attack import LabelAttack, class_count
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.protocol import TaskAdapter
from mmdefense.settings import Count, NotNegative

__all__ = ["AdaptiveBlend", "AdaptivePatch"]


@dataclass(frozen=True, kw_only=True)
class _Adaptive(LabelAttack):
    """Applies a part of the trigger in training and the whole trigger at test time.

    Some samples with a partial trigger keep their label (cover samples). The victim then has to
    weigh the trigger against other evidence, and the features of poisoned samples lie among those
    of the target.
    """

    cover_ratio: NotNegative = 1.0

    def poison(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> LabelledSamples:
        """Return the training set with poisoned and cover samples, in the same order.

        Raises:
            BadInputError: If there are too few samples for both.
        """
        chosen = self.chosen(self._checked(samples).labels)
        labels = samples.labels.clone()
        labels[chosen] = self.targets(labels[chosen], class_count(adapter))
        changed = torch.cat([chosen, self.bystanders(samples.labels, self.cover_ratio)])
        images = samples.take(changed).inputs
        strength = self._strength(images, self._generator("poison")).to(images)
        partial = images + strength * (self.stamp(images) - images)
        return replace(samples, inputs=replaced(samples.inputs, changed, partial), labels=labels)

    @abstractmethod
    def _strength(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the strength of the trigger in training, broadcastable to the images."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveBlend(_Adaptive, Blended):
    """Blends in the whole key at test time, and some of its pieces, drawn per image, in training.

    Deviation: the poisoning ratio is that of the other attacks here, so that they can be compared;
    the paper uses 0.3 to 0.5 %.

    Attributes:
        cover_ratio: Number of cover samples per poisoned one.
        pieces: Pieces along each side.
        shown: Fraction of the pieces that an image gets in training; in ``(0, 1]``.

    References:
        Qi, Xie, Li, Mahloujifar, Mittal. *Revisiting the Assumption of Latent Separability for
        Backdoor Defenses*. ICLR 2023.
    """

    pieces: Count = 4
    shown: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def _strength(self, images: Tensor, generator: torch.Generator) -> Tensor:
        total = self.pieces**2
        order = torch.rand(len(images), total, generator=generator).argsort(1).argsort(1)
        shown = (order < max(1, round(self.shown * total))).float()
        height, width = images.shape[-2:]
        rows, columns = (torch.arange(side) * self.pieces // side for side in (height, width))
        shown = shown.view(-1, self.pieces, self.pieces)[:, rows][:, :, columns]
        return shown.view(-1, *[1] * (images.ndim - 3), height, width)


@dataclass(frozen=True, kw_only=True)
class AdaptivePatch(_Adaptive):
    """Applies a patch to each corner at test time, and a faint one to one corner in training.

    The corner is drawn for each image. The four patches differ; each has random black and white
    pixels in each channel, drawn from ``seed``.

    Deviations: the paper's four triggers are pictures of several sizes and opacities, two of which
    are applied at test time. The poisoning ratio is that of the other attacks here; the paper uses
    0.3 to 0.5 %.

    Attributes:
        cover_ratio: Number of cover samples per poisoned one.
        size: Side of a patch in pixels; None takes a quarter of the image's shorter side.
        opacity: Opacity of the patch in training; in ``(0, 1]``.

    References:
        Qi, Xie, Li, Mahloujifar, Mittal. *Revisiting the Assumption of Latent Separability for
        Backdoor Defenses*. ICLR 2023.
    """

    size: Count | None = None
    opacity: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        stamped = images.clone()
        corners = self._corners(images)
        side = corners[0][0].stop
        shape = (4, images.shape[-3], side, side)
        patches = torch.randint(2, shape, generator=self._generator("patches"))
        for (rows, columns), patch in zip(corners, patches, strict=True):
            stamped[..., rows, columns] = patch.to(images)
        return stamped

    def _strength(self, images: Tensor, generator: torch.Generator) -> Tensor:
        strength = torch.zeros(4, *images.shape[-2:])
        for corner, (rows, columns) in enumerate(self._corners(images)):
            strength[corner, rows, columns] = self.opacity
        picked = torch.randint(4, (len(images),), generator=generator)
        return strength[picked].view(-1, *[1] * (images.ndim - 3), *images.shape[-2:])

    def _corners(self, images: Tensor) -> list[tuple[slice, slice]]:
        """Return rows and columns of the patches, the top left one first.

        Raises:
            BadInputError: If two patches do not fit side by side.
        """
        shortest = min(images.shape[-2:])
        side = self.size or max(1, shortest // 4)
        if 2 * side > shortest:
            raise BadInputError(
                f"size must fit twice into an image of {shortest} pixels, got {side}"
            )
        first, last = slice(0, side), slice(-side, None)
        return [(rows, columns) for rows in (first, last) for columns in (first, last)]
