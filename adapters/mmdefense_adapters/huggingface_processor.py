"""Preprocessing of ``transformers`` processors for images and frames, applied inside the adapter.

The model's own processor is called: for the geometry (resizing, cropping, padding) on each batch,
on the device and differentiably; for mean, standard deviation and channel order once, on images of
uniform colour.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.checkpoints.configs import check_configs
from mmdefense.checkpoints.private_folder import offline
from mmdefense.errors import BadInputError, MMDefenseError, UnsupportedError, one_line
from mmdefense.files import read_json
from mmdefense.libraries import missing, needed
from mmdefense.notes import note
from mmdefense_adapters.classifier import Classifier
from mmdefense_adapters.peft_models import base_of

__all__ = ["Preprocessing", "Processed", "class_names", "is_of", "preprocessing_of", "stated_by"]

_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_ENDINGS = ("Fast", "Pil", "FeatureExtractor", "ImageProcessor", "VideoProcessor")
_OUTPUTS = ("pixel_values", "pixel_values_videos")
_SIDES = ((96, 96), (120, 72), (72, 120))  # of the test images for a processor, in pixels

Size = tuple[int, int]


@dataclass(frozen=True)
class Preprocessing:
    """What a model's own processor does to images, in two parts: geometry and scaling.

    Attributes:
        run: The processor itself: maps images ``(N, C, H, W)`` in 0..255 to pixel values.
        mean: Per-channel mean that it subtracts from images in ``[0, 1]``.
        std: Per-channel standard deviation that it divides them by.
        order: Which channel of an image is the i-th of the model, such as 2, 1, 0 for BGR.
        size: Its output height and width; None if they depend on the image.
        resizes: Whether it changes height or width at all.
    """

    run: Callable[[Tensor], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...]
    size: Size | None
    resizes: bool

    @property
    def is_scaling(self) -> bool:
        """Whether mean or std change anything."""
        return set(self.mean) != {0.0} or set(self.std) != {1.0}

    def fitted(self, images: Tensor) -> Tensor:
        """Return images ``(N, C, H, W)`` resized, cropped and padded.

        Images that already have the output size are not changed. For uint8 images the result equals
        the processor's. For images in ``[0, 1]`` the operation is differentiable; bilinear resizing
        differs from the processor only by rounding, bicubic also by overshoot at edges, which is
        clipped once at the end, not after each axis.
        """
        if not self.resizes or tuple(images.shape[-2:]) == self.size:
            return images
        whole = images.dtype == torch.uint8
        values = self.run(images if whole else images * 255)
        mean, std = (values.new_tensor(row)[:, None, None] for row in (self.mean, self.std))
        fitted = (values[:, _inverse(self.order)] * std + mean).clamp(0, 1)
        return (fitted * 255).round().to(images.dtype) if whole else fitted.to(images.dtype)

    def ordered(self, inputs: Tensor) -> Tensor:
        """Return inputs ``(N, C, ...)`` with their channels in the order of the model."""
        if self.order == tuple(range(len(self.order))):
            return inputs
        return inputs[:, list(self.order)]


class Processed(Classifier):
    """Mixin for adapters of ``transformers`` that applies the processor's preprocessing.

    This happens inside the adapter, on the device and differentiably, so that inputs and triggers
    stay in pixel space, ``[0, 1]``, at their original size.
    """

    is_video: ClassVar[bool] = False
    """Whether the model reads frames of clips."""

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
            processor: Its processor, or the content of ``preprocessor_config.json`` (empty for no
                processor); by default the one in the folder that the model was loaded from. It
                defines how images are resized, cropped and normalised.
            mean: Per-channel mean to subtract from inputs, in place of the processor's.
            std: Per-channel standard deviation to divide inputs by.
            image_size: Height and width in pixels to resize images or frames to, in place of the
                processor's geometry.
            example: One input batch, shape ``(1, C, ...)``; by default the first one seen.
        """
        found = preprocessing_of(processor, model, is_video=self.is_video, quiet=mean is not None)
        if mean is None and std is None and found is not None and found.is_scaling:
            mean, std = found.mean, found.std
        super().__init__(model, mean=mean, std=std, example=example)
        self.preprocessing = found
        self.image_size = image_size

    def reading(self) -> dict[str, Any]:
        """Return class names, channels, and how images of other sizes are resized."""
        stated = stated_by(self.model)
        own = self.preprocessing is not None and self.preprocessing.resizes
        return stated | {"fit": self.fitted} if own or self.image_size else stated

    def fitted(self, images: Tensor) -> Tensor:
        """Return images ``(N, C, H, W)``, uint8 or in ``[0, 1]``, in the size that is read."""
        if self.image_size is not None:
            if tuple(images.shape[-2:]) == self.image_size:
                return images
            return F.interpolate(images, self.image_size, mode="bilinear", antialias=True)
        return images if self.preprocessing is None else self.preprocessing.fitted(images)

    def _ordered(self, inputs: Tensor) -> Tensor:
        """Return inputs ``(N, C, ...)`` with their channels in the order of the model."""
        return inputs if self.preprocessing is None else self.preprocessing.ordered(inputs)


