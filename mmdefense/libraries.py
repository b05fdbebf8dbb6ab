"""Optional libraries: which extras bring them, and how a missing one is installed."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from urllib.parse import unquote, urlparse

from mmdefense.errors import UnsupportedError, one_line

__all__ = ["OptionalPackage", "how_to_install", "missing", "needed", "optional_packages"]

_GROUPS = ("all", "dev")  # they combine other extras and add nothing
_REQUIREMENT = re.compile(
    r"""(?P<package>[\w.-]+)(?P<bounds>[^;]*);.*extra\s*==\s*['"](?P<extra>[\w-]+)['"]"""
)
_MODULES = {
    "open3d-cpu": "open3d",
    "cyclonedx-python-lib": "cyclonedx",
    "mlflow-skinny": "mlflow",
    "pyopenssl": "OpenSSL",
}
"""Modules whose name differs from that of their package."""


@dataclass(frozen=True)
class OptionalPackage:
    """A package that some features need.

    Attributes:
        name: As on PyPI.
        extras: The extras of mmdefense that bring it, the smallest first.
        version: What is installed; none where it is missing.
        bounds: Which versions will do, such as ``">=0.26"``.
    """

    name: str
    extras: tuple[str, ...]
    version: str | None
    bounds: str = ""

    @property
    def module(self) -> str:
        """The name that it is imported by."""
        return _MODULES.get(self.name, self.name.replace("-", "_"))


def optional_packages() -> list[OptionalPackage]:
    """Return the packages that the extras bring, as the installed metadata names them."""
    extras: dict[tuple[str, str], list[str]] = {}
    for line in requires("mmdefense") or []:
        match = _REQUIREMENT.match(line)
        if match and match["extra"] not in _GROUPS and match["package"] != "mmdefense":
            extras.setdefault((match["package"], match["bounds"].strip()), []).append(
                match["extra"]
            )
    brought = Counter(extra for by in extras.values() for extra in by)
    return [
        OptionalPackage(name, tuple(sorted(by, key=brought.__getitem__)), _installed(name), bounds)
        for (name, bounds), by in extras.items()
    ]


def _installed(name: str) -> str | None:
    module = _MODULES.get(name, name.replace("-", "_"))
    try:
        return version(name) if importlib.util.find_spec(module) else None
    except (PackageNotFoundError, ValueError):  # ValueError: it was hidden in sys.modules
        return None


@contextmanager
def needed(what: str, *packages: str) -> Iterator[None]:
    """Turn the error of an import into one line that says what to install.

    Args:
        what: What cannot be done without it, as the subject of a sentence.
        *packages: What is to be installed; by default the package that the import did not find.

    Raises:
        UnsupportedError: In place of an :class:`ImportError`.

    Example:
        >>> with needed("drawing a cloud"):
        ...     import no_such_package
        Traceback (most recent call last):
        ...
        mmdefense.errors.UnsupportedError: drawing a cloud needs the package 'no_such_package'...
    """
    try:
        yield
    except ImportError as error:
        raise missing(what, error, *packages) from error


def missing(what: str, error: ImportError, *packages: str) -> UnsupportedError:
    """Return the error for a library that is not installed; see :func:`needed`."""
    names = packages or _unfound(error)
    if not names:  # installed but fails to load: a system library or a symbol is missing
        return UnsupportedError(f"{what} needs a library that fails to load: {one_line(error)}")
    word = "package" if len(names) == 1 else "packages"
    listed = " and ".join(repr(name) for name in names)
    found = "which is not installed" if len(names) == 1 else "which are not all installed"
    return UnsupportedError(f"{what} needs the {word} {listed}, {found}; {how_to_install(*names)}")


def _unfound(error: ImportError) -> tuple[str, ...]:
    """Return what an import did not find; empty if the error does not say."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (error.name.partition(".")[0],)
    words = set(re.findall(r"[\w-]+", str(error).lower()))  # libraries check in their own ways
    return tuple(p.name for p in optional_packages() if p.name in words and p.version is None)


def how_to_install(*names: str) -> str:
    """Return the command that installs packages, the way mmdefense itself was installed.

    For a checkout it installs one of its extras. Otherwise it names the packages themselves;
    packages that no extra contains are named without a command, since a module may have another
    name than its package.

    Args:
        *names: Of packages, or of modules that they bring.
    """
    known = [p for p in optional_packages() if {p.name, p.module} & set(names)]
    if len(known) < len(set(names)):
        return f"install the package that provides {' and '.join(names)}"
    pip = "uv pip install" if _metadata("INSTALLER").strip() == "uv" else "pip install"
    shared = [extra for extra in known[0].extras if all(extra in p.extras for p in known)]
    checkout = _checkout()
    if checkout and shared:
        return f"{pip} -e '{checkout}[{shared[0]}]'"
    return f"{pip} {' '.join(_quoted(p.name + p.bounds) for p in known)}"


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if set("<>=!~") & set(requirement) else requirement


def _checkout() -> str:
    """Return the folder that mmdefense is installed from in editable form; empty where none is."""
    origin = json.loads(_metadata("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return ""
    return unquote(urlparse(origin["url"]).path)


def _metadata(name: str) -> str:
    return distribution("mmdefense").read_text(name) or ""
