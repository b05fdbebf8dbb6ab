"""Read class names from a file, and match them to the model's class names."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line
from mmdefense.files import parse_json, read_bytes

__all__ = ["UnknownNameError", "contradicted", "few", "match", "read_class_names"]


_MOST_BYTES = 1 << 26


class UnknownNameError(BadInputError):
    """A class of the data has no match among the model's names."""


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the names in a file, in order of their labels.

    Args:
        path: A text file with one name a line; or JSON: a list of names, a list of objects with a
            ``name``, a map of labels to names such as ``id2label``, a map of names to labels, or an
            object that holds one of these maps as ``id2label`` or ``label2id``, such as the
            ``config.json`` of a model.

    Raises:
        BadInputError: If it cannot be read, is empty, or has a label without a name.
    """
    try:
        content = read_bytes(path, _MOST_BYTES)
        is_json = path.suffix.lower() == ".json"
        held = parse_json(content, "it") if is_json else _lines(content.decode("utf-8-sig"))
    except ValueError as error:
        raise BadInputError(f"class names {path} cannot be read: {one_line(error)}") from error
    if isinstance(held, dict):
        held = held.get("id2label", held.get("label2id", held))
    names = _by_label(held) if isinstance(held, dict) else held
    if not isinstance(names, list) or not names:
        raise BadInputError(
            f"class names {path} must be a list of names or a map of labels 0, 1, ... to names, "
            f"got {_shown(held)}"
        )
    return tuple(_name(row, label, path) for label, row in enumerate(names))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def _by_label(held: Mapping[str, Any]) -> list[Any] | None:
    """Return the names of a map in order, where its labels are 0, 1, ... without a gap."""
    for labels, names in ((held.keys(), held.values()), (held.values(), held.keys())):
        if all(re.fullmatch(r"[0-9]{1,9}", str(label)) for label in labels):
            placed = dict(zip(map(int, labels), names, strict=True))
            if sorted(placed) == list(range(len(held))):
                return [placed[label] for label in range(len(placed))]
    return None


def _name(row: Any, label: int, path: Path) -> str:
    name = row.get("name") if isinstance(row, dict) else row
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        raise BadInputError(
            f"class names {path} must have a name for each label, got {_shown(row)} for {label}"
        )
    return str(name)


def _shown(value: Any) -> str:
    text = "an empty file" if value == [] else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def match(own: Sequence[str], model: Sequence[str], where: object = "the data") -> list[int]:
    """Return the model's label of each name of the data.

    A name is first looked for as it is; then without regard to case, spaces, hyphens and
    underscores; then among the synonyms of names such as ``"tench, Tinca tinca"``.

    Args:
        own: Names of the data.
        model: Names of the model, in order of its labels.
        where: What the data is called in messages.

    Raises:
        UnknownNameError: If one is not among the model's.
        BadInputError: If one may be several classes of the model, or two are the same.
    """
    tables = [_table(model, key) for key in _KEYS]
    labels = [_label(name, tables) for name in own]
    unknown = [name for name, label in zip(own, labels, strict=True) if label is None]
    if unknown:
        raise UnknownNameError(
            f"classes of {where} must be among the model's {len(model)} ({few(model)}), got "
            f"{few(unknown)}"
        )
    first: dict[int | None, str] = {}
    for name, label in zip(own, labels, strict=True):
        if label in first:
            raise BadInputError(
                f"classes {first[label]!r} and {name!r} of {where} are both the model's class "
                f"{label}; merge them"
            )
        first[label] = name
    return [label for label in labels if label is not None]


def _plain(name: str) -> str:
    """Return a name without what file systems and authors write differently."""
    plain = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFC", name).casefold())
    return str(int(plain)) if plain.isdecimal() else plain


def _synonyms(name: str) -> list[str]:
    return [plain for part in name.split(",") if (plain := _plain(part))]


_KEYS: tuple[Callable[[str], list[str]], ...] = (
    lambda name: [name],
    lambda name: [_plain(name)],
    _synonyms,
)
"""The keys by which a model's name is looked up, from strict to lenient."""


def _table(model: Sequence[str], key: Callable[[str], list[str]]) -> dict[str, set[int]]:
    table = defaultdict(set)
    for label, name in enumerate(model):
        for form in key(name):
            table[form].add(label)
    return dict(table)


def _label(name: str, tables: Sequence[dict[str, set[int]]]) -> int | None:
    for form, table in zip((name, _plain(name), _plain(name)), tables, strict=True):
        labels = sorted(table.get(form, ()))
        if len(labels) > 1:
            raise BadInputError(
                f"class {name!r} matches several of the model's classes "
                f"({', '.join(map(str, labels))}); name the classes of the data by these "
                "numbers, or give all of the model's class names: --classes FILE"
            )
        if labels:
            return labels[0]
    return None


def contradicted(names: Sequence[str], model: Sequence[str]) -> str | None:
    """Return the first name that has one label in the data and another one in the model."""
    table = _table(model, _KEYS[1])
    for label, name in enumerate(names):
        labels = table.get(_plain(name), {label})
        if label not in labels:
            return name
    return None


def few(names: Iterable[str], shown: int = 5) -> str:
    """Return the first names with commas between, for a message."""
    names = list(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
