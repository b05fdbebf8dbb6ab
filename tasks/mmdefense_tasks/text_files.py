"""Text in files: parallel sentences, instructions with their answers, and plain text."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line
from mmdefense.libraries import needed
from mmdefense_tasks.parts import PARTS, chosen_part, tell_part

__all__ = ["Pairs", "open_dataset", "open_file", "open_folder"]

Pairs = list[tuple[str, str]]
"""Prompts with their answers; the prompt of plain text is empty."""

_PLAIN, _RECORDS = (".txt", ".txt.gz"), (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_PARAGRAPH = re.compile(r"\n\s*\n")
_TEST_SHARE = 0.1  # of a text that is not split: its end, as is usual for Shakespeare


def open_folder(folder: Path, split: str, pair: tuple[str, str] | None = None) -> Pairs:
    """Return what a folder holds: two parallel files, or one file, for each part.

    Args:
        folder: With ``train.en`` and ``train.de``, ``train.jsonl`` or ``train.txt`` and their like
            for the test part, gzipped or not; or with one ``.txt`` file, which is split here.
        split: ``"train"`` or ``"test"``.
        pair: Endings of the source and the target language, where there are more than two, or
            they are not to be taken in alphabetical order.

    Raises:
        BadInputError: If there is no such file, or it is damaged.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for name in PARTS[split]:
        mine = [path for path in files if re.match(rf"{name}[._]", path.name)]
        single = [path for path in mine if path.name.endswith((*_PLAIN, *_RECORDS))]
        if single:
            tell_part(name, split, folder)
            return open_file(single[0])
        languages = {_language(path): path for path in reversed(mine)}
        if len(languages) > 1:
            tell_part(name, split, folder)
            return _parallel(*_two(languages, pair, folder))
    texts = [path for path in files if path.name.endswith(_PLAIN)]
    if len(texts) == 1:
        pairs = open_file(texts[0])
        cut = round((1 - _TEST_SHARE) * len(pairs))
        return pairs[:cut] if split == "train" else pairs[cut:]
    raise BadInputError(
        f"data folder {folder} must hold {split}.jsonl, {split}.txt, or two files such as "
        f"{split}.en and {split}.de; none found; if it holds another part, name that (--split)"
    )


def _language(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2]


def _two(languages: Mapping[str, Path], pair: tuple[str, str] | None, folder: Path) -> list[Path]:
    names = pair or tuple(sorted(languages))
    if len(names) != 2 or not set(names) <= set(languages):
        raise BadInputError(
            f"data folder {folder} must hold two languages, or pair= must name two of "
            f"{', '.join(sorted(languages))}; got {', '.join(names)}"
        )
    return [languages[name] for name in names]


def _parallel(source: Path, target: Path) -> Pairs:
    left, right = _lines(source), _lines(target)
    if len(left) != len(right):
        raise BadInputError(
            f"parallel files must have one number of lines, got {len(left)} in {source.name} and "
            f"{len(right)} in {target.name}"
        )
    return [(a, b) for a, b in zip(left, right, strict=True) if a and b]


def open_file(path: Path) -> Pairs:
    """Return the pairs of a file: records of JSON, or plain text with a sample a paragraph.

    Raises:
        BadInputError: If it cannot be read, or a record has no answer.
    """
    if path.name.endswith(_RECORDS):
        return [record_pair(record, f"{path.name}, record {n}") for n, record in _records(path)]
    parts = (part.strip() for part in _PARAGRAPH.split(_read(path)))
    return [("", part) for part in parts if part]


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the records of a JSON list, or of one JSON value a line, counted from 1."""
    text = _read(path)
    try:
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, json.loads(line)
    except ValueError as error:
        raise BadInputError(f"{path} must be JSON: {one_line(error)}") from error


def record_pair(record: Any, where: str) -> tuple[str, str]:
    """Return prompt and answer of a record.

    Known are Alpaca's (``instruction``, ``input``, ``output``), ``prompt`` with ``completion``,
    ``response`` or ``answer``, a ``translation`` into one other language, and ``text`` alone.

    Raises:
        BadInputError: If it is none of these.
    """
    if isinstance(record, Mapping):
        translation = record.get("translation")
        if isinstance(translation, Mapping) and len(translation) == 2:
            source, target = translation.values()
            return str(source), str(target)
        asked = [record.get(name) for name in ("instruction", "prompt", "question", "input")]
        prompt = "\n".join(part for part in asked if isinstance(part, str) and part)
        answers = ("output", "completion", "response", "answer", "text")
        answer = next((record[name] for name in answers if isinstance(record.get(name), str)), "")
        if answer:
            return prompt, answer
    raise BadInputError(
        f"{where} must have instruction and output, prompt and answer, a translation, or text, got "
        f"{sorted(record) if isinstance(record, Mapping) else type(record).__name__}"
    )


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _read(path).splitlines()]


def _read(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInputError(f"text {path} cannot be read: {one_line(error)}") from error


def open_dataset(where: str | Path, split: str) -> Pairs:
    """Return the pairs of a data set of the ``datasets`` library, saved to disk or by hub id.

    Raises:
        BadInputError: If it cannot be read, or holds no text.
        UnsupportedError: If the library is not installed.
    """
    with needed(f"data set {where}"):
        import datasets
    try:
        found = datasets.load_from_disk(str(where)) if Path(where).is_dir() else None
        found = datasets.load_dataset(str(where)) if found is None else found
    except Exception as error:  # the library raises many kinds
        raise BadInputError(f"data set {where} cannot be read: {one_line(error)}") from error
    if isinstance(found, Mapping):
        name = chosen_part(list(found), split, where)
        if name is None:
            raise BadInputError(
                f"data set {where} must have a part {split!r}; it has {', '.join(sorted(found))}"
            )
        found = found[name]
    return [record_pair(record, f"{where}, record {n}") for n, record in enumerate(found, 1)]
