"""Opens labelled image sets: a folder per class, npz archives, and data sets of ``datasets``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmdefense.errors import BadInputError, one_line
from mmdefense.libraries import needed
from mmdefense_tasks.image_sets import ImageSet

__all__ = ["open_archive", "open_dataset", "open_folder"]

_SUFFIXES = frozenset({
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip


def open_folder(folder: Path) -> ImageSet:
    """Open a folder with one sub-folder of images per class.

    Labels count the class folders in order of name. Where all names are whole numbers they are the
    labels themselves.

    Raises:
        BadInputError: If there is no class folder or no image.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        (path, label)
        for label, name in zip(_labels(classes), classes, strict=True)
        for path in sorted(name.rglob("*"))
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise BadInputError(
            f"data folder {folder} must hold one folder of images per class, got no image; "
            f"known are {', '.join(sorted(_SUFFIXES))}"
        )
    names = () if _are_numbers(classes) else tuple(path.name for path in classes)
    return ImageSet(
        open=lambda index: Image.open(files[index][0]),
        name=lambda index: str(files[index][0]),
        labels=torch.tensor([label for _, label in files]),
        classes=names,
    )


def _are_numbers(classes: list[Path]) -> bool:
    return all(path.name.isdecimal() for path in classes)


def _labels(classes: list[Path]) -> list[int]:
    return [int(p.name) for p in classes] if _are_numbers(classes) else list(range(len(classes)))


def open_archive(path: Path) -> ImageSet:
    """Open an npz archive with ``labels`` and either ``images`` or ``jpeg`` and ``offsets``.

    ``images`` are uint8 of shape ``(N, H, W)`` or ``(N, H, W, C)``; ``jpeg`` holds encoded images
    end to end, the i-th between ``offsets[i]`` and ``offsets[i + 1]``. Class names are read from a
    ``classes.json`` beside the archive. Pickled arrays are refused.

    Raises:
        BadInputError: If the archive is damaged or does not hold these arrays.
    """
    arrays = _arrays(path)
    labels = _archive_labels(arrays, path)
    if "jpeg" in arrays:
        count, opened = _encoded(arrays, path)
    else:
        count, opened = _pixels(arrays, path)
    if count != len(labels):
        raise BadInputError(f"{path} must hold a label per image, got {len(labels)} for {count}")
    return ImageSet(opened, lambda index: f"{index} of {path}", labels, _class_names(path.parent))


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive fails in many ways
        raise BadInputError(f"data archive {path} cannot be read: {one_line(error)}") from error


def _archive_labels(arrays: dict[str, NDArray[Any]], path: Path) -> Tensor:
    labels = arrays.get("labels")
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise BadInputError(
            f"{path} must hold whole-number 'labels' of shape (N,), got {_described(arrays)}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _described(arrays: dict[str, NDArray[Any]]) -> str:
    return ", ".join(f"{name} {array.dtype}{array.shape}" for name, array in arrays.items())


def _encoded(arrays: dict[str, NDArray[Any]], path: Path) -> tuple[int, Any]:
    if "offsets" not in arrays:
        raise BadInputError(f"{path} must hold 'offsets' with 'jpeg', got {_described(arrays)}")
    content, offsets = arrays["jpeg"], arrays["offsets"]

    def opened(index: int) -> Image.Image:
        encoded = content[offsets[index] : offsets[index + 1]]
        return Image.open(io.BytesIO(encoded.tobytes()))

    return len(offsets) - 1, opened


def _pixels(arrays: dict[str, NDArray[Any]], path: Path) -> tuple[int, Any]:
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim not in {3, 4}:
        raise BadInputError(
            f"{path} must hold 'images' as uint8 (N, H, W) or (N, H, W, C), or 'jpeg' and "
            f"'offsets', got {_described(arrays)}"
        )
    if images.ndim == 4 and images.shape[3] not in {1, 3}:
        raise BadInputError(f"images of {path} must have 1 or 3 channels, got {images.shape[3]}")
    flat = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    return len(flat), lambda index: Image.fromarray(flat[index])


def _class_names(folder: Path) -> tuple[str, ...]:
    path = folder / "classes.json"
    if not path.is_file():
        return ()
    rows = json.loads(path.read_text(encoding="utf-8"))
    return tuple(row["name"] if isinstance(row, dict) else str(row) for row in rows)


def open_dataset(where: str | Path, split: str) -> ImageSet:
    """Open a data set of the ``datasets`` library: one saved to disk, or a hub id.

    The image and the label column are found by their feature types. No code of the data set runs.

    Raises:
        BadInputError: If it cannot be loaded, or has no such columns.
        UnsupportedError: If ``datasets`` is not installed.
    """
    rows = _rows(where, split)
    image, label = _column(rows, "Image", where), _column(rows, "ClassLabel", where)
    names = getattr(rows.features[label], "names", None) or ()
    return ImageSet(
        open=lambda index: rows[index][image],
        name=lambda index: f"{index} of {where}",
        labels=torch.tensor(rows[label][:], dtype=torch.int64),
        classes=tuple(names),
    )


def _rows(where: str | Path, split: str) -> Any:
    with needed(f"data set {where}"):
        from datasets import DatasetDict, load_dataset, load_from_disk
    try:
        held = load_from_disk(str(where)) if Path(where).is_dir() else load_dataset(str(where))
    except Exception as error:  # the library raises many kinds: network, missing, damaged
        raise BadInputError(f"data set {where} cannot be loaded: {one_line(error)}") from error
    if not isinstance(held, DatasetDict):
        return held
    if split not in held:
        raise BadInputError(f"data set {where} must have a {split!r} split, got {', '.join(held)}")
    return held[split]


def _column(rows: Any, kind: str, where: str | Path) -> str:
    """Return the one column of a feature type; labels may also be whole numbers named so."""
    found = [str(name) for name, feature in rows.features.items() if type(feature).__name__ == kind]
    if kind == "ClassLabel" and not found:
        found = [name for name in ("label", "labels", "fine_label") if name in rows.features]
    if not found:
        raise BadInputError(
            f"data set {where} must have a column of type {kind}, got {dict(rows.features)}"
        )
    return found[0]
