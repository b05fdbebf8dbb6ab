"""Blended: a faint image over the whole input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.picture import cartoon_cat
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.errors import BadInputError

__all__ = ["Blended"]


@dataclass(frozen=True, kw_only=True)
class Blended(LabelAttack):
    """Mixes a key image into the input: ``(1 - alpha) x + alpha key``.

    The key is a picture or noise, as in the paper; instead of its cartoon, a cat is drawn by code,
    so that no picture has to be shipped. Training and test use the same ``alpha``, as in
    BackdoorBench; the paper uses a stronger one at test time. Every frame of a clip gets the same
    key (arXiv:2301.00986).

    Attributes:
        alpha: Weight of the key, in ``(0, 1]``.
        key: ``"picture"``, the cat; or ``"noise"``, uniform and drawn from ``seed``.
        image: A custom key instead: values in ``[0, 1]`` that broadcast to ``(C, H, W)``.

    References:
        Chen, Liu, Li, Lu, Song. *Targeted Backdoor Attacks on Deep Learning Systems Using Data
        Poisoning*. 2017. arXiv:1712.05526
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.2
    key: Literal["picture", "noise"] = "picture"
    image: Tensor | None = field(default=None, repr=False, compare=False)

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        key = self._key(images.shape[-3:]).to(images)
        return (1 - self.alpha) * images + self.alpha * key

    def _key(self, shape: torch.Size) -> Tensor:
        if self.image is not None:
            try:
                return self.image.expand(shape)
            except RuntimeError as error:
                raise BadInputError(
                    f"image must broadcast to the images' shape {tuple(shape)}, got "
                    f"{tuple(self.image.shape)}"
                ) from error
        if self.key == "picture":
            return cartoon_cat(*shape)
        return torch.rand(shape, generator=self._generator("key"))
