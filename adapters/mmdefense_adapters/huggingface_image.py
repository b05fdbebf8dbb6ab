"""Image classifiers of the ``transformers`` library: ViT, ResNet, ConvNeXt, Swin and similar."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from mmdefense_adapters.huggingface_processor import Processed, is_of
from mmdefense_adapters.torch_classifier import TorchClassifier

__all__ = ["HFImageClassifier"]


class HFImageClassifier(Processed, TorchClassifier):
    """Wraps a ``transformers`` model for image classification, with its image processor."""

    priority: ClassVar[int] = 10
    auto_class: ClassVar[str] = "AutoModelForImageClassification"

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether ``model`` is one of ``transformers``, without importing the library."""
        return is_of(model, "ForImageClassification")

    def _run(self, inputs: Tensor) -> Any:
        """Return the model's raw output for images of any size."""
        return super()._run(self.fitted(inputs))

    def _call(self, inputs: Tensor) -> Any:
        return self.model(pixel_values=self._ordered(inputs))
