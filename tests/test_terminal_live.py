"""The commands as somebody sees them who sits at a terminal, here a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEARCHED = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])


def at_a_terminal(folder, *arguments):
    """Run a command whose standard error is a terminal; return its code, output and pieces seen.

    The pieces are ``(seconds, text)``, as they came.
    """
    ours, theirs = pty.openpty()
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "mmdefense", *map(str, arguments)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"PYTHONPATH": SEARCHED, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(theirs)
        pieces = []
        with suppress(OSError):  # so Linux says that the other end is closed
            while piece := os.read(ours, 1 << 16):
                pieces.append((time.monotonic() - begun, piece.decode(errors="replace")))
        out = process.stdout.read()
    os.close(ours)
    return process.returncode, out, pieces


def shown(pieces):
    return "".join(text for _, text in pieces)


def seconds_until(word, pieces):
    text = ""
    for seconds, piece in pieces:
        text += piece
        if word in text:
            return seconds
    raise AssertionError(f"{word!r} is not in {text!r}")


def test_a_terminal_shows_one_live_view_from_the_start(place):
    code, out, pieces = at_a_terminal(place.folder, *place.purify("--evidence", "none"))
    assert code == 0, shown(pieces)
    assert "wrote" in out
    assert seconds_until("loading PyTorch", pieces) < seconds_until("reading", pieces) / 2
    for stage in ("utility before", "fine-tune", "guard", "writing"):
        assert stage in shown(pieces)
    assert "4/4" in shown(pieces)
    assert "\x1b[?25h" in shown(pieces), "the cursor is hidden for good"


def test_quiet_shows_nothing_on_a_terminal(place):
    code, out, pieces = at_a_terminal(place.folder, *place.purify("--evidence", "none", "-q"))
    assert (code, shown(pieces)) == (0, "")
    assert "wrote" in out


def test_evaluate_shows_its_stages(place):
    arguments = ("evaluate", place.model, "--data", place.data, "--arch", "commands:Net")
    code, out, pieces = at_a_terminal(place.folder, *arguments, "--format", "json")
    assert code == 0, shown(pieces)
    assert out.startswith("[")
    for stage in ("loading PyTorch", "reading", "measuring"):
        assert stage in shown(pieces)


def test_an_error_stands_on_a_line_of_its_own(place):
    code, _, pieces = at_a_terminal(place.folder, *place.purify(defense="none-such"))
    assert code == 2
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown(pieces)).replace("\r", "\n").split("\n")
    assert any(line.startswith("mmdefense: unknown defense 'none-such'") for line in lines)
