r"""Scan folders of malicious files, one by one, and count what is named, missed, run or hung.

    python recipes/scan_corpora.py picklescan=FOLDER@COMMIT fickling=FOLDER@COMMIT -o out/corpora \
        --harmless 'benign*' --harmless 'safe_*' \
        --beside 'picklescan=picklescan -p {}' --beside 'fickling=fickling --check-safety {}'

What it shows: for each corpus, how many of its files the scan names and how strongly, how many it
misses, how many the loader refuses, and how many hang, crash or run anything. A file is malicious
unless its name fits a pattern of `--harmless`: which those are, the tests of a corpus say. Each
file is looked at in a process of its own, which reports to this one whatever would be a call of a
payload: processes started, connections, names looked up by an unpickler, code made from text. No
file is ever loaded by anything that runs it. `--beside` runs another scanner on the same files: its
exit code is 0 where it finds nothing, and 1 where it finds something.

Measured: see "Against the files of other scanners" in docs/howto/scan_a_model.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.weights import read_state
from mmdefense.errors import MMDefenseError
from mmdefense.findings import worst_level
from mmdefense.scanning.files import scan_files

SECONDS = 30
"""What takes longer has hung."""
CALLS = frozenset({
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request", "pickle.find_class", "os.mkdir"),
    *("webbrowser.open", "shutil.rmtree", "compile.text"),
})  # fmt: skip
"""Audit events that a payload would raise, and looking at a file does not."""
MAKERS = {"dataclasses.py", "collections"}
"""Of the standard library, what makes code from text of its own when a module is imported."""
COLUMNS = ("files", "high", "medium or low", "missed", "refused", "executed", "hung", "crashed")


@dataclass(frozen=True)
class Corpus:
    """A folder of files.

    Attributes:
        name: For the table.
        folder: Where they are.
        commit: Which version they are.
    """

    name: str
    folder: Path
    commit: str

    @classmethod
    def of(cls, text: str) -> Corpus:
        """Return the corpus that ``name=folder@commit`` names."""
        name, _, where = text.partition("=")
        folder, _, commit = where.partition("@")
        return cls(name, Path(folder), commit)

    def files(self) -> list[Path]:
        """Return its files."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@dataclass
class Row:
    """What was seen of one file.

    Attributes:
        corpus: Its corpus.
        file: Its name there.
        malicious: Whether it is.
        outcome: The level of the strongest finding, "none", "hung" or "crashed".
        refused: Whether the loader refused it.
        executed: What it would have run.
        others: What the other scanners said: "named", "missed" or "no answer".
    """

    corpus: str
    file: str
    malicious: bool
    outcome: str
    refused: bool
    executed: Sequence[str]
    others: Mapping[str, str] = field(default_factory=dict)

    def counts(self) -> Counter[str]:
        """Return the columns that it is counted in."""
        columns = {
            "files": True,
            "high": self.outcome == "high",
            "medium or low": self.outcome in {"medium", "low"},
            "missed": self.outcome in {"none", "info"},
            "refused": self.refused,
            "executed": bool(self.executed),
            "hung": self.outcome == "hung",
            "crashed": self.outcome == "crashed",
        }
        return Counter(name for name, holds in columns.items() if holds)


