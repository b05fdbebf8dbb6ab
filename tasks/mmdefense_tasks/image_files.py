"""Opens labelled image sets: a folder per class, and npz archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdefense.errors import BadInputError
from mmdefense.pictures import SUFFIXES, open_picture
from mmdefense_tasks.archives import described, labels_of, read_archive
from mmdefense_tasks.class_folders import class_files
from mmdefense_tasks.image_sets import ImageSet

__all__ = ["open_archive", "open_folder"]


def open_folder(folder: Path) -> ImageSet:
    """Open a folder with one sub-folder of images per class, numbered in text order.

    Raises:
        BadInputError: If there is no class folder or no image.
    """
    held = class_files(folder, SUFFIXES, "images")
    return ImageSet(
        open=lambda index: open_picture(held.files[index]),
        name=lambda index: str(held.files[index]),
        labels=held.labels,
        classes=held.classes,
        counted=True,
    )


def open_archive(path: Path, split: str = "train") -> ImageSet:
    """Open an npz archive with ``labels`` and either ``images`` or ``jpeg`` and ``offsets``.

    ``images`` are uint8 of shape ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``, with any
    number of channels; ``jpeg`` contains encoded images end to end, the i-th between ``offsets[i]``
    and ``offsets[i + 1]``. Other common names, such as ``x_train`` and ``y_train``, are recognised.
    Class names are read from a ``classes.json`` or ``classes.txt`` beside the archive. Pickled
    arrays are rejected.

    Raises:
        BadInputError: If the archive is damaged or lacks these arrays.
    """
    arrays = read_archive(path, split)
    needed = "integer 'labels' of shape (N,)"
    labels, names, counted = labels_of(arrays, path, needed)
    count, opened = (_encoded if "jpeg" in arrays else _pixels)(arrays, path)
    if count != len(labels):
        raise BadInputError(f"{path} must hold one label per image, got {len(labels)} for {count}")
    return ImageSet(opened, lambda index: f"{index} of {path}", labels, names, counted)


def _encoded(arrays: dict[str, NDArray[Any]], path: Path) -> tuple[int, Any]:
    if "offsets" not in arrays:
        raise BadInputError(f"{path} must hold 'offsets' with 'jpeg', got {described(arrays)}")
    content, offsets = arrays["jpeg"], arrays["offsets"]
    ends = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
    if content.ndim != 1 or content.dtype != np.uint8 or not ends:
        raise BadInputError(
            f"{path} must hold 'jpeg' as uint8 of shape (B,) and 'offsets' as integers of shape "
            f"(N + 1,), got {described(arrays)}"
        )
    if offsets.min() < 0 or offsets.max() > len(content) or (offsets[1:] < offsets[:-1]).any():
        raise BadInputError(
            f"'offsets' of {path} must increase within 0..{len(content)}, the bytes of 'jpeg'"
        )

    def opened(index: int) -> Image.Image:
        encoded = content[int(offsets[index]) : int(offsets[index + 1])]
        return open_picture(encoded.tobytes())

    return len(offsets) - 1, opened


def _pixels(arrays: dict[str, NDArray[Any]], path: Path) -> tuple[int, Any]:
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim not in {3, 4}:
        remedy = "" if images is None or images.dtype == np.uint8 else "; scale them to 0..255"
        raise BadInputError(
            f"{path} must hold 'images' as uint8 0..255, (N, H, W) or (N, H, W, C), or 'jpeg' and "
            f"'offsets', got {described(arrays)}{remedy}"
        )
    if images.ndim == 4 and images.shape[3] not in {1, 3} and images.shape[1] < images.shape[3]:
        images = images.transpose(0, 2, 3, 1)
    return len(images), lambda index: images[index]
