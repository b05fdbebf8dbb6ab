"""Check the settings that a user writes: their names, types and bounds."""

from __future__ import annotations

import dataclasses
import math
import operator
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, MinLen

from mmdefense.errors import BadInputError

__all__ = [
    "BatchSize",
    "Count",
    "NotNegative",
    "OpenShare",
    "Positive",
    "Seed",
    "Share",
    "Text",
    "Whole",
    "check_seed",
    "check_settings",
    "checked_settings",
    "checked_value",
    "described_type",
    "fields_of",
]


BatchSize = Annotated[int, Interval(ge=1, le=1 << 16)]
"""Samples that are in memory at once; the bound is our choice."""

Share = Annotated[float, Interval(ge=0, le=1)]
"""A number in ``[0, 1]``."""

OpenShare = Annotated[float, Interval(gt=0, lt=1)]
"""A number in ``(0, 1)``."""

Positive = Annotated[float, Gt(0)]
"""A number above 0."""

NotNegative = Annotated[float, Ge(0)]
"""A number, at least 0."""

Count = Annotated[int, Ge(1)]
"""An integer, at least 1."""

Whole = Annotated[int, Ge(0)]
"""An integer, at least 0."""

Text = Annotated[str, MinLen(1)]
"""A string that is not blank."""

Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
"""A seed that every generator takes: NumPy's have 32 bits."""

_MOST_INT, _MOST_FLOAT = 2**32, 1e30
"""Our choice: beyond any count, and below what overflows in single precision."""


def fields_of(kind: Any) -> list[dataclasses.Field[Any]]:
    """Return the init fields of a dataclass."""
    return [entry for entry in dataclasses.fields(kind) if entry.init]


def check_settings(settings: Any) -> None:
    """Refuse a dataclass whose values do not match their annotations.

    A field's annotation declares its type, choices and bounds: ``Share`` for a number in ``[0,
    1]``, or ``Annotated[float, Gt(0)]``. No number may be NaN, infinite, or beyond what a
    computation in single precision holds.

    Raises:
        BadInputError: Naming the setting, what it must be, and what was given.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        value = getattr(settings, name)
        if not _fits(value, hint):
            raise BadInputError(f"{name} must be {_needed(value, hint)}")
        if fault := _beyond_bounds(value, hint):
            raise BadInputError(f"{name} {fault}, got {value!r:.80}")


def check_seed(seed: int) -> None:
    """Refuse a seed that some generator does not take.

    Raises:
        BadInputError: If it is negative, or has more than 32 bits.
    """
    if fault := _beyond_bounds(seed, Seed):
        raise BadInputError(f"seed {fault}, got {seed}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass's init fields, bounds included."""
    hints = get_type_hints(kind, include_extras=True)
    return {entry.name: hints[entry.name] for entry in fields_of(kind)}


