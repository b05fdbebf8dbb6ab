"""Check values that come from files against a schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from mmdefense.errors import BadInputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["checked_form"]

T = TypeVar("T")


def checked_form(form: TypeAdapter[T], value: object, where: object, needed: str) -> T:
    """Return a value validated by its schema: numbers converted, unknown fields dropped.

    Args:
        form: What it must be, for pydantic.
        value: Plain values, as JSON gives them.
        where: What it is called in messages.
        needed: What it must be, in words.

    Raises:
        BadInputError: Naming the first place that does not match, and its value.
    """
    from pydantic import ValidationError

    try:
        return form.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise BadInputError(
            f"{where} must be {needed}: {reason}, got {_shown(first['input'])}"
        ) from error


def _shown(value: object) -> str:
    """Return the start of a value; containers only by their type, since they may be large."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 100:
        return "a whole number of more than 30 digits"
    return f"{value!r:.60}"
