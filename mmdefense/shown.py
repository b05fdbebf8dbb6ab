"""Short representations of results and samples: a few lines, never whole tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html import escape
from typing import Any

from torch import Tensor, nn

__all__ = ["Shown", "as_html", "brief"]

_MOST = 4  # entries of a sequence that are shown


class Shown:
    """A dataclass that shows the size of what it holds; to be decorated with ``repr=False``."""

    __slots__ = ()

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        held = [(field.name, getattr(self, field.name)) for field in fields if field.repr]
        shown = [f"{name}={brief(value)}" for name, value in held if value is not None]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        return as_html(repr(self))


def brief(value: Any) -> str:
    """Return a value in a few words: dtype and shape of a tensor, first items of a sequence."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return f"{len(value)} tensors"
    if isinstance(value, (tuple, list)) and len(value) > _MOST:
        first = ", ".join(_cut(repr(item)) for item in value[:_MOST])
        return f"({first}, ... {len(value)} in all)"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} of {sum(p.numel() for p in value.parameters()):,} weights"
    if isinstance(value, Mapping) and len(value) > _MOST:
        return f"{{{', '.join(map(str, list(value)[:_MOST]))}, ... {len(value)} in all}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {brief(item)}' for name, item in value.items())}}}"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_html(text: str) -> str:
    """Return text of several lines for a notebook."""
    return f"<pre>{escape(text)}</pre>"
