"""Video classifiers of the ``transformers`` library: VideoMAE, TimeSformer, ViViT."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from mmdefense.data.batch import Samples
from mmdefense.data.labelled import LabelledBatch
from mmdefense.errors import BadInputError
from mmdefense_adapters.huggingface_processor import Processed, is_of
from mmdefense_adapters.video import TorchVideoClassifier

__all__ = ["HFVideoClassifier"]


class HFVideoClassifier(Processed, TorchVideoClassifier):
    """Wraps a ``transformers`` model for video classification, with its processor.

    Clips must have the number of frames that the model was built for.
    """

    priority: ClassVar[int] = 10
    is_video: ClassVar[bool] = True
    auto_class: ClassVar[str] = "AutoModelForVideoClassification"

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether ``model`` is one of ``transformers``, without importing the library."""
        return is_of(model, "ForVideoClassification")

    def reading(self) -> dict[str, Any]:
        """Return the config's options, the number of frames, and how frames are resized."""
        stated = super().reading()
        own = getattr(getattr(self.model, "config", None), "image_size", None)
        if "fit" not in stated and isinstance(own, int):
            stated["image_size"] = own
        frames = self._frames()
        return stated | {"frames": frames} if frames else stated

    def _run(self, inputs: Tensor) -> Any:
        """Return the model's raw output for clips with frames of any size."""
        frames = inputs.transpose(1, 2)  # (N, T, C, H, W)
        flat = self.fitted(frames.flatten(0, 1))
        fitted = flat.view(*frames.shape[:2], *flat.shape[1:])
        return super()._run(fitted.transpose(1, 2))

    def _frames(self) -> int | None:
        return getattr(getattr(self.model, "config", None), "num_frames", None)

    def _check(self, samples: Samples[LabelledBatch], some: Tensor) -> int:
        needed = self._frames()
        if needed and some.ndim == 5 and some.shape[2] != needed:
            raise BadInputError(
                f"clips must have {needed} frames, as the model reads, got {some.shape[2]}; "
                f"load them with frames={needed}"
            )
        return super()._check(samples, some)

    def _call(self, inputs: Tensor) -> Any:
        return self.model(pixel_values=self._ordered(inputs).transpose(1, 2))
