"""Video classifiers of the ``transformers`` library: VideoMAE, TimeSformer, ViViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.batches import LabelledBatch, Samples
from mmdefense.errors import BadInputError
from mmdefense_adapters.huggingface_image import read_processor
from mmdefense_adapters.video import TorchVideoClassifier

__all__ = ["HFVideoClassifier"]


class HFVideoClassifier(TorchVideoClassifier):
    """Wraps a ``transformers`` model for video classification, with its processor.

    The processor's resizing and scaling happen inside, as in ``HFImageClassifier``. The model must
    get as many frames as it was built for.
    """

    priority: ClassVar[int] = 10

    def __init__(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: tuple[int, int] | None = None,
        example: Tensor | None = None,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: The classifier; it is not copied.
            processor: Its processor, or the content of ``preprocessor_config.json``; fills in
                ``mean``, ``std`` and ``image_size`` where they are not given.
            mean: Per-channel mean that inputs are shifted by.
            std: Per-channel deviation that inputs are divided by.
            image_size: Height and width in pixels that frames are resized to.
            example: One input batch, shape ``(1, C, T, H, W)``; by default the first that is seen.
        """
        if processor is not None:
            mean, std, image_size = read_processor(processor, mean, std, image_size)
        super().__init__(model, mean=mean, std=std, example=example)
        self.image_size = image_size

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Say whether ``model`` is one of ``transformers``, which is not imported to find out."""
        return any(
            kind.__module__.startswith("transformers.")
            and kind.__name__.endswith("ForVideoClassification")
            for kind in type(model).__mro__
        )

    def _check(self, samples: Samples[LabelledBatch], first: Tensor) -> None:
        needed = getattr(getattr(self.model, "config", None), "num_frames", None)
        if needed and first.ndim == 5 and first.shape[2] != needed:
            raise BadInputError(
                f"clips must have {needed} frames, as the model reads, got {first.shape[2]}; "
                f"load them with frames={needed}"
            )
        super()._check(samples, first)

    def _call(self, inputs: Tensor) -> Tensor:
        frames = inputs.transpose(1, 2)  # (N, T, C, H, W)
        if self.image_size is not None and tuple(frames.shape[-2:]) != self.image_size:
            flat = F.interpolate(
                frames.flatten(0, 1), self.image_size, mode="bilinear", antialias=True
            )
            frames = flat.view(*frames.shape[:3], *self.image_size)
        return self.model(pixel_values=frames).logits  # type: ignore[no-any-return]
