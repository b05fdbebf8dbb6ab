"""Npz archives of labelled data, with various array names."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdefense.checkpoints.faults import BOMB_BYTES, BOMB_RATIO
from mmdefense.class_names import few, read_class_names
from mmdefense.errors import BadInputError, one_line
from mmdefense.files import plain_file
from mmdefense_tasks.class_labels import MOST_CLASSES
from mmdefense_tasks.parts import PARTS, chosen_part

__all__ = ["Array", "described", "labels_of", "names_beside", "read_archive"]

Array = NDArray[Any]

_NAMES = {
    "images": ("image", "x", "data"),
    "points": ("clouds", "pointclouds", "x", "data"),
    "labels": ("label", "y", "targets"),
}
"""Other names of our arrays, for example Keras's ``x`` and ``y``."""

_KNOWN = frozenset({"images", "points", "points_int8", "labels", "jpeg", "offsets"})
_MOST_ARRAYS = 20  # our choice; largest number listed in the message if none matches
_MOST_BYTES = 1 << 34  # our choice; of one array


def read_archive(path: Path, split: str) -> dict[str, Array]:
    """Return the arrays of one split by our names, such as ``images`` and ``labels``.

    An archive may have several splits, as ``x_train`` or ``train_images``. Pickled arrays are
    rejected.

    Raises:
        BadInputError: If the archive is damaged, or has only the other split.
    """
    try:
        with np.load(plain_file(path), allow_pickle=False) as archive:
            files = {name.casefold(): name for name in archive.files}
            wanted = _wanted(list(files), split, path)
            for name in wanted.values():
                _check_entry(archive.zip, files[name])
            held = {name: archive[files[name]] for name in set(wanted.values())}
            arrays = {ours: held[name] for ours, name in wanted.items()}
    except BadInputError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        if not zipfile.is_zipfile(path):
            raise BadInputError(
                f"data {path} must be an npz archive; it is damaged or not an npz archive"
            ) from error
        raise BadInputError(f"data archive {path} cannot be read: {one_line(error)}") from error
    found = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    if len(found) < len(arrays):
        raise BadInputError(
            f"data {path} must be an npz archive of arrays, got {few(sorted(arrays))}; is it a "
            "model?"
        )
    return found


def _wanted(names: Sequence[str], split: str, path: Path) -> dict[str, str]:
    """Return which arrays of an archive are read, by our names."""
    splits = {name: _split(name) for name in names}
    part = chosen_part({part for part, _ in splits.values() if part}, split, path)
    wanted = {name: name for name in names}
    if part is not None:
        wanted = {splits[name][1]: name for name in names if splits[name][0] == part}
    for ours, theirs in _NAMES.items():
        other = next((name for name in theirs if name in wanted), None)
        if ours not in wanted and other is not None:
            wanted[ours] = wanted[other]
    known = _KNOWN & wanted.keys()
    return {name: wanted[name] for name in sorted(known or wanted)[:_MOST_ARRAYS]}


def _check_entry(archive: zipfile.ZipFile, name: str) -> None:
    """Reject an array that does not fit into memory, or unpacks to far more than its size."""
    entry = next(e for e in archive.infolist() if e.filename in {name, f"{name}.npy"})
    size, packed = entry.file_size, entry.compress_size
    if size > _MOST_BYTES or (size > BOMB_BYTES and size > BOMB_RATIO * packed):
        raise ValueError(
            f"its array {name!r} unpacks from {packed} bytes to {size}: a decompression bomb"
        )


def _split(name: str) -> tuple[str | None, str]:
    """Return the split in an array's name, if any, and the name without it."""
    for part in (part for names in PARTS.values() for part in names):
        for rest in (name.removeprefix(f"{part}_"), name.removesuffix(f"_{part}")):
            if rest != name:
                return part, rest
    return None, name


def labels_of(
    arrays: Mapping[str, Array], path: Path, needed: str
) -> tuple[Tensor, tuple[str, ...], bool]:
    """Return labels ``(N,)``, the class names, and whether labels just index the names.

    Supported are integers of shape ``(N,)`` or ``(N, 1)``, one-hot rows ``(N, K)``, and names.

    Args:
        arrays: Arrays by name, from :func:`read_archive`.
        path: Path of the archive.
        needed: What it must contain, for a message.

    Raises:
        BadInputError: If there are no such labels.
    """
    labels = arrays.get("labels")
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels is not None and labels.ndim == 1 and labels.dtype.kind == "U":
        names, places = np.unique(labels, return_inverse=True)
        return torch.from_numpy(places), tuple(map(str, names)), True
    if labels is not None and labels.ndim == 2 and _is_one_hot(labels):
        labels = labels.argmax(1)
    if labels is not None and labels.dtype.kind == "f" and (labels == np.round(labels)).all():
        labels = _in_range(labels, path).astype(np.int64)
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise BadInputError(f"{path} must hold {needed}, got {described(arrays)}")
    labels = _in_range(labels, path)
    return torch.from_numpy(labels.astype(np.int64)), names_beside(path), False


def _in_range(labels: Array, path: Path) -> Array:
    """Return integers, checked to be possible class numbers."""
    if len(labels) and not (labels.min() >= 0 and labels.max() <= MOST_CLASSES):
        wrong = next(label for label in labels.tolist() if not 0 <= label <= MOST_CLASSES)
        raise BadInputError(f"labels of {path} must lie in 0..{MOST_CLASSES}, got {wrong}")
    return labels


def _is_one_hot(labels: Array) -> bool:
    return bool(((labels == 1).sum(1) == 1).all() and ((labels != 0).sum(1) == 1).all())


def described(arrays: Mapping[str, Array]) -> str:
    """Return name, type and shape of each array, for a message."""
    return ", ".join(f"{name} {array.dtype}{array.shape}" for name, array in arrays.items())


def names_beside(path: Path) -> tuple[str, ...]:
    """Return the class names in ``classes.json`` or ``classes.txt`` beside an archive, if any.

    Raises:
        BadInputError: If the file does not hold names.
    """
    files = (path.with_name(name) for name in ("classes.json", "classes.txt"))
    listed = next((file for file in files if file.is_file()), None)
    return () if listed is None else read_class_names(listed)
