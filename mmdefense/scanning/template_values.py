"""The values that expressions of a Jinja template can have, as far as its text determines them.

Nothing is rendered: a few pure operations on texts, numbers and lists are evaluated, so that a name
that is assembled from pieces is recognised. Each expression has a set of values; marks stand for
those that the text does not determine.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from itertools import islice, product
from typing import Any

from jinja2 import nodes

__all__ = ["INPUT", "MADE", "Values", "is_plain_format"]


class _Mark(Enum):
    INPUT = "input"
    LETTERS = "letters"
    MADE = "made"


INPUT, LETTERS, MADE = _Mark.INPUT, _Mark.LETTERS, _Mark.MADE
"""Unknown values: given by the renderer; an object written as text, of which letters can be taken;
or made by the template in a way that is not evaluated."""

_MOST_VALUES, _LONGEST, _MOST_STEPS, _PASSES = 32, 4096, 400_000, 4
_TEXT_METHODS = {
    *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "lower", "upper", "title"),
    *("capitalize", "swapcase", "casefold", "replace", "join", "removeprefix", "removesuffix"),
    *("partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "count"),
}
_BINARY: Mapping[type[nodes.Node], Callable[[Any, Any], Any]] = {
    nodes.Add: operator.add,
    nodes.Sub: operator.sub,
    nodes.Mod: lambda left, right: _percent(left, right),
    nodes.FloorDiv: operator.floordiv,
    nodes.Div: operator.truediv,
}
_WIDE = re.compile(r"\d{4}|\*")
_FIELD = re.compile(r"\{(\w*)(![rsa])?(:[^{}]*)?\}")
_TAKING = {
    *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition", "rpartition"),
    *(
        "removeprefix",
        "removesuffix",
        "trim",
        "first",
        "last",
        "list",
        "dictsort",
        "sort",
        "unique",
    ),
    *("batch", "slice", "select", "reject", "selectattr", "rejectattr", "random", "min", "max"),
    *("items", "keys", "values", "get", "copy", "pop", "lower", "upper", "int", "length", "count"),
}
"""Filters and methods that add no text of their own, whatever their arguments are."""
_PICKING = {"list", "first", "last", "batch", "slice", "random", "min", "max", "sort", "unique"}
_FILTERS: Mapping[str, Callable[..., Any]] = {
    "string": str,
    "trim": lambda text, chars=None: str(text).strip(chars),
    "lower": lambda text: str(text).lower(),
    "upper": lambda text: str(text).upper(),
    "title": lambda text: str(text).title(),
    "capitalize": lambda text: str(text).capitalize(),
    "replace": lambda text, old, new, count=-1: str(text).replace(old, new, count),
    "reverse": lambda value: value[::-1],
    "join": lambda value, d="": str(d).join(map(str, value)),
    "sum": lambda value, start=0: _sum(value, start),
    "first": lambda value: next(iter(value)),
    "last": lambda value: list(value)[-1],
    "list": list,
    "sort": lambda value, reverse=False: sorted(value, reverse=reverse),
    "unique": lambda value: list(dict.fromkeys(value)),
    "items": lambda value: list(value.items()),
    "int": int,
    "length": len,
    "count": len,
    "format": lambda text, *values: _percent(text, list(values)),
    "tojson": json.dumps,
    **{name: lambda value: value for name in ("e", "escape", "forceescape", "safe")},
}  # fmt: skip


class Values:
    """The values of a template's expressions.

    Args:
        tree: A template as Jinja parses it.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._steps = 0
        self._seen: dict[int, list[Any]] = {}
        self._held: dict[str, list[Any]] = {}
        self._macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        self._calls: dict[str, list[nodes.Call]] = {}
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name):
                self._calls.setdefault(call.node.name, []).append(call)
        self._follow(tree)

    def _follow(self, tree: nodes.Template) -> None:
        """Assign until nothing changes; names that still change get a mark."""
        before: dict[str, list[Any]] = {}
        for _ in range(_PASSES):
            before = {name: list(values) for name, values in self._held.items()}
            self._seen = {}
            self._assign(tree)
            if before == self._held:
                break
        for name, values in self._held.items():
            if values != before.get(name):
                values.append(MADE)
        self._seen = {}

    @property
    def names(self) -> set[str]:
        """The names that the template itself assigns."""
        return set(self._held) | self._macros

    def of(self, node: nodes.Node | None) -> list[Any]:
        """Return the values that an expression can have, with a mark if there may be others."""
        if node is None:
            return [None]
        if id(node) not in self._seen:
            self._steps += 1
            within = self._steps <= _MOST_STEPS
            self._seen[id(node)] = _few(self._find(node)) if within else [MADE]
        return self._seen[id(node)]

    def _find(self, node: nodes.Node) -> Iterable[Any]:
        if isinstance(node, nodes.Const):
            return [node.value]
        if isinstance(node, nodes.TemplateData):
            return [node.data]
        if isinstance(node, nodes.Name):
            return self._held.get(node.name, [MADE if node.name in self._macros else INPUT])
        if isinstance(node, (nodes.List, nodes.Tuple)):
            return self._apply(lambda *items: list(items), node.items, follow_marks=False)
        if isinstance(node, nodes.Dict):
            return self._dict({pair.key: pair.value for pair in node.items})
        if isinstance(node, (nodes.And, nodes.Or)):
            return [*self.of(node.left), *self.of(node.right)]
        if isinstance(node, nodes.CondExpr):
            return [*self.of(node.expr1), *(self.of(node.expr2) if node.expr2 else [])]
        return self._operation(node)

    def _operation(self, node: nodes.Node) -> Iterable[Any]:
        if isinstance(node, nodes.Concat):
            if any(_is_marked(value) for part in node.nodes for value in self.of(part)):
                return [MADE]
            return self._apply(lambda *parts: "".join(map(str, parts)), node.nodes)
        if isinstance(node, nodes.Mul):
            return self._apply(_times, [node.left, node.right])
        if isinstance(node, nodes.BinExpr) and type(node) in _BINARY:
            return self._apply(_BINARY[type(node)], [node.left, node.right])
        if isinstance(node, nodes.Neg):
            return self._apply(operator.neg, [node.node])
        if isinstance(node, nodes.Getattr):
            return self._attribute(node)
        if isinstance(node, nodes.Getitem):
            return self._item(node)
        if isinstance(node, nodes.Filter):
            return self._filter(node)
        if isinstance(node, nodes.Call):
            return self._call(node)
        return [INPUT]  # tests and comparisons, which have no text

    def _apply(
        self,
        call: Callable[..., Any],
        arguments: Sequence[nodes.Node],
        named: Mapping[str, nodes.Node] | None = None,
        *,
        follow_marks: bool = True,
    ) -> list[Any]:
        """Return the results of a pure function for all values of its arguments."""
        keys = list(named or {})
        given = [self.of(node) for node in [*arguments, *(named or {}).values()]]
        found = []
        for values in islice(product(*given), _MOST_VALUES + 1):
            marked = follow_marks and any(_is_marked(value) for value in values)
            if marked:
                found.append(_unknown(values))
                continue
            plain = values[: len(arguments)]
            found += _tried(call, plain, dict(zip(keys, values[len(arguments) :], strict=True)))
        return found

    def _dict(self, items: Mapping[nodes.Node, nodes.Node]) -> list[Any]:
        keys = [self.of(key)[0] for key in items]
        return self._apply(
            lambda *values: {
                key: value
                for key, value in zip(keys, values, strict=True)
                if isinstance(key, (str, int, float, bool, type(None)))
            },
            list(items.values()),
            follow_marks=False,
        )

    def _attribute(self, node: nodes.Getattr) -> list[Any]:
        if isinstance(node.node, nodes.Name):
            held = self._held.get(f"{node.node.name}.{node.attr}")
            if held:
                return held
            if node.node.name in self._macros:
                return [MADE]
        return [
            value.get(node.attr, INPUT) if isinstance(value, dict) else _unknown([value])
            for value in self.of(node.node)
        ]

    def _item(self, node: nodes.Getitem) -> list[Any]:
        of = self.of(node.node)
        if isinstance(node.arg, nodes.Slice):
            ends = [self.of(end)[0] for end in (node.arg.start, node.arg.stop, node.arg.step)]
            if any(_is_marked(value) for value in [*of, *ends]):
                return [_part(_unknown(of))]
            return [held for value in of for held in _tried(lambda v: v[slice(*ends)], [value])]
        found: list[Any] = []
        for value, key in islice(product(of, self.of(node.arg)), _MOST_VALUES + 1):
            if isinstance(value, _Mark):
                found.append(_part(value))
            elif isinstance(key, _Mark):
                found += _elements(value) or [INPUT]
            else:
                found += _tried(lambda v, k: v[k], [value, key]) or [INPUT]
        return found

    def _filter(self, node: nodes.Filter) -> list[Any]:
        given = [node.node, *node.args] if node.node is not None else node.args
        named = {str(keyword.key): keyword.value for keyword in node.kwargs}
        if node.name in {"default", "d"}:
            return [value for argument in given[:2] for value in self.of(argument)]
        call = _FILTERS.get(node.name)
        if call is None or node.dyn_args or node.dyn_kwargs or node.node is None:
            return [self._unfollowed(given, named, node.name)]
        if node.name in _TAKING | {"string", "join"} and any(
            _is_marked(value) for value in self.of(node.node)
        ):
            return [self._unfollowed(given, named, node.name)]
        return self._apply(call, given, named)

    def _unfollowed(
        self, given: Sequence[nodes.Node], named: Mapping[str, nodes.Node], name: str
    ) -> Any:
        """Return the mark of the result of a filter or method that is not evaluated."""
        is_field = name == "map" and len(given) == 1  # map(attribute=...)
        if name in _TAKING or is_field:
            mark = _unknown(self.of(given[0]) if given else [])
            return _part(mark) if name in _PICKING else mark
        if name == "string":
            return LETTERS if _unknown(self.of(given[0])) is INPUT else MADE
        if name == "join":
            return MADE
        return _unknown([v for node in [*given, *named.values()] for v in self.of(node)])

    def _call(self, node: nodes.Call) -> list[Any]:
        named = {str(keyword.key): keyword.value for keyword in node.kwargs}
        if isinstance(node.node, nodes.Name):
            if node.node.name == "dict" and not node.args:
                return self._dict({nodes.Const(key): value for key, value in named.items()})
            return [self._called(node.node.name, node)]
        name = _method(node.node)
        if name is None or node.dyn_args or node.dyn_kwargs:
            return [MADE]
        assert isinstance(node.node, (nodes.Getattr, nodes.Getitem))
        given = [node.node.node, *node.args]
        if name == "get":
            held = [found for value in self.of(node.node.node) for found in _entries(value)]
            return [*held, *(value for given in node.args[1:] for value in self.of(given))]
        if name in _TAKING | {"join"} and any(
            _is_marked(value) for value in self.of(node.node.node)
        ):
            return [self._unfollowed(given, named, name)]
        if name in {"items", "keys", "values"}:
            return self._apply(lambda held: list(getattr(held, name)()), given)
        if name in _TEXT_METHODS:
            return self._apply(lambda text, *more: _text_method(text, name, *more), given)
        if name == "format":
            return self._apply(_formatted, given, named)
        return [self._unfollowed(given, named, name)]

    def _called(self, name: str, node: nodes.Call) -> _Mark:
        if name in self._macros or name == "caller":
            return MADE
        if name in self._held:
            return _unknown(self._held[name])
        if name in {"namespace", "range", "raise_exception"}:
            return INPUT
        given = [*node.args, *(keyword.value for keyword in node.kwargs)]
        return _unknown([value for argument in given for value in self.of(argument)])

    def _assign(self, tree: nodes.Template) -> None:
        """Add to the values of names, from each place that assigns them."""
        for node in tree.find_all(nodes.Node):
            if isinstance(node, nodes.Assign):
                self._hold(node.target, self.of(node.node))
                self._hold_namespace(node)
            elif isinstance(node, nodes.AssignBlock):
                self._hold(node.target, self._text_of(node.body, node.filter))
            elif isinstance(node, nodes.For):
                items = [item for value in self.of(node.iter) for item in _elements(value)]
                self._hold(node.target, items)
            elif isinstance(node, nodes.With):
                for target, value in zip(node.targets, node.values, strict=True):
                    self._hold(target, self.of(value))
            elif isinstance(node, (nodes.Macro, nodes.CallBlock)):
                self._hold_arguments(node)

    def _hold(self, target: nodes.Node, values: Sequence[Any]) -> None:
        if isinstance(target, nodes.Tuple):
            for index, item in enumerate(target.items):
                parts = [v[index] if _has(v, index) else _unknown([v]) for v in values]
                self._hold(item, parts)
        elif isinstance(target, (nodes.Name, nodes.NSRef)):
            name = target.name if isinstance(target, nodes.Name) else f"{target.name}.{target.attr}"
            held = self._held.setdefault(name, [])
            self._held[name] = _few([*held, *values])

    def _hold_namespace(self, node: nodes.Assign) -> None:
        made = node.node
        if not isinstance(node.target, nodes.Name) or not isinstance(made, nodes.Call):
            return
        if isinstance(made.node, nodes.Name) and made.node.name == "namespace":
            for keyword in made.kwargs:
                self._hold(nodes.NSRef(node.target.name, keyword.key), self.of(keyword.value))

    def _hold_arguments(self, node: nodes.Macro | nodes.CallBlock) -> None:
        """Assign the arguments of a macro the values of its calls and of its defaults."""
        offset = len(node.args) - len(node.defaults)
        for argument, default in zip(node.args[offset:], node.defaults, strict=True):
            self._hold(argument, self.of(default))
        if isinstance(node, nodes.CallBlock):
            for argument in node.args:
                self._hold(argument, [MADE])
            return
        for call in self._calls.get(node.name, ()):
            for argument, value in zip(node.args, call.args, strict=False):
                self._hold(argument, self.of(value))
            named = {str(keyword.key): keyword.value for keyword in call.kwargs}
            for argument in node.args:
                if argument.name in named:
                    self._hold(argument, self.of(named[argument.name]))

    def _text_of(self, body: Sequence[nodes.Node], filter_: nodes.Node | None) -> list[Any]:
        """Return the text of a named block, if it consists of expressions alone."""
        if filter_ is not None or not all(isinstance(node, nodes.Output) for node in body):
            return [MADE]
        parts = [part for node in body if isinstance(node, nodes.Output) for part in node.nodes]
        return self._apply(lambda *texts: "".join(map(str, texts)), parts)


