"""Builds the model that a state dict belongs to, from a name that the user gives."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from mmdefense.errors import BadInputError, one_line

__all__ = ["build_architecture"]


def build_architecture(arch: str) -> nn.Module:
    """Return what ``"module:callable"`` or ``"module:callable(name=literal, ...)"`` builds.

    The part after the colon is parsed, not evaluated: arguments are literals.

    Raises:
        BadInputError: If it cannot be parsed, imported or called, or gives no module.
    """
    module_name, _, call = arch.partition(":")
    path, args, named = _parse_call(arch, call)
    try:
        with _current_directory_importable():
            built: Any = importlib.import_module(module_name)
            for name in path:
                built = getattr(built, name)
            model = built(*args, **named)
    except Exception as error:  # the user's own code may raise anything
        raise BadInputError(
            f"arch {arch!r} cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise BadInputError(
            f"arch {arch!r} must give a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def _parse_call(arch: str, call: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Return dotted path, arguments and named arguments of the part after the colon."""
    try:
        node = ast.parse(call, mode="eval").body
        args: list[Any] = []
        named: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            args = [ast.literal_eval(value) for value in node.args]
            named = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            node = node.func
        path = ast.unparse(node).split(".")
        if not all(name.isidentifier() for name in path):
            raise ValueError(call)
    except (SyntaxError, ValueError) as error:
        raise BadInputError(
            f"arch must be module:callable or module:callable(name=literal), got {arch!r}"
        ) from error
    return path, args, named


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
