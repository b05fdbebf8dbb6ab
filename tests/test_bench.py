"""The benchmark runs, as a user runs it, and the two sides of each row agree."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmdefense.metrics.backdoor import Rates

BENCH = Path(__file__).parents[1] / "recipes" / "bench.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the folder that a small run writes."""
    out = tmp_path_factory.mktemp("bench") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(BENCH), "--smoke", "--device", "cpu", "-o", str(out)])
        runpy.run_path(str(BENCH), run_name="__main__")
    return out


@pytest.fixture(scope="module")
def rows(written):
    return json.loads((written / "bench.json").read_text())["rows"]


def test_both_sides_of_each_row_agree(rows):
    curve, ranking, *steps, _ = (row["check"] for row in rows)
    assert curve == "equal at 20 of 20 points"
    assert ranking.startswith("bit-identical")
    assert len(steps) == 3
    assert float(steps[0].split()[0]) == 0
    for check in steps[1:]:
        assert float(check.split()[0]) < 1e-5


def test_each_row_has_one_ratio_a_repetition(rows):
    for row in rows[:-1]:
        assert len(row["ratios"]) == 1
        assert min(row["ratios"]) > 0


@pytest.mark.parametrize(
    ("asr", "found"), [(0.5, (None, "never, 40 steps: ACC 90.0%, ASR 50.0%")),
                       (0.05, (20, "20 steps: ACC 90.0%, ASR 5.0%"))]
)  # fmt: skip
def test_a_goal_that_is_not_reached_is_said(asr, found):
    rates = Rates(acc=0.9, asr=asr, ra=0.5)
    victim = SimpleNamespace(before=rates, adapter=None, clean=None, after=lambda _: rates)
    purified = SimpleNamespace(adapter=None)
    defense = SimpleNamespace(purify=lambda *_: purified)
    assert runpy.run_path(str(BENCH))["first_success"](lambda steps: defense, victim, (20, 40)) == (
        found
    )


def test_the_table_shows_every_row_and_the_machine(written, rows):
    table = (written / "bench.md").read_text()
    assert "threads" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1


def test_an_aim_is_met_by_the_median():
    row = runpy.run_path(str(BENCH))["Row"]
    slow = row(what="w", model="m", aim=">= 25", ratios=[10.0, 26.0, 30.0], check="")
    assert slow.cells()[2:5] == ["26.00 (10.00 to 30.00)", ">= 25", "yes"]
    dear = row(what="w", model="m", aim="<= 2", ratios=[1.0, 2.5, 3.0], check="")
    assert dear.cells()[4] == "no"


def test_memory_of_one_side_is_printed_for_the_process_that_asks(monkeypatch, capsys):
    asked = ["--smoke", "--device", "cpu", "--memory-of", "defense", "FIP step, Tr(F) in each"]
    monkeypatch.setattr(sys, "argv", [str(BENCH), *asked])
    runpy.run_path(str(BENCH), run_name="__main__")
    assert int(capsys.readouterr().out) >= 0