def _beyond_bounds(value: Any, hint: Any) -> str:
    """Return in words which bound of its type a value violates; empty if none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        fitting = next(option for option in inner if _fits(value, option))
        return _beyond_bounds(value, fitting)
    if origin is tuple and isinstance(value, (tuple, list)):
        kinds = (
            inner if len(inner) == len(value) and inner[-1] is not ... else inner[:1] * len(value)
        )
        return next(filter(None, map(_beyond_bounds, value, kinds)), "")
    if origin is Annotated:
        if broken := [bound for bound in inner[1:] if not _keeps(value, bound)]:
            return _in_words(broken[0])
        return _beyond_bounds(value, inner[0])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        most = _MOST_INT if isinstance(value, int) else _MOST_FLOAT
        if abs(value) > most:
            return f"must be at most {most:g}" if value > 0 else f"must be at least {-most:g}"
    return ""


def _keeps(value: Any, bound: Any) -> bool:
    """Return whether a value satisfies a bound of ``annotated_types``."""
    if isinstance(bound, MinLen):
        return len(value.strip() if isinstance(value, str) else value) >= bound.min_length
    return all(
        limit is None or holds(value, limit)
        for limit, holds in (
            (getattr(bound, "ge", None), operator.ge),
            (getattr(bound, "gt", None), operator.gt),
            (getattr(bound, "le", None), operator.le),
            (getattr(bound, "lt", None), operator.lt),
        )
    )


def _in_words(bound: Any) -> str:
    if isinstance(bound, MinLen):
        return (
            "must not be empty"
            if bound.min_length == 1
            else (f"must have at least {bound.min_length} items")
        )
    low = getattr(bound, "gt", None) if getattr(bound, "ge", None) is None else bound.ge
    high = getattr(bound, "lt", None) if getattr(bound, "le", None) is None else bound.le
    opened = "(" if getattr(bound, "ge", None) is None else "["
    closed = ")" if getattr(bound, "le", None) is None else "]"
    if low is not None and high is not None:
        return f"must lie in {opened}{low}, {high}{closed}"
    if high is not None:
        return f"must be at most {high}" if closed == "]" else f"must be below {high}"
    if opened == "(":
        return "must be positive" if low == 0 else f"must be above {low}"
    return f"must be at least {low}"


def checked_settings(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings converted to the types of a dataclass's fields; see :func:`checked_value`.

    Raises:
        BadInputError: Naming the setting, and what is known or needed.
    """
    known = [entry.name for entry in fields_of(kind)]
    hints = get_type_hints(kind)
    checked = {}
    for name, value in settings.items():
        if name not in known:
            raise BadInputError(
                f"{kind.__name__} has no setting {name!r}; choose from {', '.join(sorted(known))}"
            )
        checked[name] = checked_value(name, value, hints[name], kind.__name__)
    return checked


def checked_value(name: str, value: Any, hint: Any, owner: str) -> Any:
    """Return a value converted to a type.

    If that is a tuple, a single value becomes a tuple of one, and text with commas a tuple of its
    parts: ``words=cf`` and ``words=cf,mn``.

    Raises:
        BadInputError: Naming the setting, whose it is, and what is needed.
    """
    if _fits(value, hint):
        return value
    parts = tuple(value.split(",")) if isinstance(value, str) else (value,)
    if _fits(parts, hint):
        return parts
    raise BadInputError(f"{name} of {owner} must be {_needed(value, hint)}")


def _needed(value: Any, hint: Any) -> str:
    """Return what a value must be, and what was given."""
    beyond = " that is finite and fits in 64 bits" if _is_beyond(value) else ""
    return f"{described_type(hint)}{beyond}, got {value!r:.80}"


def _is_beyond(value: Any) -> bool:
    """Return whether a value is a number that does not fit a tensor, NaN and infinity included."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a field's type; parametrised types are not checked."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in {Union, types.UnionType}:
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin in {tuple, Sequence}:
        return isinstance(value, (tuple, list)) and _all_fit(value, inner)
    if hint in {int, float}:
        number = isinstance(value, int) or (hint is float and isinstance(value, float))
        return number and not isinstance(value, bool) and not _is_beyond(value)
    if isinstance(hint, type) and hint is not Any and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


def _all_fit(values: Sequence[Any], hints: tuple[Any, ...]) -> bool:
    """Return whether values have the types of a tuple, or all the item type of a sequence."""
    if len(hints) > 1 and hints[1] is not ...:
        return len(values) == len(hints) and all(map(_fits, values, hints))
    return all(_fits(value, hints[0]) for value in values)


def described_type(hint: Any) -> str:
    """Return what a value of a type is, in words."""
    if get_origin(hint) is Annotated:
        return described_type(get_args(hint)[0])
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(described_type(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) in {tuple, Sequence}:
        kinds = [described_type(inner) for inner in get_args(hint) if inner is not ...]
        return f"a list ({', '.join(kinds)}{', ...' if len(kinds) == 1 else ''})"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    if hint is types.NoneType:
        return "None"
    return words.get(hint, f"a {hint.__name__}" if isinstance(hint, type) else str(hint))
