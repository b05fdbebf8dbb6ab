"""Every recipe runs, as a user runs it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from mmdefense import registry

FOLDER = Path(__file__).parents[1] / "recipes"
EVIDENCE = {"cross_domain_evaluation": "index.sqlite"}  # a page is what the others leave
# In test_bench.py, evaluation/test_peak.py, scanning/test_calibration.py and test_results.py.
ELSEWHERE = {"bench.py", "memory.py", "scan_calibration.py", "scan_corpora.py", "results.py"}
RECIPES = sorted(path for path in FOLDER.glob("*.py") if path.name not in ELSEWHERE)
ANALYSES = sorted((FOLDER / "analyses").glob("*.py"))
# Two of the tasks that it puts to all: each has a recipe of its own besides.
TWO = ("--task", "image-classification", "--task", "point-cloud-classification")
BRIEF = {"cross_domain_evaluation": TWO}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_and_shows_its_table(recipe, monkeypatch, capsys, tmp_path):
    arguments = ["--smoke", "--out", str(tmp_path / "out"), *BRIEF.get(recipe.stem, ())]
    monkeypatch.setattr(sys, "argv", [str(recipe), *arguments])
    runpy.run_path(str(recipe), run_name="__main__")
    said = capsys.readouterr().out
    assert any(metric in said for metric in ("ACC", "BLEU", "mAP@50", "task metric"))
    for word in ("ASR", "before", "baseline"):
        assert word in said
    assert list((tmp_path / "out").glob(EVIDENCE.get(recipe.stem, "*/report.html")))


@pytest.mark.slow
def test_one_table_is_of_all_tasks(monkeypatch, capsys, tmp_path):
    recipe = FOLDER / "cross_domain_evaluation.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), "--smoke", "--out", str(tmp_path)])
    runpy.run_path(str(recipe), run_name="__main__")
    said = capsys.readouterr().out
    for name in registry.names("tasks"):
        assert registry.load("tasks", name)().cases()[0].name in said


@pytest.mark.parametrize("recipe", ANALYSES, ids=lambda path: path.stem)
def test_analysis_runs_and_writes_its_page(recipe, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(recipe), "--smoke", "--out", str(tmp_path)])
    runpy.run_path(str(recipe), run_name="__main__")
    assert "page: " in capsys.readouterr().out
    assert "<svg" in (tmp_path / f"{recipe.stem}.html").read_text()


def test_the_protocol_stands_beside_published_figures(monkeypatch, capsys, tmp_path):
    recipe = FOLDER / "benchmarks" / "protocol.py"
    for command in ("table", "run"):
        arguments = [str(recipe), command, "--smoke", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(recipe), run_name="__main__")
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        measured = [row for row in rows[1:] if "not measured" not in row]
        found = {tuple(row.split(" | ")[1:3]) for row in measured}
        defenses = () if command == "table" else ("none", "fine-tuning", "ft-sam")
        assert found == {(attack, name) for attack in ("badnets", "blended") for name in defenses}


def test_there_is_a_recipe():
    assert RECIPES
    assert ANALYSES
