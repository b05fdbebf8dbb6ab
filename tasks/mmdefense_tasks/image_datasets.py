"""Opens labelled images in data sets of the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmdefense.class_names import UnknownNameError, match
from mmdefense.errors import BadInputError
from mmdefense.libraries import needed
from mmdefense.pictures import open_picture
from mmdefense_tasks.data_sets import open_part, reading
from mmdefense_tasks.image_sets import ImageSet
from mmdefense_tasks.options import Options

__all__ = ["open_dataset"]

_USUAL = ("label", "labels", "fine_label", "target", "class")  # names of untyped label columns


def open_dataset(where: str | Path, split: str, options: Options) -> ImageSet:
    """Open a data set of the ``datasets`` library: one saved to disk, or a hub id.

    The image and label columns are found by their feature types; if there are several, the options
    ``image`` and ``label`` decide, and of several label columns the one whose names match the
    model's is used. The data set's code is never run.

    Raises:
        BadInputError: If it cannot be loaded, has no such columns, or an image does not have
            exactly one label.
        UnsupportedError: If ``datasets`` is not installed.
    """
    with needed(f"data set {where}"):
        from datasets import Image as Encoded
    rows = open_part(where, split)
    image = _image_column(rows, options.take("image"), where)
    label = _label_column(rows, options.take("label"), options.stated("classes") or (), where)
    with reading(where):
        labels, names, counted = _labels(rows, label, where)
        pictures = rows.select_columns([image]).cast_column(image, Encoded(decode=False))

    def opened(index: int) -> Image.Image:
        found = pictures[index][image]
        if found is None:
            raise ValueError("the row has no image")
        return open_picture(Path(found["path"]) if found["bytes"] is None else found["bytes"])

    return ImageSet(opened, lambda index: f"{index} of {where}", labels, names, counted)


def _image_column(rows: Any, wanted: str | None, where: object) -> str:
    found = _columns(rows, "Image")
    if wanted is not None and wanted not in found:
        raise BadInputError(
            f"column {wanted!r} of {where} must be of type Image, got {rows.features}"
        )
    return wanted or _only(found, "image", "column of type Image", rows, where)


def _columns(rows: Any, kind: str) -> list[str]:
    return [str(name) for name, feature in rows.features.items() if type(feature).__name__ == kind]


def _only(found: Sequence[str], option: str, needed: str, rows: Any, where: object) -> str:
    """Return the one column that was found."""
    if not found:
        raise BadInputError(f"data set {where} must have a {needed}, got {dict(rows.features)}")
    if len(found) > 1:
        raise BadInputError(
            f"data set {where} must have one {needed}, got {', '.join(found)}; say which: --read "
            f"{option}={found[0]}"
        )
    return found[0]


def _label_column(rows: Any, wanted: str | None, model: Sequence[str], where: object) -> str:
    if wanted is not None:
        if wanted not in rows.features:
            raise BadInputError(
                f"data set {where} must have a column {wanted!r}, got {', '.join(rows.features)}"
            )
        return wanted
    found = _columns(rows, "ClassLabel")
    if len(found) > 1 and (fitting := [c for c in found if _fits(rows.features[c], model)]):
        found = fitting
    found = found or [name for name in _USUAL if name in rows.features][:1]
    return _only(found, "label", "column of type ClassLabel", rows, where)


def _fits(feature: Any, model: Sequence[str]) -> bool:
    """Return whether all names of a column are class names of the model."""
    try:
        return bool(model) and bool(match(feature.names, model))
    except UnknownNameError:
        return False


def _labels(rows: Any, column: str, where: object) -> tuple[Tensor, tuple[str, ...], bool]:
    """Return labels, the class names, and whether labels just index the names."""
    held: list[Any] = list(rows[column][:])
    names = tuple(getattr(rows.features[column], "names", None) or ())
    missing = [index for index, value in enumerate(held) if value is None or (names and value < 0)]
    if missing:
        raise BadInputError(
            f"every row of {where} must have a label in {column!r}, got none in {len(missing)} "
            f"rows, the first of which is {missing[0]}; drop them, or give a labelled split"
        )
    kinds = {type(value) for value in held}
    if kinds == {str}:
        texts = sorted(set(held))
        return torch.tensor([texts.index(value) for value in held]), tuple(texts), True
    if kinds <= {int, bool}:
        return torch.tensor(held, dtype=torch.int64), names, False
    several = "; images with several labels are not supported" if kinds == {list} else ""
    raise BadInputError(
        f"labels of {where} must be integers or names, got {held[0]!r} in column "
        f"{column!r}{several}"
    )
