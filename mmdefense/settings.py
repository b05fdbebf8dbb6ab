"""Settings as a user writes them: known, and of the type that is asked for."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmdefense.errors import BadInputError

__all__ = [
    "check_numbers",
    "check_seed",
    "checked_settings",
    "checked_value",
    "described_type",
    "fields_of",
]


_MOST_INT, _MOST_FLOAT = 2**32, 1e30
"""Ours: beyond any count, and below what overflows in single precision."""
_MOST_BATCH = 1 << 16
"""Ours; of samples that are in memory at once."""


def fields_of(kind: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass that it is made with."""
    return [entry for entry in dataclasses.fields(kind) if entry.init]


def check_numbers(settings: Any, least: float = -_MOST_FLOAT) -> None:
    """Refuse settings whose numbers no computation in single precision takes.

    Args:
        settings: A dataclass; of its fields numbers and rows of numbers are looked at.
        least: The smallest number that any of them may be.

    Raises:
        BadInputError: Naming the first that is NaN or out of range.
    """
    for entry in fields_of(type(settings)):
        value = getattr(settings, entry.name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            most = _MOST_INT if isinstance(number, int) else _MOST_FLOAT
            if entry.name.endswith("batch_size"):
                most = _MOST_BATCH
            if not number >= least:
                raise BadInputError(f"{entry.name} must be at least {least:g}, got {value!r:.80}")
            if number > most:
                raise BadInputError(f"{entry.name} must be at most {most:g}, got {value!r:.80}")


def check_seed(seed: int) -> None:
    """Refuse a seed that some generator does not take.

    Raises:
        BadInputError: If it is negative, or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise BadInputError(f"seed must lie in 0..{2**32 - 1}, got {seed}")


def checked_settings(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a dataclass as its fields have them; see :func:`checked_value`.

    Raises:
        BadInputError: Naming the setting, and what is known or needed.
    """
    known = [entry.name for entry in fields_of(kind)]
    hints = get_type_hints(kind)
    checked = {}
    for name, value in settings.items():
        if name not in known:
            raise BadInputError(
                f"{kind.__name__} has no setting {name!r}; known are {', '.join(sorted(known))}"
            )
        checked[name] = checked_value(name, value, hints[name], kind.__name__)
    return checked


def checked_value(name: str, value: Any, hint: Any, owner: str) -> Any:
    """Return a value as the type that is asked for has it.

    Where that is a tuple, one value is a tuple of one, and text with commas is a tuple of its
    parts: ``words=cf`` and ``words=cf,mn``.

    Raises:
        BadInputError: Naming the setting, whose it is, and what is needed.
    """
    if _fits(value, hint):
        return value
    parts = tuple(value.split(",")) if isinstance(value, str) else (value,)
    if _fits(parts, hint):
        return parts
    needed = described_type(hint) + (", finite and of 64 bits" if _is_beyond(value) else "")
    raise BadInputError(f"{name} of {owner} must be {needed}, got {value!r:.80}")


def _is_beyond(value: Any) -> bool:
    """Say whether a value is a number that a tensor does not hold, NaN and infinity included."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value is of a field's type; types that are no plain values are not checked."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin in {tuple, Sequence}:
        return isinstance(value, (tuple, list)) and _all_fit(value, inner)
    if hint in {int, float}:
        number = isinstance(value, int) or (hint is float and isinstance(value, float))
        return number and not isinstance(value, bool) and not _is_beyond(value)
    if hint in {bool, str, types.NoneType}:
        return isinstance(value, hint)
    return True


def _all_fit(values: Sequence[Any], hints: tuple[Any, ...]) -> bool:
    """Say whether values are of the types of a tuple, or all of the one type of a sequence."""
    if len(hints) > 1 and hints[1] is not ...:
        return len(values) == len(hints) and all(map(_fits, values, hints))
    return all(_fits(value, hints[0]) for value in values)


def described_type(hint: Any) -> str:
    """Return what a value of a type is, in words."""
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(described_type(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) in {tuple, Sequence}:
        kinds = [described_type(inner) for inner in get_args(hint) if inner is not ...]
        return f"a row ({', '.join(kinds)}{', ...' if len(kinds) == 1 else ''})"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return words.get(hint, "None" if hint is types.NoneType else str(hint))
