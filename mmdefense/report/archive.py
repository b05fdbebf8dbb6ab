"""Keeps the plots of a page as data, so that the page can be made again from its record."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmdefense import plots, registry
from mmdefense.checkpoints.runs import write_atomically
from mmdefense.errors import BadInputError, one_line
from mmdefense.plots.base import Plot

__all__ = ["read_plots", "write_plots"]

_TREE = "tree"


def write_plots(shown: Sequence[Plot], path: Path) -> None:
    """Write plots to an npz archive, atomically: their arrays, and the tree that holds them.

    Raises:
        BadInputError: If one of them is no plot, or has a field that the archive cannot hold.
    """
    arrays: dict[str, NDArray[Any]] = {}
    tree = json.dumps([_packed_plot(plot, arrays) for plot in shown])
    content = {_TREE: np.asarray(tree), **arrays}
    write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **content))


def _packed_plot(plot: Any, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    if not isinstance(plot, Plot):
        raise BadInputError(f"an archive of plots holds plots, got {type(plot).__name__}")
    fields = {
        field.name: _packed(
            getattr(plot, field.name), arrays, f"{type(plot).__name__}.{field.name}"
        )
        for field in dataclasses.fields(plot)
    }
    return {"kind": _name(type(plot)), "fields": fields}


def _packed(value: Any, arrays: dict[str, NDArray[Any]], where: str) -> Any:
    """Return ``value`` as JSON has it, its arrays put into ``arrays`` and named in their place."""
    if isinstance(value, torch.Tensor):
        return {"tensor": _packed(value.detach().cpu().numpy(), arrays, where)["array"]}
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, Mapping):
        return {"dict": {name: _packed(item, arrays, where) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_packed(item, arrays, where) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BadInputError(
        f"{where} must hold numbers, texts, arrays, tensors, or lists, tuples and dicts of them, "
        f"got {type(value).__name__}"
    )


def read_plots(path: Path) -> list[Plot]:
    """Return the plots that :func:`write_plots` wrote; nothing in the file is run.

    Raises:
        BadInputError: If it is no such file, or holds a plot of a kind that is not known here.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        tree = [
            (entry["kind"], {n: _unpacked(v, arrays) for n, v in entry["fields"].items()})
            for entry in json.loads(str(arrays[_TREE]))
        ]
        kinds = _kinds({kind for kind, _ in tree})
        return [kinds[kind](**fields) for kind, fields in tree]
    except BadInputError as error:
        raise BadInputError(f"plots {path} cannot be read: {error}") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise BadInputError(f"plots {path} cannot be read: {one_line(error)}") from error


def _unpacked(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "tensor" in value:
        return torch.from_numpy(arrays[value["tensor"]])
    return {name: _unpacked(item, arrays) for name, item in value["dict"].items()}


def _kinds(wanted: set[str]) -> dict[str, type[Plot]]:
    """Return the kinds of plot by name: ours, and those of installed defenses and tasks.

    A name in a file selects among classes that are there, and never has a module imported.

    Raises:
        BadInputError: If one that is wanted is not known.
    """
    for module in pkgutil.iter_modules(plots.__path__):
        importlib.import_module(f"{plots.__name__}.{module.name}")
    known = {_name(kind): kind for kind in _subclasses(Plot)}
    if not wanted <= known.keys():
        for _ in (*registry.installed("defenses"), *registry.installed("tasks")):
            pass  # loading them defines their plots
        known = {_name(kind): kind for kind in _subclasses(Plot)}
    if unknown := sorted(wanted - known.keys()):
        raise BadInputError(
            f"the kind of plot {unknown[0]} is unknown; import or install the module that defines "
            "it"
        )
    return known


def _name(kind: type[Plot]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: Any) -> Iterator[type[Plot]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _subclasses(sub)
