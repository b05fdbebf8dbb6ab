"""What processors of ``transformers`` say about images and frames, followed inside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.errors import BadInputError, one_line
from mmdefense_adapters.classifier import Classifier
from mmdefense_adapters.peft_models import base_of

__all__ = [
    "Processed",
    "class_names",
    "is_of",
    "said_by",
    "scaling",
    "settings_of",
    "side_lengths",
]

_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_PARTS = ("image_processor", "video_processor")  # of a file that describes several

Size = tuple[int, int]


class Processed(Classifier):
    """Resizes and scales as a processor says; mixed into the adapters of ``transformers``.

    It happens inside, on the device and differentiably, so that inputs and triggers stay in pixel
    space, ``[0, 1]``, at the size in which they came.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: Size | None = None,
        example: Tensor | None = None,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: The classifier; it is not copied.
            processor: Its processor, or the content of ``preprocessor_config.json``; by default the
                file in the folder that the model was loaded from. Fills in ``mean``, ``std`` and
                ``image_size`` where they are not given.
            mean: Per-channel mean that inputs are shifted by.
            std: Per-channel deviation that inputs are divided by.
            image_size: Height and width in pixels that images or frames are resized to.
            example: One input batch, shape ``(1, C, ...)``; by default the first that is seen.
        """
        settings = settings_of(processor, model)
        if mean is None and std is None:
            mean, std = scaling(settings)
        super().__init__(model, mean=mean, std=std, example=example)
        self.image_size = image_size or side_lengths(settings)

    def reading(self) -> dict[str, Any]:
        """Return the names of the classes and the number of channels, of the model's config."""
        return said_by(self.model)

    def _resized(self, images: Tensor) -> Tensor:
        """Return images ``(N, C, H, W)`` in the size that the model reads."""
        if self.image_size is None or tuple(images.shape[-2:]) == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode="bilinear", antialias=True)


def is_of(model: nn.Module, ending: str) -> bool:
    """Say whether a model, or what ``peft`` wraps, is of ``transformers`` and its class so named.

    Nothing is imported.
    """
    return any(
        kind.__module__.startswith("transformers.") and kind.__name__.endswith(ending)
        for kind in type(base_of(model)).__mro__
    )


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's classes in order, or nothing where it does not tell them."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, Mapping):
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    placeholders = tuple(f"LABEL_{index}" for index in range(len(ordered)))
    return () if ordered == placeholders else ordered


def said_by(model: nn.Module) -> dict[str, Any]:
    """Return ``classes`` and ``channels``, where the config of a model names them."""
    channels = getattr(getattr(model, "config", None), "num_channels", None)
    said = {"classes": class_names(model), "channels": channels}
    return {name: value for name, value in said.items() if value}


def _beside(model: nn.Module) -> dict[str, Any]:
    """Return the settings of the processor that lies beside a model's weights, or nothing."""
    folder = getattr(model, "name_or_path", "")
    paths = (Path(folder) / name for name in _FILES)
    path = next((path for path in paths if folder and path.is_file()), None)
    if path is None:
        return {}
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path} must be JSON: {one_line(error)}") from error
    return next((held[part] for part in _PARTS if part in held), held)


def settings_of(processor: Any, model: nn.Module) -> Mapping[str, Any]:
    """Return the settings of ``processor``; where that is none, of the one beside the weights.

    Raises:
        BadInputError: If it is no processor, or the file is damaged.
    """
    if processor is None:
        return _beside(model)
    if isinstance(processor, Mapping):
        return processor
    if hasattr(processor, "to_dict"):
        settings: Mapping[str, Any] = processor.to_dict()
        return settings
    raise BadInputError(
        f"processor must be an image processor or its settings, got {type(processor).__name__}"
    )


def scaling(
    settings: Mapping[str, Any],
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Return mean and deviation for inputs in ``[0, 1]``; none where a processor has none."""
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", True) or mean is None or std is None:
        return None, None
    # Processors read 0..255 and multiply by the factor; ours is the part that 1/255 leaves over.
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    scale, shift = 255 * factor, float(bool(settings.get("offset")))  # ViViT's: to [-1, 1] first
    return [(value + shift) / scale for value in mean], [value / scale for value in std]


def side_lengths(settings: Mapping[str, Any]) -> Size | None:
    """Return the height and width that a processor delivers, where it resizes."""
    cropped = settings.get("do_center_crop") and settings.get("crop_size")
    size = cropped or (settings.get("do_resize", True) and settings.get("size"))
    if not size:
        return None
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        shortest = int(size["shortest_edge"])
        return shortest, int(size.get("longest_edge", shortest))
    return int(size["height"]), int(size["width"])
