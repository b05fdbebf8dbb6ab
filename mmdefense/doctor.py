"""What this installation has, and what it lacks."""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

import mmdefense
from mmdefense import registry
from mmdefense.errors import UnsupportedError

__all__ = ["KINDS", "Finding", "OptionalPackage", "examine", "known", "optional_packages"]

KINDS = ("defenses", "attacks", "adapters", "tasks", "data")
_GROUPS = ("all", "dev")  # they gather others, so that they bring nothing of their own
_REQUIREMENT = re.compile(r"""(?P<package>[\w.-]+).*extra\s*==\s*['"](?P<extra>[\w-]+)['"]""")


@dataclass(frozen=True)
class OptionalPackage:
    """A package that some features need.

    Attributes:
        name: As on PyPI.
        extras: The extras of mmdefense that bring it, the smallest first.
        version: What is installed; none where it is missing.
    """

    name: str
    extras: tuple[str, ...]
    version: str | None


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        subject: What was looked at.
        state: What was found.
        remedy: What to do where something is missing; else empty.
    """

    subject: str
    state: str
    remedy: str = ""


def optional_packages() -> list[OptionalPackage]:
    """Return the packages that the extras bring, as the installed metadata names them."""
    extras: dict[str, list[str]] = {}
    for line in requires("mmdefense") or []:
        match = _REQUIREMENT.match(line)
        if match and match["extra"] not in _GROUPS and match["package"] != "mmdefense":
            extras.setdefault(match["package"], []).append(match["extra"])
    brought = Counter(extra for by in extras.values() for extra in by)
    return [
        OptionalPackage(name, tuple(sorted(by, key=brought.__getitem__)), _installed(name))
        for name, by in extras.items()
    ]


def _installed(name: str) -> str | None:
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine() -> Iterator[Finding]:
    """Yield what was found: versions, devices, optional packages, and the data folder."""
    yield Finding("mmdefense", mmdefense.__version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Finding("devices", ", ".join(_devices()))
    for package in optional_packages():
        remedy = "" if package.version else f"pip install 'mmdefense[{package.extras[0]}]'"
        yield Finding(package.name, package.version or "missing", remedy)
    yield _data_folder()


def _devices() -> Iterator[str]:
    yield "cpu"
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    if torch.backends.mps.is_available():
        yield "mps"


def _data_folder() -> Finding:
    folder = os.environ.get("MMDEFENSE_DATA")
    if not folder:
        return Finding("MMDEFENSE_DATA", "not set (optional)")
    if not Path(folder).is_dir():
        return Finding("MMDEFENSE_DATA", f"{folder} is no folder", "set it to one, or unset it")
    return Finding("MMDEFENSE_DATA", folder)


def known(kind: str) -> Iterator[tuple[str, str]]:
    """Yield each known name of a kind with what it is in one line.

    Args:
        kind: One of ``KINDS``.
    """
    if kind == "data":
        for task in registry.names("tasks"):
            yield from registry.load("tasks", task).data().items()
        return
    for name in registry.names(kind):  # type: ignore[arg-type]
        try:
            found = registry.load(kind, name)  # type: ignore[arg-type]
        except UnsupportedError as error:
            yield name, str(error)
        else:
            yield name, (inspect.getdoc(found) or "").partition("\n")[0].replace("``", "")
