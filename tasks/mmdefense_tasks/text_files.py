"""Text in files: parallel sentences, instructions with their answers, and plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.files import parse_json
from mmdefense.notes import note
from mmdefense_tasks.data_sets import open_part, reading
from mmdefense_tasks.options import Options
from mmdefense_tasks.parts import PARTS, note_part
from mmdefense_tasks.reading import lines_of, read_text

__all__ = ["Pairs", "open_dataset", "open_file", "open_folder"]

Pairs = list[tuple[str, str]]
"""Prompts with their answers; the prompt of plain text is empty."""

Languages = tuple[str, str]
"""Source and target language, as named in the data."""

_PLAIN, _RECORDS = (".txt", ".txt.gz"), (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".arrow", ".xlsx")
_PARAGRAPH = re.compile(r"\n\s*\n")
_TEST_SHARE = 0.1  # fraction of an unsplit text, taken from its end, as is usual for Shakespeare
_PROMPTS = ("instruction", "prompt", "question", "input")
_ANSWERS = ("output", "completion", "response", "answer", "text")


def open_folder(
    folder: Path, split: str, options: Options, default: Languages | None = None
) -> Pairs:
    """Return the text pairs in a folder: two parallel files, or one file, for each split.

    Args:
        folder: A folder with ``train.en`` and ``train.de``, ``train.jsonl`` or ``train.txt`` and
            the same for the test split, gzipped or not; or with one ``.txt`` file, which is split
            here.
        split: ``"train"`` or ``"test"``.
        options: ``pair``: source and target language, if there are more than two, or if they should
            not be taken in alphabetical order.
        default: Languages to use if none are given.

    Raises:
        BadInputError: If there is no such file, or it is damaged.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for name in PARTS[split]:
        mine = [path for path in files if re.match(rf"{name}[._]", path.name)]
        single = [path for path in mine if path.name.endswith((*_PLAIN, *_RECORDS))]
        if single:
            note_part(name, split, folder)
            return open_file(single[0], options)
        languages = {_language(path): path for path in reversed(mine)}
        if len(languages) > 1:
            note_part(name, split, folder)
            return _parallel(*_two(languages, _pair(options) or default, folder))
    texts = [path for path in files if path.name.endswith(_PLAIN)]
    if len(texts) == 1:
        pairs = open_file(texts[0], options)
        cut = round((1 - _TEST_SHARE) * len(pairs))
        return pairs[:cut] if split == "train" else pairs[cut:]
    raise BadInputError(
        f"data folder {folder} must hold {split}.jsonl, {split}.txt, or two files such as "
        f"{split}.en and {split}.de; none found; if it holds the other split, give --split"
    )


def _pair(options: Options) -> Languages | None:
    """Return the languages given by the user."""
    pair = options.take("pair")
    names = pair.split(",") if isinstance(pair, str) else pair
    if names is None:
        return None
    if len(names) != 2 or len(set(names)) != 2:
        raise BadInputError(f"pair must name two languages, such as en,de, got {pair!r}")
    return names[0].strip(), names[1].strip()


def _language(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2]


def _two(languages: Mapping[str, Path], pair: Languages | None, folder: Path) -> list[Path]:
    names = pair or tuple(sorted(languages))
    if len(names) != 2 or not set(names) <= set(languages):
        raise BadInputError(
            f"data folder {folder} must hold two languages, or pair= must name two of "
            f"{', '.join(sorted(languages))}; got {', '.join(names)}"
        )
    if pair is None:
        _say_order(names, folder)
    return [languages[name] for name in names]


def _say_order(names: tuple[str, ...], where: object) -> None:
    source, target = names
    note(
        f"{where} is read as {source} to {target}; for the other direction add --read "
        f"pair={target},{source}"
    )


def _parallel(source: Path, target: Path) -> Pairs:
    left, right = _lines(source), _lines(target)
    for longer, shorter in ((left, right), (right, left)):
        while len(longer) > len(shorter) and not longer[-1]:
            longer.pop()  # blank lines at the end
    if len(left) != len(right):
        raise BadInputError(
            f"parallel files must have the same number of lines, got {len(left)} in "
            f"{source.name} and {len(right)} in {target.name}"
        )
    alone = sum(bool(a) != bool(b) for a, b in zip(left, right, strict=True))
    if alone:
        note(f"ignored {alone} lines that are empty in only one of {source.name} and {target.name}")
    return [(a, b) for a, b in zip(left, right, strict=True) if a and b]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in lines_of(read_text(path))]


