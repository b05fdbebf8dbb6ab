"""Labelled image sets, decoded image by image: in memory where they fit, streamed where not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmdefense.batches import Augmentation
from mmdefense.errors import BadInputError, one_line
from mmdefense_tasks.streamed import StreamedSamples

__all__ = ["ImageSet", "StreamedImages"]

_GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "F"})


@dataclass(frozen=True)
class ImageSet:
    """Images that are still to be decoded.

    Attributes:
        open: Returns the image at an index; may raise anything for one that is damaged.
        name: Returns what to call that image in a message.
        labels: Shape ``(N,)``, int64.
        classes: The name of each label, where known.
        counted: Whether labels do no more than count the names, as those of a folder per class.
    """

    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    labels: Tensor
    classes: tuple[str, ...] = ()
    counted: bool = False

    def is_even(self) -> bool:
        """Return whether all images have one size; what cannot be opened is left to :meth:`read`.

        Of files the headers alone are read.
        """
        sizes = set()
        for index in range(len(self.labels)):
            with suppress(Exception):  # decoders raise many kinds
                sizes.add(self.open(index).size)
            if len(sizes) > 1:
                return False
        return True

    def read(self, index: int) -> Image.Image:
        """Return the image at ``index``, decoded, as ``L`` (grey) or ``RGB``.

        Raises:
            BadInputError: If it cannot be decoded.
        """
        try:
            image = self.open(index)
            return image.convert("L" if image.mode in _GREY_MODES else "RGB")
        except Exception as error:  # decoders raise many kinds, for damage of many kinds
            raise BadInputError(
                f"image {self.name(index)} cannot be decoded: {one_line(error)}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class StreamedImages(StreamedSamples[ImageSet]):
    """A labelled image set that decodes on ``take``; its shape is channels, height and width.

    Attributes:
        resize: Whether images of another size are resized; otherwise they are refused.
    """

    resize: bool

    @classmethod
    def of(
        cls,
        images: ImageSet,
        size: tuple[int, int] | None,
        channels: int | None,
        augmentation: Augmentation | None,
    ) -> StreamedImages:
        """Return the whole set; height, width and channels not given are the first image's.

        Raises:
            BadInputError: If the set is empty or its first image cannot be decoded.
        """
        if len(images.labels) == 0:
            raise BadInputError("data must hold at least one image, got none")
        first = images.read(0)
        depth = channels or len(first.getbands())
        height, width = size or (first.height, first.width)
        return cls(
            source=images,
            shape=(depth, height, width),
            resize=size is not None,
            indices=torch.arange(len(images.labels)),
            augmentation=augmentation,
        )

    def _array(self, index: int) -> NDArray[np.uint8]:
        image = self.source.read(index)
        channels, height, width = self.shape
        if len(image.getbands()) > channels:
            raise BadInputError(
                f"images must have {channels} channel, got {len(image.getbands())} in "
                f"{self.source.name(index)}"
            )
        if (image.height, image.width) != (height, width):
            if not self.resize:
                raise BadInputError(
                    f"images must have one size or be resized by image_size, got "
                    f"{height}x{width} and {image.height}x{image.width} in "
                    f"{self.source.name(index)}"
                )
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
        return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
