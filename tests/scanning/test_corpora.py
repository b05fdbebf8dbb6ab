"""The recipe that counts over corpora tells what is named, missed, run and hung."""

from __future__ import annotations

import csv
import os
import pickle
import runpy
import sys
from pathlib import Path

from hostile import Calls

RECIPE = Path(__file__).parents[2] / "recipes" / "scan_corpora.py"


def test_files_are_counted(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "evil.pkl").write_bytes(pickle.dumps(Calls(os.mkdir, str(tmp_path / "sentinel"))))
    (corpus / "safe_list.pkl").write_bytes(pickle.dumps([1, 2]))
    out = tmp_path / "out"
    given = [
        f"mine={corpus}@0123456789",
        "--harmless",
        "safe_*",
        "--beside",
        "grep=grep -q mkdir {}",
    ]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *given, "-o", str(out)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    said = capsys.readouterr().out
    assert "| mine 0123456, malicious | 1 | 1 | 0 | 0 | 1 | 0 | 0 | 0 | 0 |" in said
    assert "| mine 0123456, harmless | 1 | 0 | 0 | 1 |" in said
    rows = list(csv.DictReader((out / "corpora.csv").open()))
    assert [(row["file"], row["outcome"], row["grep"]) for row in rows] == [
        ("evil.pkl", "high", "missed"), ("safe_list.pkl", "none", "named"),
    ]  # fmt: skip
    assert not (tmp_path / "sentinel").exists()


def test_what_runs_and_hangs_is_told(tmp_path):
    recipe = runpy.run_path(str(RECIPE))
    names = recipe["looked_at"].__globals__

    def runs(path, pipe):
        os.write(pipe, b'{"executed": "os.mkdir"}\n')
        os._exit(3)

    names["look"] = runs
    assert recipe["looked_at"](tmp_path)["executed"] == ["os.mkdir"]
    assert recipe["looked_at"](tmp_path)["outcome"] == "crashed"
    names["look"] = lambda path, pipe: names["time"].sleep(60)
    names["SECONDS"] = 0.2
    assert recipe["looked_at"](tmp_path)["outcome"] == "hung"