def open_file(path: Path, options: Options) -> Pairs:
    """Return the pairs of a file: JSON records, or plain text with one sample per paragraph.

    Args:
        path: Path of the file.
        options: ``pair``, the languages of translations.

    Raises:
        BadInputError: If it cannot be read, or a record has no answer.
        UnsupportedError: If it is a table.
    """
    if path.name.endswith(_RECORDS):
        return _of_records(_records(path), path.name, options)
    if path.name.lower().endswith(_TABLES):
        raise UnsupportedError(
            f"{path.name} is a table, which is not supported; give its rows as JSON lines, for "
            "example with instruction and output, prompt and completion, or a translation"
        )
    text = read_text(path).replace("\r\n", "\n")
    parts = (part.strip() for part in _PARAGRAPH.split(text))
    return [("", part) for part in parts if part]


def _records(path: Path) -> Iterator[Any]:
    """Yield the records of a JSON list, or of JSON lines."""
    text = read_text(path)
    lines = [text] if text.lstrip().startswith("[") else lines_of(text)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = parse_json(line, path if len(lines) == 1 else f"line {number} of {path}")
        yield from found if isinstance(found, list) and len(lines) == 1 else [found]


def _of_records(records: Iterable[Any], where: object, options: Options) -> Pairs:
    """Return prompt and answer of each record that has both.

    Supported are Alpaca's (``instruction``, ``input``, ``output``), ``prompt`` with ``completion``,
    ``response`` or ``answer``, a ``translation``, and ``text`` alone; and any two fields named by
    ``pair``.

    Raises:
        BadInputError: If a record is none of these.
    """
    pairs, skipped, languages = [], 0, _pair(options) if options.given("pair") else None
    for number, record in enumerate(records, 1):
        here = f"{where}, record {number}"
        if not isinstance(record, Mapping):
            raise BadInputError(f"{here} must be an object, got {type(record).__name__}")
        translation = record.get("translation")
        if languages is None and isinstance(translation, Mapping):
            languages = _own_languages(translation, where, here)
        if languages is not None:
            table = translation if isinstance(translation, Mapping) else record
            prompt, answer = _translated(table, languages, here)
            missing = not (prompt and answer)
        else:
            prompt, answer = _instructed(record, here)
            missing = not answer
        skipped += missing
        if not missing:
            pairs.append((prompt, answer))
    if skipped:
        note(f"skipped {skipped} records of {where} with an empty answer")
    return pairs


def _own_languages(translation: Mapping[str, Any], where: object, here: str) -> Languages:
    """Return the languages of a translation in their order there, used for all records."""
    if len(translation) != 2:
        raise BadInputError(
            f"{here} must have two languages, or pair= must name two of {', '.join(translation)} "
            f"(--read pair=...)"
        )
    source, target = translation
    _say_order((source, target), where)
    return source, target


def _translated(table: Mapping[str, Any], languages: Languages, here: str) -> tuple[str, str]:
    if not set(languages) <= set(table):
        raise BadInputError(
            f"{here} must have {' and '.join(languages)} (pair={','.join(languages)}), got "
            f"{', '.join(map(str, table)) or 'nothing'}"
        )
    source, target = (_text(table, name, here) for name in languages)
    return source, target


def _instructed(record: Mapping[str, Any], here: str) -> tuple[str, str]:
    name = next((name for name in _ANSWERS if name in record), None)
    if name is None:
        raise BadInputError(
            f"{here} must have instruction and output, prompt and answer, a translation, or text, "
            f"got the fields {', '.join(map(str, sorted(record))) or '(none)'}"
        )
    asked = [_text(record, field, here) for field in _PROMPTS if field in record]
    return "\n".join(part for part in asked if part), _text(record, name, here)


def _text(record: Mapping[str, Any], name: str, here: str) -> str:
    """Return a field as text; empty if null or blank."""
    value = record[name]
    if value is not None and not isinstance(value, str):
        raise BadInputError(f"{here} must have text as {name}, got {type(value).__name__}")
    return value if value and value.strip() else ""


def open_dataset(where: str | Path, split: str, options: Options) -> Pairs:
    """Return the pairs of a data set of the ``datasets`` library, saved to disk or by hub id.

    Args:
        where: Its folder or id.
        split: ``"train"`` or ``"test"``.
        options: ``pair``, the languages of translations.

    Raises:
        BadInputError: If it cannot be read, or contains no text.
        UnsupportedError: If the library is not installed.
    """
    rows = open_part(where, split)
    with reading(where):
        return _of_records(rows, where, options)
