"""Any PyTorch video classifier: pytorchvideo, torchvision's video models, or a custom class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mmdefense.data.batch import Samples, Views
from mmdefense.data.clips import random_clip_shift, random_clip_view
from mmdefense.data.labelled import LabelledBatch
from mmdefense.errors import BadInputError
from mmdefense.protocol import TriggerFamily
from mmdefense_adapters import pytorchvideo_models
from mmdefense_adapters.classifier import Classifier
from mmdefense_adapters.images import ImageTriggers, as_labelled_samples, mirrored
from mmdefense_adapters.views import with_augmentation

__all__ = ["TorchVideoClassifier"]


class TorchVideoClassifier(ImageTriggers, Classifier):
    """Wraps a module that maps clips ``(N, C, T, H, W)`` to logits ``(N, K)``.

    Clips are in ``[0, 1]``; ``mean`` and ``std`` are applied inside. A model is recognised as a
    video model by a 3-D convolution; for one without (a recurrent network over frames), pass
    ``task="video-classification"``. The trigger search uses the image triggers, the same in every
    frame.
    """

    task: ClassVar[str] = "video-classification"
    noun: ClassVar[str] = "clips"
    bounded: ClassVar[bool] = True
    misreadings: ClassVar[str] = (
        "the labels, normalisation, channels, image size, and the number and spacing of frames"
    )
    generic: ClassVar[bool] = True
    priority: ClassVar[int] = 5

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether ``model`` has a convolution over time, height and width."""
        return any(isinstance(module, nn.Conv3d) for module in model.modules())

    def _as_samples(self, data: Any) -> Samples[LabelledBatch]:
        return as_labelled_samples(data, axes=4)

    def viewed(self, samples: Samples[LabelledBatch], views: Views) -> Samples[LabelledBatch]:
        """Return augmented clips; standard views are crops and perhaps mirroring."""
        return with_augmentation(
            self,
            samples,
            views,
            standard=random_clip_shift,
            insertions=random_clip_view,
            mirrored=mirrored,
        )

    def _check(self, samples: Samples[LabelledBatch], some: Tensor) -> int:
        if some.ndim != 5:
            raise BadInputError(
                f"clips must have shape (N, C, T, H, W), got {('N', *some.shape[1:])}"
            )
        return super()._check(samples, some)

    def _call(self, inputs: Tensor) -> Any:
        return pytorchvideo_models.answer(self.model, inputs)

    def trigger_families(self) -> Sequence[TriggerFamily]:
        """Return patches at any position and additive patterns, the same in every frame."""
        channels, _, height, width = self._example().inputs.shape[1:]
        return self.image_families((channels, height, width))

    def stamp(self, batch: LabelledBatch, family: TriggerFamily, triggers: Tensor) -> LabelledBatch:
        """Return the clips with ``triggers``, shape ``(T, N, *P)``, in each frame: T x N clips."""
        return super().stamp(batch, family, triggers.unsqueeze(3))
