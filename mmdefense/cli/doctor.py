"""Report what this installation has and what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import mmdefense
from mmdefense.libraries import how_to_install, optional_packages

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: What was checked.
        state: What was found.
        remedy: What to do if something is missing; else empty.
    """

    subject: str
    state: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Yield what was found: versions, devices, optional packages, and the data folder."""
    yield Finding("mmdefense", mmdefense.__version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Finding("devices", ", ".join(_devices()))
    for package in optional_packages():
        remedy = "" if package.version else how_to_install(package.name)
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
        return Finding(
            "MMDEFENSE_DATA", f"{folder} is not a folder", "set it to a folder, or unset it"
        )
    return Finding("MMDEFENSE_DATA", folder)
