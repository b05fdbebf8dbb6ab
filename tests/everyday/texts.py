"""Text as it stands in files: ends of lines, marks, empty fields, and the order of languages."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from everyday.rows import Refused, Row

from mmdefense.notes import Note
from mmdefense_tasks.language_generation import load_text

ENGLISH = ["one", "two\u2028lines", "three\x0cfeeds", "four\x85", "five"]
GERMAN = ["eins", "zwei", "drei", "vier", "f\u00fcnf"]
RECORDS = [{"de": de, "en": en} for de, en in zip(GERMAN, ENGLISH, strict=True)]


def pairs(where, **options) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        found = load_text(where, **options)
    return list(zip(found.prompts, found.answers, strict=True))


def notes(where, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_text(where, **options)
    return [str(w.message) for w in caught if w.category is Note]


def written(folder: Path, name: str, text: str, encoding="utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def parallel(folder: Path, english=ENGLISH, german=GERMAN, end="\n", **encoding) -> Path:
    written(folder, "train.en", "".join(f"{line}{end}" for line in english), **encoding)
    written(folder, "train.de", "".join(f"{line}{end}" for line in german), **encoding)
    return folder


def records(folder: Path, *rows) -> Path:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return written(folder, "train.jsonl", text)


def translations(folder: Path, rows=RECORDS) -> Path:
    return records(folder, *({"translation": row} for row in rows))


def saved(folder: Path) -> Path:
    import datasets

    rows = [{"translation": row} for row in RECORDS]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "set")
    return folder / "set"


def trailing(folder: Path, empty: str) -> list:
    """One file ends in blank lines, and in the other a last line is empty."""
    written(folder, "train.en", "a\nb\n\n\n")
    written(folder, "train.de", f"c\nd\n{empty}")
    return pairs(folder, pair="en,de")


TURNED = list(zip([line.strip() for line in ENGLISH], GERMAN, strict=True))
ALPACA = {"instruction": "say", "input": "", "output": "yes"}
EMPTY = [ALPACA, ALPACA | {"output": ""}, ALPACA | {"output": None, "text": "say: "}, ALPACA]
ROWS = [
    Row("parallel lines that hold U+2028, U+0085 and a form feed",
        lambda f: pairs(parallel(f), pair="en,de"), TURNED),
    Row("parallel lines that end in CR LF, with a byte order mark",
        lambda f: pairs(parallel(f, end="\r\n", encoding="utf-8-sig"), pair="en,de"), TURNED),
    Row("parallel files in UTF-16", lambda f: pairs(parallel(f, encoding="utf-16")),
        Refused("train.* cannot be read: it is in UTF-16; save it as UTF-8")),
    Row("parallel files, one with blank lines at its end", lambda f: trailing(f, ""),
        [("a", "c"), ("b", "d")]),
    Row("parallel files, one sentence without its other",
        lambda f: notes(parallel(f, english=["a", "b", "c"], german=["d", "", "e"]), pair="en,de"),
        ["ignored 1 lines that are empty in only one of train.en and train.de"]),
    Row("parallel files whose direction is a guess", lambda f: notes(parallel(f))[0][-60:],
        " read as de to en; for the other direction add --read pair=en,de"[-60:]),
    Row("translations with a pair",
        lambda f: pairs(translations(f, [{"de": "eins", "en": "one"}]), pair="en,de"),
        [("one", "eins")]),
    Row("translations with the languages in turns",
        lambda f: pairs(
            translations(f, [{"de": "eins", "en": "one"}, {"en": "two", "de": "zwei"}])),
        [("eins", "one"), ("zwei", "two")]),
    Row("translations into two languages with a pair",
        lambda f: pairs(translations(f, [{"de": "eins", "en": "one", "fr": "un"}]), pair="en,fr"),
        [("one", "un")]),
    Row("translations into two languages without a pair",
        lambda f: pairs(translations(f, [{"de": "eins", "en": "one", "fr": "un"}])),
        Refused("record 1 must have two languages, or pair= must name two of de, en, fr")),
    Row("a translation that lacks a language",
        lambda f: pairs(translations(f, [{"de": "eins", "en": "one"}, {"de": "zwei"}]),
                        pair="en,de"),
        Refused("record 2 must have en and de .*got de")),
    Row("a data set of the library with a pair", lambda f: pairs(saved(f), pair="en,de")[0],
        ("one", "eins")),
    Row("columns of languages", lambda f: pairs(records(f, RECORDS[0]), pair="en,de"),
        [("one", "eins")]),
    Row("a pair for plain text",
        lambda f: pairs(written(f, "train.txt", "a text"), pair="en,de"),
        Refused("pair=en,de has no effect")),
    Row("a pair for instructions", lambda f: pairs(records(f, ALPACA), pair="en,de"),
        Refused("record 1 must have en and de .*got instruction, input, output")),
    Row("one language twice", lambda f: pairs(parallel(f), pair="en,en"),
        Refused("pair must name two languages")),
    Row("json lines that hold U+2028 and U+0085",
        lambda f: pairs(records(f, {"prompt": "a\u2028b", "answer": "c\x85d"})),
        [("a\u2028b", "c\x85d")]),
    Row("json lines with a byte order mark",
        lambda f: pairs(written(f, "a.jsonl", '{"text": "a"}\r\n', "utf-8-sig")), [("", "a")]),
    Row("plain text with a byte order mark",
        lambda f: pairs(written(f, "a.txt", "one\r\n\r\ntwo", "utf-8-sig")),
        [("", "one"), ("", "two")]),
    Row("plain text whose lines end in CR LF",
        lambda f: pairs(written(f, "a.txt", "one\r\ntwo\r\n\r\nthree\r\n")),
        [("", "one\ntwo"), ("", "three")]),
    Row("a table, which is no plain text",
        lambda f: pairs(written(f, "a.csv", "en,de\none,eins\n")),
        Refused("a.csv is a table.*JSON lines", code=3)),
    Row("json nested without end", lambda f: pairs(written(f, "a.json", "[" * 100_000)),
        Refused("must be JSON")),
    Row("instructions without an answer", lambda f: pairs(records(f, *EMPTY)),
        [("say", "yes")] * 2),
    Row("a count of instructions without an answer", lambda f: notes(records(f, *EMPTY)),
        ["skipped 2 records of train.jsonl with an empty answer"]),
    Row("instructions without the field of the answer",
        lambda f: pairs(records(f, {"instruction": "a", "reply": "b"})),
        Refused("record 1 must have .* got the fields instruction, reply")),
    Row("an input that is no text",
        lambda f: pairs(records(f, ALPACA | {"input": ["a"]})),
        Refused("record 1 must have text as input, got list")),
    Row("json lines, one of them broken",
        lambda f: pairs(written(f, "a.jsonl", '{"text": "a"}\n{"text": ')),
        Refused("line 2 of .* must be JSON")),
]  # fmt: skip