def look(path: Path, pipe: int) -> None:
    """Scan and read a file, and write what comes of it to a pipe; in a process of its own."""

    def told(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile" and arguments[0] is not None and arguments[1] == "<string>":
            caller = Path(sys._getframe(1).f_code.co_filename)
            if not {caller.name, caller.parent.name} & MAKERS:
                event = "compile.text"
        if event in CALLS:
            os.write(pipe, (json.dumps({"executed": event}) + "\n").encode())

    sys.addaudithook(told)
    level = worst_level(scan_files(path)) or "none"
    os.write(pipe, (json.dumps({"outcome": level}) + "\n").encode())
    try:
        read_state(path)
    except MMDefenseError:
        os.write(pipe, (json.dumps({"refused": True}) + "\n").encode())


def looked_at(path: Path) -> dict[str, Any]:
    """Return what comes of looking at a file: an outcome, whether it is refused, what ran."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        with suppress(Exception):
            look(path, writing)
            os._exit(0)
        os._exit(1)
    os.close(writing)
    said, hung = _heard(reading, time.monotonic() + SECONDS)
    if hung:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found: dict[str, Any] = {"outcome": "crashed", "refused": False, "executed": []}
    for line in said.splitlines():
        message = json.loads(line)
        found["executed"] += [message.pop("executed")] if "executed" in message else []
        found |= message
    if hung or status:
        found["outcome"] = "hung" if hung else "crashed"
    return found


def _heard(pipe: int, until: float) -> tuple[bytes, bool]:
    """Return what was written to a pipe before it was closed, and whether that took too long."""
    said = b""
    with selectors.DefaultSelector() as selector, os.fdopen(pipe, "rb", 0) as file:
        selector.register(file, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if selector.select(left):
                chunk = file.read(1 << 16)
                if not chunk:
                    return said, False
                said += chunk
    return said, True


def beside(command: str, path: Path) -> str:
    """Return what another scanner says of a file."""
    arguments = [part.replace("{}", str(path)) for part in shlex.split(command)]
    try:
        done = subprocess.run(arguments, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "no answer"
    if b"Traceback (most recent call last)" in done.stderr:
        return "no answer"
    return {0: "missed", 1: "named"}.get(done.returncode, "no answer")


def measured(corpus: Corpus, harmless: Sequence[str], others: Mapping[str, str]) -> list[Row]:
    """Return a row for each file of a corpus."""
    rows = []
    for path in corpus.files():
        name = path.relative_to(corpus.folder).as_posix()
        malicious = not any(fnmatch(name, one) or fnmatch(path.name, one) for one in harmless)
        said = {other: beside(command, path) for other, command in others.items()}
        row = Row(corpus.name, name, malicious, others=said, **looked_at(path))
        rows.append(row)
        print(f"{row.corpus} {name}: {row.outcome} {said}", file=sys.stderr, flush=True)
    return rows


def table(corpora: Sequence[Corpus], rows: Sequence[Row], others: Sequence[str]) -> str:
    """Return a table in Markdown: a line for the malicious and the harmless files of a corpus."""
    lines = [
        "| corpus | " + " | ".join((*COLUMNS, *(f"{other} names" for other in others))) + " |",
        "|---|" + "--:|" * (len(COLUMNS) + len(others)),
    ]
    for corpus in corpora:
        for malicious in (True, False):
            chosen = [r for r in rows if r.corpus == corpus.name and r.malicious == malicious]
            if not chosen:
                continue
            counts = sum((row.counts() for row in chosen), Counter[str]())
            named = Counter(
                o for row in chosen for o, said in row.others.items() if said == "named"
            )
            kind = "malicious" if malicious else "harmless"
            cells = [counts[name] for name in COLUMNS] + [named[other] for other in others]
            name = f"{corpus.name} {corpus.commit[:7]}, {kind}"
            lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(path: Path, rows: Sequence[Row], others: Sequence[str]) -> None:
    """Write a line of CSV for each file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["corpus", "file", "malicious", "outcome", "refused", "executed", *others])
        for row in rows:
            said = [row.others[other] for other in others]
            ran = " ".join(row.executed)
            writer.writerow(
                [row.corpus, row.file, row.malicious, row.outcome, row.refused, ran, *said]
            )


def main() -> None:
    """Read the command line, measure, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("corpora", nargs="+", type=Corpus.of, metavar="NAME=FOLDER[@COMMIT]")
    parser.add_argument("--harmless", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=COMMAND {}")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/corpora"))
    options = parser.parse_args()
    others = dict(text.split("=", 1) for text in options.beside)
    rows = [row for one in options.corpora for row in measured(one, options.harmless, others)]
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "corpora.csv", rows, list(others))
    text = table(options.corpora, rows, list(others))
    (options.out / "corpora.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
