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
    """Refuse a split that is neither ``"train"`` nor ``"test"``.

    Raises:
        BadInputError: Naming both.
    """
    if split not in PARTS:
        raise BadInputError(f"split must be 'train' or 'test', got {split!r}")


def chosen_part(found: Collection[str], split: str, where: object) -> str | None:
    """Return the part for a split; none where the data is not split.

    Args:
        found: Names of what may be parts.
        split: ``"train"`` or ``"test"``.
        where: What the data is called in messages.

    Raises:
        BadInputError: If there is the part for the other split alone.
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
    """Note that a part with another name than the split is used."""
    if part.casefold() != split:
        note(f"{where} has no split {split!r}; using {part!r}")


def part_folder(folder: Path, split: str) -> Path:
    """Return the folder of a part; the folder itself where it is not split.

    Only a folder of folders is taken for a split: one of files may be a class of that name.

    Raises:
        BadInputError: If there is the part for the other split alone.
    """
    folders = [child.name for child in folder.iterdir() if child.is_dir() and _is_parent(child)]
    part = chosen_part(folders, split, folder)
    return folder if part is None else folder / part


def _is_parent(folder: Path) -> bool:
    return any(child.is_dir() and not child.name.startswith(".") for child in folder.iterdir())


def part_archive(folder: Path, split: str) -> Path | None:
    """Return the npz archive of a part, such as ``train.npz``, where there are such archives.

    Raises:
        BadInputError: If there is the archive for the other split alone.
    """
    archives = {path.stem: path for path in folder.glob("*.npz")}
    part = chosen_part(archives, split, folder)
    return None if part is None else archives[part]
