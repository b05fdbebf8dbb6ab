"""Build the model that a state dict belongs to, from a name that the user gives."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.libraries import missing, optional_packages

__all__ = ["build_architecture"]


def build_architecture(arch: str) -> nn.Module:
    """Return what ``"module:callable"`` or ``"path/file.py:callable(name=literal)"`` builds.

    The part after the colon is parsed, not evaluated: arguments are literals.

    Raises:
        BadInputError: If it cannot be parsed, imported or called, or does not return a module.
        UnsupportedError: If a library that it needs is not installed.
    """
    module_name, _, call = arch.rpartition(".py:") if ".py:" in arch else arch.partition(":")
    file = Path(f"{module_name}.py") if ".py:" in arch else None
    path, args, named = _parse_call(arch, call)
    try:
        with _importable(Path.cwd() if file is None else file.absolute().parent):
            built: Any = importlib.import_module(module_name) if file is None else _loaded(file)
            for name in path:
                if not hasattr(built, name):
                    raise BadInputError(f"arch {arch!r}: {file or module_name} has no {name!r}")
                built = getattr(built, name)
            model = built(*args, **named)
    except (BadInputError, UnsupportedError):
        raise
    except ModuleNotFoundError as error:
        raise _without_module(arch, module_name, error) from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise BadInputError(
            f"arch {arch!r} cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise BadInputError(
            f"arch {arch!r} must return a torch.nn.Module, got {type(model).__name__}"
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
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise BadInputError(
            "arch must be module:callable or path/file.py:callable, optionally with arguments, "
            f"as in my_net:Net(width=8), got {arch!r}"
        ) from error
    return path, args, named


def _loaded(file: Path) -> ModuleType:
    """Return the module of a Python file, under a name of its own; the same file is loaded once.

    Raises:
        BadInputError: If there is no such file.
    """
    if not file.is_file():
        raise BadInputError(f"arch file {file} does not exist")
    content = hashlib.sha256(f"{file.absolute()}".encode() + file.read_bytes()).hexdigest()
    name = f"{file.stem}_{content[:8]}"  # so that two files named resnet.py do not collide
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their own module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _without_module(arch: str, module: str, error: ModuleNotFoundError) -> Exception:
    """Return the error for a module that was not found: the user's own, or a library's."""
    absent = (error.name or "").partition(".")[0]
    libraries = {package.module for package in optional_packages()}
    if module.partition(".")[0] != absent or absent in libraries:
        return missing(f"arch {arch!r}", error)
    return BadInputError(
        f"arch {arch!r} names the module {module!r}, which is neither in the current directory "
        "nor installed; for a file elsewhere give path/file.py:Net"
    )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
