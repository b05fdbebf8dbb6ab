"""Data sets in the folder named by the environment variable ``MMDEFENSE_DATA``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["DATA_VARIABLE", "staged", "staged_sets"]

DATA_VARIABLE = "MMDEFENSE_DATA"


def staged(name: str) -> Path | None:
    """Return the folder of a named set, if it exists."""
    root = os.environ.get(DATA_VARIABLE)
    folder = Path(root or "") / name
    return folder if root and name and folder.is_dir() else None


def staged_sets(names: Iterable[str]) -> dict[str, str]:
    """Return the names of existing sets, each with its folder."""
    return {name: str(folder) for name in names if (folder := staged(name))}
