"""The splits of a data set, and their names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mmdefense.errors import BadInputError
from mmdefense.notes import note

__all__ = ["PARTS", "check_split", "chosen_part", "note_part", "part_archive", "part_folder"]

PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "dev", "eval"),
}
"""For each split, its possible names; the first that exists is used."""


def check_split(split: str) -> None:
    """Reject a split that is neither ``"train"`` nor ``"test"``.

    Raises:
        BadInputError: If so; the message names both.
    """
    if split not in PARTS:
        raise BadInputError(f"split must be 'train' or 'test', got {split!r}")


def chosen_part(found: Collection[str], split: str, where: object) -> str | None:
    """Return the name of a split in the data; None if the data is not split.

    Args:
        found: Names of possible splits.
        split: ``"train"`` or ``"test"``.
        where: Name of the data in messages.

    Raises:
        BadInputError: If there is only the other split.
    """
    names = {name.casefold(): name for name in found}
    there = [names[name] for name in PARTS[split] if name in names]
    if there:
        note_part(there[0], split, where)
        return there[0]
    others = [names[name] for part in PARTS.values() for name in part if name in names]
    if others:
        raise BadInputError(
            f"data {where} has no split {split!r}, only {others[0]!r}; to use that, give its "
            "path as the data, or give --split"
        )
    return None


def note_part(part: str, split: str, where: object) -> None:
    """Note that a split with a different name is used."""
    if part.casefold() != split:
        note(f"{where} has no split {split!r}; using {part!r}")


def part_folder(folder: Path, split: str) -> Path:
    """Return the folder of a split; the folder itself if it is not split.

    Only a folder of folders is treated as a split: one with files may be a class of that name.

    Raises:
        BadInputError: If there is only the other split.
    """
    folders = [child.name for child in folder.iterdir() if child.is_dir() and _is_parent(child)]
    part = chosen_part(folders, split, folder)
    return folder if part is None else folder / part


def _is_parent(folder: Path) -> bool:
    return any(child.is_dir() and not child.name.startswith(".") for child in folder.iterdir())


def part_archive(folder: Path, split: str) -> Path | None:
    """Return the npz archive of a split, such as ``train.npz``, if there are such archives.

    Raises:
        BadInputError: If there is only the archive of the other split.
    """
    archives = {path.stem: path for path in folder.glob("*.npz")}
    part = chosen_part(archives, split, folder)
    return None if part is None else archives[part]