def is_of(model: nn.Module, ending: str) -> bool:
    """Return whether a model, or its ``peft`` base, is a ``transformers`` class with this ending.

    Nothing is imported.
    """
    return any(
        kind.__module__.startswith("transformers.") and kind.__name__.endswith(ending)
        for kind in type(base_of(model)).__mro__
    )


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's classes in order; empty if unknown."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, Mapping):
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    placeholders = tuple(f"LABEL_{index}" for index in range(len(ordered)))
    return () if ordered == placeholders else ordered


def stated_by(model: nn.Module) -> dict[str, Any]:
    """Return ``classes`` and ``channels``, if the config of a model states them."""
    stated = {"classes": class_names(model), "channels": _channels(model)}
    return {name: value for name, value in stated.items() if value}


def _channels(model: nn.Module) -> int | None:
    """Return the number of image channels in a model's config, if stated."""
    config = getattr(model, "config", None)
    timm = getattr(config, "pretrained_cfg", None)
    if isinstance(timm, Mapping) and timm.get("input_size"):
        return int(timm["input_size"][0])
    found = getattr(config, "num_channels", None)
    return found if isinstance(found, int) else None


def preprocessing_of(
    processor: Any, model: nn.Module, *, is_video: bool = False, quiet: bool = False
) -> Preprocessing | None:
    """Return the preprocessing of ``processor``; if that is None, of the one beside the weights.

    Args:
        processor: A processor of ``transformers``, its settings, or None.
        model: The model that it belongs to.
        is_video: Whether it processes frames.
        quiet: Whether to suppress the note that a folder has no processor.

    Raises:
        BadInputError: If it is not a processor, its file is damaged, or a setting is not usable.
        UnsupportedError: If it does not turn images into pixel values, or a library is missing.
    """
    if processor is None:
        return _beside(model, is_video, quiet)
    if isinstance(processor, Mapping):
        return _from_settings(processor, model, is_video, "the processor") if processor else None
    if _is_differentiable(processor):
        return _measured(processor, model, f"the processor {type(processor).__name__}")
    if hasattr(processor, "to_dict"):
        return preprocessing_of(processor.to_dict(), model, is_video=is_video)
    raise BadInputError(
        f"processor must be an image processor or its settings, got {type(processor).__name__}"
    )


def _is_differentiable(processor: Any) -> bool:
    """Return whether a processor computes with tensors: those of torchvision, video and timm."""
    return getattr(processor, "backend", "") == "torchvision" or hasattr(
        processor, "val_transforms"
    )


