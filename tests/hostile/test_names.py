"""Names that steer a terminal, turn a line around or are no UTF-8, wherever they are shown."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from domains import DOMAINS
from pydantic_core import from_json

import mmdefense as mmd

NAMES = [
    pytest.param(b"a\x1b[2Jb.py", id="escape"),
    pytest.param("a\u202egnp.py".encode(), id="turned around"),
    pytest.param("a\u2066b.py".encode(), id="isolated"),
    pytest.param(b"a\xff\xfeb.py", id="no UTF-8"),
    pytest.param(b"a\nb.py", id="two lines"),
    pytest.param("a\u009bb.py".encode(), id="control of eight bits"),
]
FORBIDDEN = set("\x1b\u202e\u2066\x9b\r")

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="its names are always UTF-8")


def write(folder, name, content=b"import os\nos.system('id')\n"):
    folder.mkdir(exist_ok=True)
    with open(os.fsencode(folder) + b"/" + name, "wb") as file:
        file.write(content)


def steering(text):
    """Return what would steer a terminal; strict encoding fails on halves of surrogate pairs."""
    text.encode()
    return FORBIDDEN & set(text)


@pytest.mark.parametrize("form", ["text", "json", "sarif", "html"])
@pytest.mark.parametrize("name", NAMES)
def test_a_scan_shows_any_name_escaped(tmp_path, mmdefense, name, form):
    write(tmp_path / "m", name)
    outcome = mmdefense("scan", tmp_path / "m", "--format", form)
    assert outcome.code == 1
    assert not steering(outcome.out + outcome.err)
    if form in {"json", "sarif"}:
        from_json(outcome.out)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_shows_any_name_escaped(tmp_path, mmdefense, name):
    write(tmp_path / "m", name)
    (tmp_path / "m" / "config.json").write_text("{}")
    outcome = mmdefense("evaluate", tmp_path / "m", "--data", tmp_path)
    assert outcome.code == 2
    assert not steering(outcome.err)
    assert outcome.err.count("\n") == 1
    assert not steering(repr(mmd.scan(tmp_path / "m", progress=None)))


def test_halves_of_surrogate_pairs_in_json_are_shown_escaped(tmp_path, mmdefense):
    content = {"auto_map": {"a\ud800": "x\udc80--m.Model"}, "_target_": "os.\udcff"}
    write(tmp_path / "m", b"config.json", json.dumps(content).encode())
    outcome = mmdefense("scan", tmp_path / "m", "--format", "json")
    assert outcome.code == 1
    from_json(outcome.out)


def test_a_model_with_any_names_goes_in_and_comes_out(tmp_path, mmdefense):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DOMAINS["image"].model(tmp_path / "model")
    DOMAINS["image"].data(tmp_path / "data")
    for name in (b"\xff\xfe.txt", "a\u202egnp.json".encode(), b"\x1b[2J.json"):
        write(tmp_path / "model", name, b"{}")
    out = tmp_path / "out"
    steps = ("--defense", "fine-tuning", "--set", "steps=2", "--set", "batch_size=4")
    more = ("--max-utility-drop", "1", "--accept-low-utility", "--evidence", "none")
    paths = (tmp_path / "model", "--data", tmp_path / "data", "-o", out)
    said = [
        mmdefense("purify", *paths, *steps, *more),
        mmdefense("report", out),
        mmdefense("report", out, out, "-o", tmp_path / "page.html"),
    ]
    for outcome in said:
        assert outcome.code == 0, outcome.err
        assert not steering((outcome.out + outcome.err).replace("\r", ""))
    for page in (out / "report.html", tmp_path / "page.html"):
        assert not steering(page.read_text(encoding="utf-8"))
