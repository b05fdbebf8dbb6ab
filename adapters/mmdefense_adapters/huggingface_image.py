"""Image classifiers of the ``transformers`` library: ViT, ResNet, ConvNeXt, Swin and their kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.errors import BadInputError
from mmdefense_adapters.torch_classifier import TorchClassifier

__all__ = ["HFImageClassifier", "read_processor"]


class HFImageClassifier(TorchClassifier):
    """Wraps a ``transformers`` model for image classification, with its image processor.

    The processor's resizing and scaling happen inside, on the device and differentiably, so that
    images and triggers stay in pixel space, ``[0, 1]``, at the size in which they came.
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
            processor: Its image processor, or the content of ``preprocessor_config.json``; fills in
                ``mean``, ``std`` and ``image_size`` where they are not given.
            mean: Per-channel mean that inputs are shifted by.
            std: Per-channel deviation that inputs are divided by.
            image_size: Height and width in pixels that inputs are resized to.
            example: One input batch, shape ``(1, C, H, W)``; by default the first that is seen.
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
            and kind.__name__.endswith("ForImageClassification")
            for kind in type(model).__mro__
        )

    def _call(self, inputs: Tensor) -> Tensor:
        if self.image_size is not None and tuple(inputs.shape[-2:]) != self.image_size:
            inputs = F.interpolate(inputs, self.image_size, mode="bilinear", antialias=True)
        return self.model(pixel_values=inputs).logits  # type: ignore[no-any-return]


def read_processor(
    processor: Any,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    image_size: tuple[int, int] | None,
) -> tuple[Sequence[float] | None, Sequence[float] | None, tuple[int, int] | None]:
    """Return ``mean``, ``std`` and ``image_size``, filled in from a processor where not given."""
    settings = _settings(processor)
    if mean is None and std is None:
        mean, std = _scaling(settings)
    return mean, std, image_size or _size(settings)


def _settings(processor: Any) -> Mapping[str, Any]:
    if isinstance(processor, Mapping):
        return processor
    if hasattr(processor, "to_dict"):
        settings: Mapping[str, Any] = processor.to_dict()
        return settings
    raise BadInputError(
        f"processor must be an image processor or its settings, got {type(processor).__name__}"
    )


def _scaling(
    settings: Mapping[str, Any],
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Return mean and deviation for inputs in ``[0, 1]``."""
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", True) or mean is None or std is None:
        return None, None
    # Processors read 0..255 and multiply by the factor; ours is the part that 1/255 leaves over.
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    scale = 255 * factor
    return [value / scale for value in mean], [value / scale for value in std]


def _size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the height and width that the processor delivers, where it resizes."""
    cropped = settings.get("do_center_crop") and settings.get("crop_size")
    size = cropped or (settings.get("do_resize", True) and settings.get("size"))
    if not size:
        return None
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])
