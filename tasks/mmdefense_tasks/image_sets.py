"""Labelled image sets, decoded image by image: in memory where they fit, streamed where not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmdefense.batches import Augmentation, LabelledBatch, LabelledSamples, Samples
from mmdefense.errors import BadInputError, one_line

__all__ = ["ImageSet", "StreamedImages"]

_GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "F"})
_WORKERS = 4
_CHUNK = 512


@dataclass(frozen=True)
class ImageSet:
    """Images that are still to be decoded.

    Attributes:
        open: Returns the image at an index; may raise anything for one that is damaged.
        name: Returns what to call that image in a message.
        labels: Shape ``(N,)``, int64.
        classes: The name of each label, where known.
    """

    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    labels: Tensor
    classes: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class StreamedImages:
    """A labelled image set that decodes on ``take``; the protocol of ``Samples``.

    Attributes:
        images: Where the images come from.
        shape: Channels, height and width (C, H, W) of every sample.
        resize: Whether images of another size are resized; otherwise they are refused.
        indices: Which images are in the set, shape ``(len,)``.
        augmentation: Maps a batch of inputs to randomly altered ones.
        device: Where batches are delivered.
    """

    images: ImageSet
    shape: tuple[int, int, int]
    resize: bool
    indices: Tensor
    augmentation: Augmentation | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(
        cls,
        images: ImageSet,
        image_size: int | None,
        channels: int | None,
        augmentation: Augmentation | None,
    ) -> StreamedImages:
        """Return the whole set; size and channels that are not given are the first image's.

        Raises:
            BadInputError: If the set is empty or its first image cannot be decoded.
        """
        if len(images.labels) == 0:
            raise BadInputError("data must hold at least one image, got none")
        first = images.read(0)
        depth = channels or len(first.getbands())
        height, width = (image_size,) * 2 if image_size else (first.height, first.width)
        return cls(
            images,
            (depth, height, width),
            image_size is not None,
            torch.arange(len(images.labels)),
            augmentation,
        )

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Shape ``(len,)``, int64."""
        return self.images.labels[self.indices]

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label, where known."""
        return self.images.classes

    @property
    def bytes(self) -> int:
        """What the set would take in memory."""
        return len(self) * int(np.prod(self.shape))

    def take(self, indices: Tensor) -> LabelledBatch:
        """Return the samples at ``indices`` as one batch, inputs as float32 in ``[0, 1]``."""
        chosen = self.indices[indices.cpu()]
        inputs = self._decode(chosen).to(self.device, non_blocking=True).float() / 255
        return LabelledBatch(inputs, self.images.labels[chosen].to(self.device))

    def augment(self, batch: LabelledBatch, generator: torch.Generator) -> LabelledBatch:
        """Return ``batch`` with its inputs augmented."""
        if self.augmentation is None:
            return batch
        return batch.with_inputs(self.augmentation(batch.inputs, generator))

    def subset(self, indices: Tensor) -> StreamedImages:
        """Return the samples at ``indices`` as a set of their own."""
        return replace(self, indices=self.indices[indices.cpu()])

    def strata(self) -> Tensor:
        """Return the labels, shape ``(len,)``."""
        return self.labels

    def to(self, device: torch.device) -> StreamedImages:
        """Return the set with its batches delivered on ``device``."""
        return replace(self, device=device)

    def fingerprint(self) -> str:
        """Return the same SHA-256 as the set in memory, at the cost of decoding every image."""
        digest = hashlib.sha256(str(((len(self), *self.shape), torch.uint8)).encode())
        for start in range(0, len(self), _CHUNK):
            chunk = self._decode(self.indices[start : start + _CHUNK])
            digest.update(chunk.numpy().tobytes())
        digest.update(str((tuple(self.labels.shape), self.labels.dtype)).encode())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def in_memory(self) -> LabelledSamples:
        """Return the set decoded, as uint8."""
        inputs = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        for start in range(0, len(self), _CHUNK):
            inputs[start : start + _CHUNK] = self._decode(self.indices[start : start + _CHUNK])
        return LabelledSamples(inputs, self.labels, self.augmentation, self.classes)

    def _decode(self, indices: Tensor) -> Tensor:
        """Return images as uint8, shape ``(N, C, H, W)``; decoders free the interpreter lock."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            arrays = list(pool.map(self._array, indices.tolist()))
        return torch.from_numpy(np.stack(arrays))

    def _array(self, index: int) -> NDArray[np.uint8]:
        image = self.images.read(index)
        channels, height, width = self.shape
        if len(image.getbands()) > channels:
            raise BadInputError(
                f"images must have {channels} channel, got {len(image.getbands())} in "
                f"{self.images.name(index)}"
            )
        if (image.height, image.width) != (height, width):
            if not self.resize:
                raise BadInputError(
                    f"images must have one size or be resized by image_size, got "
                    f"{height}x{width} and {image.height}x{image.width} in "
                    f"{self.images.name(index)}"
                )
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
        return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _protocol(samples: StreamedImages) -> Samples[LabelledBatch]:
    """Let the type checker hold this class to the protocol."""
    return samples
