"""Finds defenses, attacks, adapters and tasks by name, through entry points.

Everything of mmdefense itself stands in the tables of ``pyproject.toml``; a plug-in adds rows to
the same groups in its own, and is found through the same door.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from torch import nn

from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.protocol import TaskAdapter

__all__ = ["adapt", "load", "name_of", "names"]

Kind = Literal["defenses", "attacks", "adapters", "tasks"]


@cache
def _table(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"mmdefense.{kind}")}


def names(kind: Kind) -> list[str]:
    """Return the known names of a kind, sorted."""
    return sorted(_table(kind))


def name_of(kind: Kind, found: type) -> str:
    """Return the name under which a class is registered, or that of the class itself."""
    value = f"{found.__module__}:{found.__qualname__}"
    rows = (name for name, point in _table(kind).items() if point.value == value)
    return next(rows, found.__name__)


def load(kind: Kind, name: str) -> Any:
    """Return the object registered as ``name``.

    Raises:
        BadInputError: If no such name is registered; the message offers the nearest one.
        UnsupportedError: If a library that it needs is not installed.
    """
    table = _table(kind)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(table))}"
        raise BadInputError(f"unknown {kind.removesuffix('s')} {name!r}; {hint}")
    try:
        return table[name].load()
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"{kind.removesuffix('s')} {name!r} needs the package {error.name!r}, which is not "
            "installed; pip install 'mmdefense[all]'"
        ) from error


def adapt(model: nn.Module, adapter: str | None = None, **options: Any) -> TaskAdapter[Any]:
    """Return an adapter around ``model``, chosen by the model itself.

    Every registered adapter class is asked ``accepts(model)``; of those that say yes, the one with
    the highest ``priority`` is taken.

    Args:
        model: The model to wrap. It is not copied or changed.
        adapter: The name of an adapter, where the choice is not to be left to the model.
        **options: Passed to the adapter, for example ``mean`` and ``std`` for images.

    Raises:
        UnsupportedError: If no adapter accepts the model.
    """
    if adapter is not None:
        return load("adapters", adapter)(model, **options)  # type: ignore[no-any-return]
    found = []
    for name in names("adapters"):
        try:
            candidate = load("adapters", name)
        except UnsupportedError:  # its library is not installed, so the model is not of it
            continue
        if candidate.accepts(model):
            found.append(candidate)
    if not found:
        raise UnsupportedError(
            f"no adapter accepts a {type(model).__name__}; known: {', '.join(names('adapters'))}; "
            "docs/howto/add_an_adapter.md shows how to write one"
        )
    return max(found, key=lambda kind: kind.priority)(model, **options)  # type: ignore[no-any-return]
