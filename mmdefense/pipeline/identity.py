"""What a result depends on: sources, reading options, settings, seed, device, libraries and code.

It has two uses: a run is resumed only if its identity matches, and results are looked up in a store
by everything that determines them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmdefense import registry
from mmdefense.checkpoints.seals import hash_all
from mmdefense.defenses.base import Defense
from mmdefense.errors import BadInputError
from mmdefense.pipeline.sources import Opened, Source
from mmdefense.prepared import Prepared
from mmdefense.protocol import traits
from mmdefense.report.encoding import plain
from mmdefense.store import Identity

__all__ = ["code_version", "library_versions", "purification_parts", "scan_identity"]

_ELSEWHERE = ("cli", "evaluation", "store")
"""Modules and packages of mmdefense that do not affect purifications and scans."""

_LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "transformers", "timm", "peft")


def purification_parts(
    source: Source, opened: Opened, prepared: Prepared[Any], defense: Defense
) -> dict[str, Any]:
    """Return everything that a purification's result depends on, as plain values by name.

    Args:
        source: Where model and data are, and how they are read.
        opened: The model and the data.
        prepared: Model and data, validated.
        defense: The defense with all its settings.
    """
    its = traits(opened.adapter)
    return {
        **{f"option {name}": value for name, value in plain(source.reading).items()},
        "architecture": _architecture(source.arch),
        "weights": plain(source.weights),
        "split": source.split,
        "adapter": type(opened.adapter).__name__,
        "defense": type(defense).__name__,
        **{f"setting {name}": value for name, value in plain(asdict(defense)).items()},
        "task": opened.task.name,
        "model": prepared.sha256,
        "normalisation": plain([its.mean, its.std]),
        "data": prepared.fingerprint,
        "device": next(prepared.model.parameters()).device.type,
        "mmdefense": code_version(*_ELSEWHERE),
        "libraries": library_versions(),
    }


def scan_identity(
    name: str, files: Mapping[str, str], data: Any, source: Mapping[str, Any], seed: int
) -> Identity:
    """Return everything that a scan depends on.

    Args:
        name: The user's name for the model.
        files: SHA-256 of each file of the model.
        data: Location of the clean data; None if there is none.
        source: Further arguments of a :class:`~mmdefense.pipeline.sources.Source`.
        seed: Seed of the trigger search.

    Raises:
        BadInputError: If the content of the data cannot be identified without the model.
    """
    return Identity(
        "scan",
        f"{name}, on {data}" if data is not None else name,
        {
            "files": dict(files),
            "data": None if data is None else _content(data),
            **plain({key: value for key, value in source.items() if key not in {"arch", "device"}}),
            "architecture": _architecture(source["arch"]),
            "device": str(source["device"]).partition(":")[0],
            "seed": seed,
            "mmdefense": code_version(*_ELSEWHERE),
            "libraries": library_versions(),
        },
    )


def _content(data: Any) -> dict[str, Any]:
    """Return what identifies the content of data, given its path or the name of a data set.

    Raises:
        BadInputError: If it is neither.
    """
    if Path(data).exists():
        return hash_all(data)
    tasks = [registry.load("tasks", name)() for name in registry.names("tasks")]
    known = [task for task in tasks if str(data) in task.data()]
    if not known:
        raise BadInputError(
            f"data {data} is neither a path nor a known name, so its scan cannot be kept in a "
            "store; leave --store out, or give a path"
        )
    return {task.name: task.load(data).in_memory().fingerprint() for task in known}


def _architecture(arch: str | None) -> list[str]:
    """Return the name of the callable that builds a model, and a hash of its file or package."""
    if arch is None:
        return []
    digest = hashlib.sha256()
    for path in _files_of(arch):
        digest.update(path.read_bytes())
    return [arch, digest.hexdigest()]


def _files_of(arch: str) -> list[Path]:
    if ".py:" in arch:
        path = Path(f"{arch.rpartition('.py:')[0]}.py")
        return [path] if path.is_file() else []
    package = arch.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(package, [str(Path.cwd()), *sys.path])
    if spec is None:
        return []
    folders = map(Path, spec.submodule_search_locations or ())
    inside = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return inside or [path for path in [Path(str(spec.origin))] if path.is_file()]


@cache
def code_version(*without: str) -> str:
    """Return a hash over the sources of mmdefense and of every registered plug-in.

    Args:
        without: Modules and packages of mmdefense to leave out.
    """
    digest = hashlib.sha256()
    for path in sorted(_sources(set(without))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(without: set[str]) -> Iterator[Path]:
    for package in sorted({"mmdefense", *registry.packages()}):
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        if not spec.submodule_search_locations:  # a single-file plug-in
            yield Path(str(spec.origin))
        for folder in map(Path, spec.submodule_search_locations or ()):
            for path in folder.rglob("*.py"):
                name = path.relative_to(folder).parts[0].removesuffix(".py")
                if package != "mmdefense" or name not in without:
                    yield path


@cache
def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that results depend on."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
