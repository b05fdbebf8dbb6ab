"""Keeps the figures of a page as data, so that the page can be made again from its record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdefense.checkpoints.runs import write_atomically
from mmdefense.errors import BadInputError, one_line
from mmdefense.report.figures import Figure
from mmdefense.report.images import ImageGrid, ImageRow
from mmdefense.report.plots import Bars, Curve, Curves, Histogram, Interval, Scatter
from mmdefense.report.texts import TextTable

__all__ = ["read_figures", "write_figures"]

_KINDS = {
    kind.__name__: kind
    for kind in (
        *(Figure, Bars, Curve, Curves, Histogram, Interval, Scatter),
        *(ImageGrid, ImageRow, TextTable),
    )
}
_TREE = "tree"


def write_figures(figures: list[Figure], path: Path) -> None:
    """Write figures to an npz archive, atomically: their arrays, and the tree that holds them."""
    arrays: dict[str, NDArray[Any]] = {}
    tree = json.dumps(_packed(figures, arrays))
    content = {_TREE: np.asarray(tree), **arrays}
    write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **content))


def _packed(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """Return ``value`` as JSON has it, its arrays put into ``arrays`` and named in their place."""
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, ImageRow):  # as it is drawn
            fields["images"] = (fields["images"] * 255).round().astype(np.uint8)
        return {"kind": kind, "fields": {n: _packed(v, arrays) for n, v in fields.items()}}
    if isinstance(value, dict):
        return {"dict": {name: _packed(item, arrays) for name, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_packed(item, arrays) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def read_figures(path: Path) -> list[Figure]:
    """Return the figures that :func:`write_figures` wrote; nothing in the file is run.

    Raises:
        BadInputError: If it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        found = _unpacked(json.loads(str(arrays[_TREE])), arrays)
        if not all(isinstance(figure, Figure) for figure in found):
            raise TypeError("it holds something else than figures")
    except Exception as error:  # a damaged archive fails in many ways
        raise BadInputError(f"figures {path} cannot be read: {one_line(error)}") from error
    return list(found)


def _unpacked(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "dict" in value:
        return {name: _unpacked(item, arrays) for name, item in value["dict"].items()}
    fields = {name: _unpacked(item, arrays) for name, item in value["fields"].items()}
    return _KINDS[value["kind"]](**fields)
