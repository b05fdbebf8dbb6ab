"""Frozen dataclasses to plain JSON values and back, checked."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from mmdefense.errors import BadInputError, one_line

__all__ = ["SCHEMA", "JsonRecord", "build", "parse_record", "plain"]

SCHEMA = 1
"""Version of the form that records have as JSON."""


def plain(value: Any) -> Any:
    """Return ``value`` as JSON has it: dicts, lists, strings, finite numbers, booleans and none.

    A number that is not finite becomes none, since JSON has no name for it. What is of no JSON
    type, such as a path or a dtype, becomes its string. Halves of surrogate pairs, which names of
    files can have that are no UTF-8, are escaped, since strict readers of JSON refuse them.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return plain(str(value))


def build(kind: Any, value: Any, where: str) -> Any:
    """Return the ``kind`` that ``plain`` turned into ``value``.

    Args:
        kind: A dataclass, or a type that a field of one has.
        value: Plain JSON values. None reads as NaN where a number must stand.
        where: The place of ``value``, for messages.

    Raises:
        BadInputError: If a key is missing or unknown, or a value is of another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in {Union, types.UnionType}:
        return _build_one_of(inner, value, where)
    if origin is Literal:
        return _one_of(inner, value, where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin in {tuple, Sequence}:
        return tuple(build(inner[0], item, where) for item in _check(list, value, where))
    if origin is not None and issubclass(origin, Mapping):
        items = _check(dict, value, where).items()
        return {key: build(inner[1], item, f"{where}.{key}") for key, item in items}
    if kind is float:
        return _number(value, where)
    return _check(kind, value, where)


def _build_one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return the first type of a union that ``value`` fits."""
    if value is None and type(None) in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not type(None))
    for kind in others:
        with suppress(BadInputError):
            return build(kind, value, where)
    return build(last, value, where)


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    given = _check(dict, value, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(given.keys() - fields.keys()):
        raise BadInputError(f"{where} has unknown keys {unknown}; known are {sorted(fields)}")
    needed = {name for name, field in fields.items() if _is_required(field)}
    if missing := sorted(needed - given.keys()):
        raise BadInputError(f"{where} lacks the keys {missing}")
    hints = get_type_hints(kind)
    built = {name: build(hints[name], item, f"{where}.{name}") for name, item in given.items()}
    return kind(**built)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInputError(f"{where} must be a number, got {value!r}")
    return float(value)


def _one_of(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in choices:
        raise BadInputError(
            f"{where} must be one of {', '.join(map(repr, choices))}, got {value!r:.60}"
        )
    return value


def _check(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInputError(f"{where} must be a {kind.__name__}, got {value!r:.60}")
    return value


@dataclass(frozen=True)
class JsonRecord:
    """A record that is kept as JSON, with its kind and the version of its schema."""

    kind: ClassVar[str]

    def to_json(self) -> str:
        """Return the record as JSON text; numbers that are not finite become null."""
        head = {"schema": SCHEMA, "kind": self.kind}
        return json.dumps(head | plain(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the record that :meth:`to_json` wrote.

        Raises:
            BadInputError: If ``text`` is no such record.
        """
        value = parse_record(text)
        kind = value.get("kind")
        if kind != cls.kind:
            raise BadInputError(f"the record must be of kind {cls.kind!r}, got {kind!r}")
        fields = {key: item for key, item in value.items() if key not in {"schema", "kind"}}
        return build(cls, fields, cls.kind)  # type: ignore[no-any-return]


def parse_record(text: str) -> dict[str, Any]:
    """Return a record as plain values, also out of the statement that it is the predicate of."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"the record is not JSON: {one_line(error)}") from error
    if isinstance(value, dict) and isinstance(value.get("predicate"), dict):
        value = {name: item for name, item in value["predicate"].items() if name != "materials"}
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise BadInputError(f"the record must have schema {SCHEMA}, got {found!r}")
    return value