def _method(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value if isinstance(node.arg.value, str) else None
    return None


def _few(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values; those beyond a limit become a mark."""
    found: dict[str, Any] = {}
    for value in values:
        found.setdefault(repr(value), value)
        if len(found) > _MOST_VALUES:
            return [*list(found.values())[:_MOST_VALUES], MADE]
    return list(found.values())


def _is_marked(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_marked(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_is_marked(item) for item in value)
    return isinstance(value, _Mark)


def _unknown(values: Iterable[Any]) -> _Mark:
    """Return the mark of the result of an operation on values that is not evaluated."""
    held = list(values)
    if any(_gives_text(value) for value in held):
        return MADE
    return LETTERS if LETTERS in held else INPUT


def _part(mark: _Mark) -> _Mark:
    """Return the mark of a piece of an unknown value."""
    return MADE if mark is LETTERS else mark


def _gives_text(value: Any) -> bool:
    """Return whether a value has text that could be part of a Python-internal name."""
    if isinstance(value, str):
        return any(c in "_%&" or c.isalpha() for c in value)
    if isinstance(value, (list, tuple)):
        return any(_gives_text(item) for item in value)
    if isinstance(value, dict):
        return any(_gives_text(item) for pair in value.items() for item in pair)
    return value is MADE


def _elements(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, str)):
        return list(value)[:_MOST_VALUES]
    return [_part(value)] if isinstance(value, _Mark) else []


def _entries(value: Any) -> list[Any]:
    """Return what ``get`` can return from a map."""
    return list(value.values()) if isinstance(value, dict) else [_unknown([value])]


def _has(value: Any, index: int) -> bool:
    return isinstance(value, (list, tuple)) and index < len(value)


def _tried(
    call: Callable[..., Any], values: Sequence[Any], named: Mapping[str, Any] | None = None
) -> list[Any]:
    """Return the result of a call in a list, which is empty if rendering would fail there."""
    if sum(len(value) for value in values if isinstance(value, (str, list))) > _LONGEST:
        return [MADE]
    try:
        return [call(*values, **(named or {}))]
    except _TooMuchError:
        return [MADE]
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, StopIteration):
        return []


class _TooMuchError(Exception):
    """An operation whose result would be large."""


def _times(left: Any, right: Any) -> Any:
    text, count = (left, right) if isinstance(left, (str, list)) else (right, left)
    if isinstance(text, (str, list)) and len(text) * abs(int(count)) > _LONGEST:
        raise _TooMuchError
    return left * right


def _sum(values: Any, start: Any) -> Any:
    for value in values:
        start = start + value
    return start


def _percent(left: Any, right: Any) -> Any:
    if isinstance(left, str) and _WIDE.search(left):
        raise _TooMuchError
    return left % (tuple(right) if isinstance(right, list) else right)


def _text_method(text: Any, name: str, *more: Any) -> Any:
    if not isinstance(text, str):
        raise TypeError(name)
    return getattr(text, name)(*more)


def is_plain_format(text: str) -> bool:
    """Return whether a format string uses no attribute or item of its arguments."""
    rest = _FIELD.sub("", text.replace("{{", "").replace("}}", ""))
    return "{" not in rest and "}" not in rest and not _WIDE.search(text)


def _formatted(text: Any, *values: Any, **named: Any) -> Any:
    if not isinstance(text, str):
        raise TypeError("format")
    if not is_plain_format(text):
        raise _TooMuchError
    return text.format(*values, **named)
