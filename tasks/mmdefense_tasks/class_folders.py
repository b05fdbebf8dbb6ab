"""Find the classes of a folder with one subfolder of files per class."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmdefense.class_names import few
from mmdefense.errors import BadInputError
from mmdefense.notes import note
from mmdefense_tasks.parts import PARTS

__all__ = ["ClassFiles", "class_files"]

# Folders and files that operating systems leave behind.
_LITTER = frozenset({
    "__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "desktop.ini",
    "system volume information", "thumbs.db",
})  # fmt: skip


@dataclass(frozen=True)
class ClassFiles:
    """The files of a folder per class.

    Attributes:
        files: Files, sorted within each class.
        labels: Index into ``classes`` for each file, shape ``(N,)``, int64.
        classes: Names of the folders in text order, as in torchvision's ``ImageFolder``.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]


def class_files(folder: Path, suffixes: Collection[str], kind: str) -> ClassFiles:
    """Return the files of a folder with one sub-folder per class.

    Hidden folders, those left by operating systems (``__MACOSX``) and those without matching files
    are ignored.

    Args:
        folder: The folder; files may be at any depth below its sub-folders.
        suffixes: Suffixes of the files to read, in lower case.
        kind: What they are, in the plural, such as ``"images"``.

    Raises:
        BadInputError: If there are no such files, or not one folder per class.
    """
    skipped: Counter[str] = Counter()
    folders = sorted(
        (child for child in folder.iterdir() if child.is_dir() and not _is_litter(child.name)),
        key=lambda child: child.name,
    )
    for child in folders:
        if any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in child.name):
            raise BadInputError(
                f"class folders of {folder} must have names in UTF-8 without control "
                f"characters, got {child.name!r}"
            )
    held = {child: _files(child, suffixes, skipped) for child in folders}
    full = {child: files for child, files in held.items() if files}
    loose = [path for path in folder.iterdir() if _is_sample(path, suffixes)]
    if not full:
        raise BadInputError(_nothing(folder, loose, kind, suffixes, skipped))
    _check_levels(folder, full, kind)
    empty = [child.name for child in held if child not in full]
    if empty:
        note(f"ignored folders of {folder} without {kind}: {few(empty)}")
    if loose:
        note(f"ignored {len(loose)} {kind} directly in {folder}, since they have no class")
    if skipped:
        note(f"ignored files of {folder} whose suffix is not one of {kind}: {_counted(skipped)}")
    counts = torch.tensor([len(files) for files in full.values()])
    return ClassFiles(
        files=tuple(path for files in full.values() for path in files),
        labels=torch.arange(len(full)).repeat_interleave(counts),
        classes=tuple(child.name for child in full),
    )


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _LITTER


def _is_sample(path: Path, suffixes: Collection[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def _files(folder: Path, suffixes: Collection[str], skipped: Counter[str]) -> list[Path]:
    """Return the files of a class; count those of other suffixes."""
    found = []
    for path in sorted(folder.rglob("*")):
        if any(map(_is_litter, path.relative_to(folder).parts)) or not path.is_file():
            continue
        if path.suffix.lower() in suffixes:
            found.append(path)
        else:
            skipped[path.suffix.lower() or "no suffix"] += 1
    return found


def _counted(skipped: Counter[str]) -> str:
    return few(f"{count} {suffix}" for suffix, count in skipped.most_common())


def _nothing(
    folder: Path, loose: list[Path], kind: str, suffixes: Collection[str], skipped: Counter[str]
) -> str:
    one = f"must hold one folder of {kind} per class"
    if loose:
        return (
            f"data folder {folder} {one}, got {len(loose)} {kind} directly in it, which have no "
            "label; sort them into one folder per class"
        )
    left_out = f" but {_counted(skipped)}" if skipped else ""
    known = ", ".join(sorted(suffixes))
    return f"data folder {folder} {one}, got no {kind}{left_out}; supported suffixes are {known}"


def _check_levels(folder: Path, full: dict[Path, list[Path]], kind: str) -> None:
    """Reject a folder one level too high, or splits without class folders."""
    names = {name for part in PARTS.values() for name in part}
    if all(child.name.casefold() in names for child in full):
        part = next(iter(full))
        raise BadInputError(
            f"data folder {part} must hold one folder of {kind} per class, got {len(full[part])} "
            f"{kind} directly in it, which have no label; sort them into one folder per class"
        )
    if len(full) > 1:
        return
    ((only, files),) = full.items()
    below = sorted({path.relative_to(only).parts[0] for path in files})
    if len(below) > 1 and not any((only / name).is_file() for name in below):
        raise BadInputError(
            f"data folder {folder} must hold one folder of {kind} per class, got only the folder "
            f"{only.name!r} with the folders {few(below)}; if these are the classes, give {only} "
            f"as the data; if {only.name!r} is a class, put its {kind} directly into it"
        )
