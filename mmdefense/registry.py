"""Finds defenses, attacks, adapters and tasks by name, through entry points.

Everything of mmdefense itself stands in the tables of ``pyproject.toml``; a plug-in adds rows to
the same groups in its own, and is found through the same door. In a checkout that file itself is
read, so that a new row works without a reinstall.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.libraries import missing
from mmdefense.protocol import AdapterKind, TaskAdapter, Traits, traits

__all__ = ["adapt", "adapter_for", "installed", "load", "name_of", "names", "packages"]

_NAME = "mmdefense"

Kind = Literal["defenses", "attacks", "adapters", "tasks"]


@cache
def _table(kind: Kind) -> dict[str, EntryPoint]:
    group = f"mmdefense.{kind}"
    rows = _of_checkout()
    if rows is None:
        found = list(entry_points(group=group))
    else:
        others = (p for p in entry_points(group=group) if p.dist is None or p.dist.name != _NAME)
        own = rows.get(group, {}).items()
        found = [*others, *(EntryPoint(name, value, group) for name, value in own)]
    return {point.name: point for point in found}


@cache
def _of_checkout() -> dict[str, dict[str, str]] | None:
    """Return the tables of pyproject.toml where this runs from a checkout, else none.

    A row that is added there works at once: what pip has noted is of the last installation.
    """
    path = Path(__file__).parents[1] / "pyproject.toml"
    if not path.is_file():
        return None
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != _NAME:
        return None
    rows: dict[str, dict[str, str]] = project["entry-points"]
    return rows


def packages() -> set[str]:
    """Return the top-level packages of all that is registered."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    return {point.module.partition(".")[0] for kind in kinds for point in _table(kind).values()}


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
        raise missing(f"{kind.removesuffix('s')} {name!r}", error) from error


def installed(kind: Kind) -> Iterator[Any]:
    """Yield every object of a kind whose library is installed."""
    for name in names(kind):
        try:
            yield load(kind, name)
        except UnsupportedError:  # its library is not installed, so nothing here is of it
            continue


def adapter_for(model: nn.Module, task: str | None = None) -> AdapterKind:
    """Return the adapter class for ``model``, chosen by the model itself.

    Every registered class is asked ``accepts(model)``; of those that say yes, the one with the
    highest ``priority`` is taken. Nothing about a plain module says what it reads: where only a
    ``generic`` class accepts it, the generic one of ``task`` serves it.

    Args:
        model: What is to be wrapped.
        task: The name of a task; none leaves it to the model.

    Raises:
        BadInputError: If the model is of another task.
        UnsupportedError: If no adapter accepts the model.
    """
    kinds: list[tuple[AdapterKind, Traits]] = [(k, traits(k)) for k in installed("adapters")]
    accepting = [(kind, its) for kind, its in kinds if kind.accepts(model)]
    if accepting:
        best, its = max(accepting, key=lambda pair: pair[1].priority)
        if task is None or its.task in {None, task}:
            return best
        if not its.generic:
            raise BadInputError(
                f"a {type(model).__name__} is a model of {its.task}, got task {task!r}; leave "
                "task out, or name that one"
            )
        for kind, its in kinds:
            if its.generic and its.task == task:
                return kind
    raise UnsupportedError(
        f"no adapter{f' of {task}' if task else ''} accepts a {type(model).__name__}; known: "
        f"{', '.join(names('adapters'))}; docs/howto/add_an_adapter.md shows how to write one"
    )


def adapt(
    model: nn.Module, adapter: str | None = None, *, task: str | None = None, **options: Any
) -> TaskAdapter[Any]:
    """Return an adapter around ``model``; see :func:`adapter_for` for how it is chosen.

    Args:
        model: The model to wrap. It is not copied or changed.
        adapter: The name of an adapter, where the choice is not to be left to the model.
        task: The name of a task, where nothing about the model says which it is of.
        **options: Passed to the adapter, for example ``mean`` and ``std`` for images.

    Raises:
        BadInputError: If the model is of another task.
        UnsupportedError: If no adapter accepts the model.

    Example:
        >>> adapter = adapt(model, mean=[0.5], std=[0.25])
        >>> samples = adapter.samples((images, labels))
        >>> adapter.per_sample_loss(samples.take(torch.arange(4))).shape
        torch.Size([4])
    """
    kind: AdapterKind
    kind = load("adapters", adapter) if adapter is not None else adapter_for(model, task)
    return kind(model, **options)
