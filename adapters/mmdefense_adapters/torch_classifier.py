"""Any PyTorch image classifier: torchvision, timm, or a custom class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from mmdefense.data.batch import Samples, Views
from mmdefense.data.images import random_shift, random_view
from mmdefense.data.labelled import LabelledBatch
from mmdefense.protocol import TriggerFamily
from mmdefense_adapters.classifier import Classifier
from mmdefense_adapters.images import ImageTriggers, as_labelled_samples, mirrored
from mmdefense_adapters.peft_models import base_of
from mmdefense_adapters.views import with_augmentation

__all__ = ["TorchClassifier"]


class TorchClassifier(ImageTriggers, Classifier):
    """Wraps a module that maps images ``(N, C, H, W)`` to logits ``(N, K)``.

    Images are in ``[0, 1]``; ``mean`` and ``std`` are applied inside, so that triggers are in pixel
    space.
    """

    task: ClassVar[str] = "image-classification"
    noun: ClassVar[str] = "images"
    bounded: ClassVar[bool] = True
    misreadings: ClassVar[str] = "the labels, normalisation, channels and image size"
    generic: ClassVar[bool] = True

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether to try this model: any module except those of ``transformers``.

        These return output objects, and supported ones have their own adapters.
        """
        return isinstance(model, nn.Module) and not type(base_of(model)).__module__.startswith(
            "transformers."
        )

    def _as_samples(self, data: Any) -> Samples[LabelledBatch]:
        return as_labelled_samples(data)

    def viewed(self, samples: Samples[LabelledBatch], views: Views) -> Samples[LabelledBatch]:
        """Return augmented images; standard views are crops and perhaps mirroring."""
        return with_augmentation(
            self,
            samples,
            views,
            standard=random_shift,
            insertions=random_view,
            mirrored=mirrored,
        )

    def trigger_families(self) -> Sequence[TriggerFamily]:
        """Return patches at any position and additive patterns, for images of this size."""
        return self.image_families(tuple(self._example().inputs.shape[1:]))
