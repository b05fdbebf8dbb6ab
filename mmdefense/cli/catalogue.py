"""The catalogue of defenses, attacks, adapters, tasks, data sets and cases, with settings."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from mmdefense import registry
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.evaluation.cases import all_cases
from mmdefense.pipeline.sources import NOT_WRITTEN
from mmdefense.protocol import Case
from mmdefense.settings import described_type

__all__ = ["KINDS", "Setting", "details", "known", "settings"]

KINDS = ("defenses", "attacks", "adapters", "tasks", "data", "cases")

_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?([^`]+)`")
_ENTRY = re.compile(r"^    (\w+)(?: \(.*?\))?: (.*)$")
_OPTIONS = {"defenses": "--set", "attacks": "--set", "adapters": "--read", "tasks": "--read"}


@dataclass(frozen=True)
class Setting:
    """One setting of a named defense, attack, adapter or task.

    Attributes:
        name: Its name for ``--set`` or ``--read``.
        default: Default value as a user would write it; empty if there is none.
        kind: Description of its type.
        about: What it does, in one sentence.
    """

    name: str
    default: str
    kind: str
    about: str


def known(kind: str) -> Iterator[tuple[str, str]]:
    """Yield each known name of a kind with a one-line description, without markup.

    Args:
        kind: One of ``KINDS``.
    """
    if kind == "data":
        for task in registry.names("tasks"):
            yield from registry.load("tasks", task).data().items()
    elif kind == "cases":
        yield from ((name, _of_case(case)) for name, case in all_cases().items())
    else:
        for name in registry.names(kind):  # type: ignore[arg-type]
            try:
                found = registry.load(kind, name)  # type: ignore[arg-type]
            except UnsupportedError as error:
                yield name, str(error)
            else:
                yield name, _plain((inspect.getdoc(found) or "").partition("\n")[0])


def _of_case(case: Case) -> str:
    model = case.model.partition(":")[2].partition("(")[0]
    return f"{case.task}: {model} of {case.data}, {case.attack or 'no attack'}"


def details(kind: str, name: str) -> tuple[str, str, list[Setting]]:
    """Return the description of a name, the option for its settings, and its settings.

    Args:
        kind: One of ``KINDS``.
        name: A known name.

    Raises:
        BadInputError: If the name is unknown.
        UnsupportedError: If a required library is not installed.
    """
    if kind not in _OPTIONS:
        held = dict(known(kind))
        if name not in held:
            near = difflib.get_close_matches(name, held, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(held)}"
            raise BadInputError(f"unknown name {name!r} in {kind}; {hint}")
        return held[name], "", []
    found = registry.load(kind, name)  # type: ignore[arg-type]
    return _plain(_body(found)), _OPTIONS[kind], settings(found)


def settings(found: Any) -> list[Setting]:
    """Return the settings of a defense or an attack, or the reading options of another class."""
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        hints, documented = get_type_hints(found), _documented(found)
        return [
            Setting(
                entry.name,
                _default(entry),
                described_type(hints[entry.name]),
                documented.get(entry.name, ""),
            )
            for entry in dataclasses.fields(found)
            if entry.init and entry.repr  # hidden fields are not user settings
        ]
    call = found.load if hasattr(found, "load") else found.__init__
    hints, documented = get_type_hints(call), _entries(_docstring_of(call, found))
    return [
        Setting(
            name,
            "" if option.default in {None, inspect.Parameter.empty, ()} else repr(option.default),
            described_type(hints[name]),
            documented.get(name, ""),
        )
        for name, option in inspect.signature(call).parameters.items()
        if option.kind is option.KEYWORD_ONLY and name not in NOT_WRITTEN
    ]


def _default(entry: dataclasses.Field[Any]) -> str:
    if entry.default is dataclasses.MISSING:
        return ""
    if isinstance(entry.default, str):
        return entry.default
    if isinstance(entry.default, tuple):
        return ",".join(map(str, entry.default))
    return str(entry.default)


def _documented(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say about each attribute."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        found |= _entries(inspect.cleandoc(one.__doc__ or ""))
    return found


def _docstring_of(call: Any, found: Any) -> str:
    return inspect.getdoc(call) or inspect.getdoc(found) or ""


def _entries(doc: str) -> dict[str, str]:
    """Return the first sentence of each entry in the sections of a docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith("     "):
            found[name] += f" {line.strip()}"
        else:
            name = ""
    return {name: _plain(_sentence(text)) for name, text in found.items()}


def _sentence(text: str) -> str:
    first, dot, _ = text.partition(". ")
    return f"{first}." if dot else text


def _body(found: Any) -> str:
    """Return a docstring without its sections."""
    doc = inspect.getdoc(found) or ""
    return re.split(r"\n\n(?:Attributes|Args|References|Raises|Example)s?:\n", doc)[0]


def _plain(text: str) -> str:
    """Return text without reStructuredText markup."""
    return re.sub(r"``?([^`]+)``?", r"\1", _ROLE.sub(r"\1", text)).replace("*", "")