def _beside(model: nn.Module, is_video: bool, quiet: bool) -> Preprocessing | None:
    """Return the preprocessing of the processor beside a model's weights; note if there is none.

    For a timm folder that is the ``pretrained_cfg`` of its config.
    """
    where = str(getattr(model, "name_or_path", ""))
    timm = getattr(getattr(model, "config", None), "pretrained_cfg", None)
    if timm:
        return _of_timm(timm, model, f"pretrained_cfg of {Path(where, 'config.json')}")
    path = next((p for name in _FILES if where and (p := Path(where, name)).is_file()), None)
    if path is not None:
        return _from_settings(_read(path), model, is_video, str(path), path)
    if where and not quiet:
        note(
            f"no {_FILES[0]} beside the weights of {where}: images are read in [0, 1], without "
            "mean and std; pass --mean and --std if the model was trained with them"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    check_configs(path.parent)
    held: dict[str, Any] = read_json(path)
    return held


def _of_timm(settings: Any, model: nn.Module, where: str) -> Preprocessing:
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import (
        TimmWrapperImageProcessor,
    )

    with _naming(where):
        processor = TimmWrapperImageProcessor(pretrained_cfg=dict(settings))
    return _measured(processor, model, where)


def _from_settings(
    settings: Mapping[str, Any],
    model: nn.Module,
    is_video: bool,
    where: str,
    path: Path | None = None,
) -> Preprocessing:
    """Return the preprocessing of a processor with ``settings``.

    Raises:
        BadInputError: If they are not usable; the message names the setting if only one is wrong.
    """
    try:
        return _measured(_made(settings, model, is_video, where, path), model, where)
    except BadInputError as error:
        for name in settings:
            rest = {key: value for key, value in settings.items() if key != name}
            try:
                _measured(_made(rest, model, is_video, where), model, where)
            except MMDefenseError:
                continue
            raise BadInputError(f"{name!r} of {error}") from error
        raise


def _made(
    settings: Mapping[str, Any],
    model: nn.Module,
    is_video: bool,
    where: str,
    path: Path | None = None,
) -> Any:
    """Return the library's processor, read from its file or, without one, from a copy."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, _FILES[0])
            copy.write_text(json.dumps(settings, default=str), encoding="utf-8")
            return _made(settings, model, is_video, where, copy)
    with _naming(where), offline():
        from transformers import AutoImageProcessor, AutoVideoProcessor

        kind = AutoVideoProcessor if is_video else AutoImageProcessor
        config = getattr(model, "config", None)
        made = kind.from_pretrained(
            str(path.parent), config=config, trust_remote_code=False, local_files_only=True
        )
    named = settings.get("video_processor_type" if is_video else "image_processor_type")
    if isinstance(named, str) and _family(named) != _family(type(made).__name__):
        raise UnsupportedError(
            f"{where} names {named}, which transformers does not have; code that comes with a "
            "model is never run. Delete the file, and pass --mean, --std and --image-size"
        )
    if not _is_differentiable(made):  # the library falls back to Pillow without torchvision
        with needed(f"{type(made).__name__} of {where}", "torchvision"):
            import torchvision  # noqa: F401
        raise UnsupportedError(f"{type(made).__name__} of {where} does not compute with tensors")
    return made


def _family(name: str) -> str:
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name


@contextmanager
def _naming(where: str, purpose: str = "") -> Iterator[None]:
    """Turn the library's exceptions into one line that names the location of the settings."""
    try:
        yield
    except MMDefenseError:
        raise
    except ImportError as error:
        raise missing(where, error) from error
    except Exception as error:  # the library raises many exception types
        raise BadInputError(
            f"{where} cannot be used{purpose}: {type(error).__name__}: {one_line(error)}"
        ) from error


def _measured(processor: Any, model: nn.Module, where: str) -> Preprocessing:
    """Return a processor's preprocessing, determined from its outputs for uniform images.

    Raises:
        BadInputError: If it fails, or its values are not finite.
        UnsupportedError: If it does not output images, or mixes colours.
    """
    channels = _channels(model) or 3
    run = _runner(processor)

    def tried(images: Tensor) -> Tensor:
        with _naming(where, f" for images of {channels} channels"), torch.no_grad():
            values = run(images * 255)
        if not isinstance(values, Tensor) or values.ndim != 4 or values.shape[1] != channels:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UnsupportedError(
                f"{type(processor).__name__} of {where} must make images (N, {channels}, H, W) of "
                f"images of {channels} channels, got {found}"
            )
        return values

    # Black, each channel alone at its brightest, and mid-grey.
    one = torch.ones(1, channels)
    colours = torch.cat([0 * one, torch.eye(channels), one / 2])
    values = tried(colours[:, :, None, None].expand(-1, -1, *_SIDES[0]))
    others = [tried(torch.zeros(1, channels, *side)) for side in _SIDES[1:]]
    sizes = [(made.shape[2], made.shape[3]) for made in (values, *others)]
    bright = (values[1:-1] - values[:1]).abs().sum((0, 1))  # zero where it pads
    seen = values.double().flatten(2)[:, :, bright.argmax()]  # (colour, channel)
    mean, std, order = _scaling(seen, f"{type(processor).__name__} of {where}")
    return Preprocessing(
        run=run,
        mean=mean,
        std=std,
        order=order,
        size=sizes[0] if len(set(sizes)) == 1 else None,
        resizes=sizes != list(_SIDES),
    )


def _runner(processor: Any) -> Callable[[Tensor], Tensor]:
    """Return a processor as a function of images ``(N, C, H, W)`` in 0..255."""
    if hasattr(processor, "val_transforms"):
        return _timm_runner(processor.val_transforms.transforms)
    is_video = hasattr(processor, "sample_frames")
    more = {"do_sample_frames": False} if is_video else {}

    def run(pixels: Tensor) -> Tensor:
        given = processor(
            [pixels] if is_video else pixels,
            return_tensors="pt",
            input_data_format="channels_first",
            **more,
        )
        values: Tensor = next(given[name] for name in _OUTPUTS if name in given)
        return values[0] if values.ndim == 5 else values  # the frames of one video

    return run


def _timm_runner(transforms: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return timm's transforms as such a function; tensor transforms do not change the scale."""
    names = [type(one).__name__ for one in transforms]
    scaled = next((i for i, name in enumerate(names) if name.endswith("ToTensor")), len(names))

    def run(pixels: Tensor) -> Tensor:
        for transform in transforms[:scaled]:
            pixels = _bordered(transform, pixels)
        values = pixels / 255
        for transform in transforms[scaled + 1 :]:
            values = transform(values)
        return values

    return run


def _bordered(transform: Any, pixels: Tensor) -> Tensor:
    """Apply a transform to pixels, channel by channel if its padding has a colour."""
    fill = getattr(transform, "fill", 0)
    if isinstance(fill, int):
        return transform(pixels)  # type: ignore[no-any-return]
    parts = zip(fill, torch.split(pixels, 1, 1), strict=True)
    return torch.cat([type(transform)(transform.size, fill=value)(one) for value, one in parts], 1)


_Scaling = tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]


def _scaling(seen: Tensor, where: str) -> _Scaling:
    """Return a processor's mean, standard deviation and channel order.

    Args:
        seen: Its outputs for black, each channel alone at full brightness, and mid-grey, shape
            ``(C + 2, C)``.
        where: Its name in messages.
    """
    if not seen.isfinite().all():
        raise BadInputError(f"{where} produces values that are not finite; is image_std 0?")
    black, gains = seen[0], (seen[1:-1] - seen[0]).T  # (model's channel, image's channel)
    order = gains.abs().argmax(1)
    gain = gains.gather(1, order[:, None])[:, 0]
    rest = gains.scatter(1, order[:, None], 0).abs().max()
    linear = (seen[-1] - black - gain / 2).abs().max() < 1e-3 * gain.abs().max()
    if rest > 1e-3 * gain.abs().min() or not linear or len(set(order.tolist())) < len(order):
        raise UnsupportedError(
            f"{where} does more to colours than shift and scale each channel; prepare tensors in "
            f"Python and pass processor={{}}"
        )
    back = _inverse(order.tolist())
    mean, std = (-black / gain)[back], (1 / gain)[back]
    # Round off float32 noise in decimals.
    plain = [tuple(round(value, 6) + 0.0 for value in row.tolist()) for row in (mean, std)]
    return plain[0], plain[1], tuple(order.tolist())


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
