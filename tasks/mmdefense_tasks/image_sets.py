"""Labelled image sets, decoded image by image: in memory if they fit, otherwise streamed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mmdefense.errors import BadInputError, one_line
from mmdefense.pictures import check_size
from mmdefense_tasks.streamed import StreamedSamples

__all__ = ["Fit", "ImageSet", "StreamedImages", "fitted", "in_8_bits", "squashed"]

Fit = Callable[[Tensor], Tensor]
"""Maps uint8 images ``(N, C, H, W)`` to the input size of a model."""

_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION, _TURNED = 274, frozenset({5, 6, 7, 8})  # EXIF: tag; values that swap the sides
_BITS_16 = 2**16 - 1


@dataclass(frozen=True)
class ImageSet:
    """Images that have not been decoded yet.

    Attributes:
        open: Returns the image at an index, or its pixels as uint8 ``(H, W)`` or ``(H, W, C)``; may
            raise any exception for a damaged image.
        name: Returns the name of that image for messages.
        labels: Shape ``(N,)``, int64.
        classes: The name of each label, if known.
        counted: Whether labels just index the names, as for a folder per class.
    """

    open: Callable[[int], Image.Image | NDArray[np.uint8]]
    name: Callable[[int], str]
    labels: Tensor
    classes: tuple[str, ...] = ()
    counted: bool = False

    def is_even(self) -> bool:
        """Return whether all images have the same size.

        Only file headers are read; files that cannot be opened fail in :meth:`read`.
        """
        sizes = set()
        for index in range(len(self.labels)):
            with suppress(Exception):  # decoders raise many exception types
                sizes.add(_size(self.open(index)))
            if len(sizes) > 1:
                return False
        return True

    def read(self, index: int, channels: int | None = None) -> NDArray[np.uint8]:
        """Return the pixels of the image at ``index``, shape ``(C, H, W)``.

        An image is rotated by its EXIF orientation. 16-bit images are scaled from 0..65535 to
        0..255, float images from 0..1.

        Args:
            index: Index of the image.
            channels: Number of channels C: grey images are repeated, and opaque alpha is added for
                4. By default 1 for grey images and 3 for others, without alpha.

        Raises:
            BadInputError: If it cannot be decoded, or does not have these channels.
        """
        try:
            opened = self.open(index)
            if isinstance(opened, np.ndarray):
                check_size(opened.shape[1], opened.shape[0])
                pixels = opened[..., None] if opened.ndim == 2 else opened
            else:
                check_size(*opened.size)
                pixels = _decoded(opened, channels)
        except Exception as error:  # decoders raise many exception types
            raise BadInputError(
                f"image {self.name(index)} cannot be decoded: {one_line(error)}"
            ) from error
        if channels is not None and pixels.shape[2] == 1:
            pixels = pixels.repeat(channels, 2)
        if channels not in {None, pixels.shape[2]}:
            raise BadInputError(
                f"images must have {channels} channel{'s' * (channels != 1)}, got "
                f"{pixels.shape[2]} in {self.name(index)}"
            )
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _size(opened: Image.Image | NDArray[np.uint8]) -> tuple[int, int]:
    """Return the height and width of an image after EXIF rotation."""
    if isinstance(opened, np.ndarray):
        return opened.shape[0], opened.shape[1]
    turned = opened.getexif().get(_ORIENTATION) in _TURNED
    return opened.size if turned else (opened.height, opened.width)


def _decoded(image: Image.Image, channels: int | None) -> NDArray[np.uint8]:
    """Return pixels ``(H, W, C)``; with 1, 3 or 4 channels if ``channels`` is None."""
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # in camera files the others are previews
        raise ValueError(f"it holds {count} images or frames; save each as its own file")
    image = in_8_bits(ImageOps.exif_transpose(image))
    own = 1 if image.mode in _GREY_MODES else 3
    if channels == 4 and own == 3:
        own = 4
    array = np.asarray(image.convert(_MODES[own]), dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def in_8_bits(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits; Pillow would clip values at 255.

    Raises:
        ValueError: If its pixels have no known range.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # rejects NaN as well
            raise ValueError(
                "pixels that are floats must lie in [0, 1], got "
                f"{values.min():g} to {values.max():g}; save it in 8 or 16 bits"
            )
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64 if image.mode == "I" else np.int32)
    if values.min() < 0 or values.max() > _BITS_16:
        raise ValueError(f"integers must have 8 or 16 bits, got {values.min()} to {values.max()}")
    return Image.fromarray(((values * 255 + _BITS_16 // 2) // _BITS_16).astype(np.uint8))


@dataclass(frozen=True, kw_only=True)
class StreamedImages(StreamedSamples[ImageSet]):
    """A labelled image set that decodes on ``take``; its shape is channels, height and width.

    Attributes:
        fit: Resizes images to the size of the set; without it other sizes are rejected.
    """

    fit: Fit | None

    @classmethod
    def of(
        cls,
        images: ImageSet,
        fit: Fit | None,
        channels: int | None,
    ) -> StreamedImages:
        """Return the whole set; height, width and channels not given are the first image's.

        Raises:
            BadInputError: If the set is empty or its first image cannot be decoded.
        """
        if len(images.labels) == 0:
            raise BadInputError("data must hold at least one image, got none")
        first = images.read(0, channels)
        return cls(
            source=images,
            shape=(fitted(first, fit) if fit else first).shape,
            fit=fit,
            indices=torch.arange(len(images.labels)),
        )

    def _array(self, index: int) -> NDArray[np.uint8]:
        pixels = self.source.read(index, self.shape[0])
        if pixels.shape != self.shape and self.fit:
            pixels = fitted(pixels, self.fit)
        if pixels.shape != self.shape:
            raise BadInputError(
                "images must have the same size, or be resized with image_size, got "
                f"{self.shape[1]}x{self.shape[2]} and {pixels.shape[1]}x{pixels.shape[2]} in "
                f"{self.source.name(index)}"
            )
        return pixels


def fitted(pixels: NDArray[np.uint8], fit: Fit) -> NDArray[np.uint8]:
    """Return uint8 images ``(..., C, H, W)``, all resized by ``fit``."""
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    found = fit(images.reshape(-1, *images.shape[-3:]))
    return found.reshape(*images.shape[:-3], *found.shape[1:]).numpy()


def squashed(size: tuple[int, int]) -> Fit:
    """Return a function that resizes images to a height and width, ignoring the aspect ratio."""
    return partial(F.interpolate, size=size, mode="bilinear", antialias=True)
