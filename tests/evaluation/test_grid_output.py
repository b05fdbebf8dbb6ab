"""What a grid shows: tables, leaderboard, commands, and the specs that they read."""

from __future__ import annotations

import csv
import json

import pandas
import pytest
from quick import CASE

from mmdefense import registry
from mmdefense.errors import BadInputError
from mmdefense.evaluation.cases import all_cases, named_cases
from mmdefense.evaluation.export import rows_of
from mmdefense.evaluation.grid import Cell, cell_of
from mmdefense.evaluation.spec import read_spec
from mmdefense.evaluation.tables import markdown
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.leaderboard import leaderboard
from mmdefense.report.record import Row
from mmdefense.store import Identity, Store

ROWS = ["quick", "fine-tuning like quick", "ft-sam like quick"]


def cell(defense, seed, der, baseline="", violated=False, instead=""):
    before = Rates(acc=0.98, asr=1.0, ra=0.0)
    after = Rates(acc=0.97, asr=0.02 * seed, ra=0.9, der=der)
    row = Row(
        defense=defense,
        victim="digits",
        before=before,
        after=after,
        seconds=3.0,
        baseline=baseline,
        violated=violated,
        instead=instead,
    )
    return Cell(seed=seed, row=row, case={}, versions={})


def test_the_table_gives_mean_spread_and_who_beats_whom():
    cells = [cell("fip", seed, 0.99, "plain", violated=seed == 1) for seed in (0, 1)]
    cells += [cell("plain", seed, 0.95 + 0.02 * seed, instead="step 75") for seed in (0, 1)]
    cells += [cell("weak", seed, 0.5, "plain") for seed in (0, 1)]
    table = markdown(cells)
    rows = table.splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert (
        rows[2]
        == "| digits | *before* | 98.0 ± 0.0 | 100.0 ± 0.0 | 0.0 ± 0.0 | \N{EN DASH} |  |  |"
    )
    assert rows[3] == (
        "| digits | fip | 97.0 ± 0.0 | 1.0 ± 1.4 | 90.0 ± 0.0 | 99.0 ± 0.0 | 3.0 | "
        "yes; guard violated in 1 of 2 |"
    )
    assert rows[4].endswith("| 96.0 ± 1.4 | 3.0 | another state than the final one in 2 of 2 |")
    assert rows[5].endswith("| 3.0 | no |")


def test_the_standing_cases_have_names_of_their_own():
    tasks = [registry.load("tasks", name)() for name in registry.names("tasks")]
    assert len(all_cases()) == sum(len(task.cases()) for task in tasks)
    assert named_cases(["digits-clean"])[0].attack is None
    with pytest.raises(BadInputError, match="unknown case 'digits'; choose from digits-badnets"):
        named_cases(["digits"])


def test_the_command_prints_markdown(grid, tmp_path, mmdefense, monkeypatch):
    monkeypatch.setattr("mmdefense.evaluation.cases.all_cases", lambda: {CASE.name: CASE})
    outcome = mmdefense("grid", "run", "-o", tmp_path, "--defense", "quick", "--seeds", "1")
    assert outcome.code == 0
    assert outcome.out.startswith("| victim | defense | ACC |")
    assert "fine-tuning like quick" in outcome.out
    alone = mmdefense(
        "grid", "run", "-o", tmp_path, "--defense", "quick", "--seeds", "1", "--no-baselines"
    )
    assert "fine-tuning like quick" not in alone.out


def test_options_describe_cases_defenses_and_clean_data(plug, tmp_path, mmdefense, monkeypatch):
    plug("defenses", quick="quick:Quick")
    monkeypatch.setattr("mmdefense.evaluation.cases.all_cases", lambda: {CASE.name: CASE})
    outcome = mmdefense(
        *("grid", "run", "-o", tmp_path, "--seeds", "1", "--no-baselines"),
        *("--case", "quick,ratio=0.2,attack=blended", "--clean", "0.1:noisy", "--clean", "0.1"),
        *("--defense", "quick,steps=2,lr=0.01"),
    )
    assert outcome.code == 0
    cells = [cell_of(Store(tmp_path), entry) for entry in Store(tmp_path).entries("cell")]
    assert [cell.kind for cell in cells] == ["noisy", "seen"]
    assert cells[0].case["attack"] == "blended"
    assert cells[0].case["settings"] == {"ratio": 0.2}
    assert (cells[0].row.settings["steps"], cells[0].row.settings["lr"]) == (2, 0.01)
    bad = mmdefense("grid", "run", "-o", tmp_path, "--clean", "0.1:old")
    assert bad.code == 2


def test_the_commands_show_export_check_and_clean_a_store(grid, tmp_path, mmdefense, monkeypatch):
    monkeypatch.setattr("mmdefense.evaluation.cases.all_cases", lambda: {CASE.name: CASE})
    assert mmdefense("grid", "status", "-o", tmp_path / "none").code == 2
    run = ["grid", "run", "-o", tmp_path, "--defense", "quick", "--seeds", "1"]
    assert mmdefense(*run).code == 0
    assert mmdefense("grid", "status", "-o", tmp_path).out.startswith("3 done, 0 failed")
    with Store(tmp_path).claim(Identity("victim", "another", {})):
        assert "1 victim in training" in mmdefense("grid", "status", "-o", tmp_path).out
    rows = list(csv.DictReader(mmdefense("grid", "export", "-o", tmp_path).out.splitlines()))
    assert [row["defense"] for row in rows] == ROWS
    assert (tmp_path / rows[0]["record"]).is_file()
    held = json.loads(mmdefense("grid", "export", "-o", tmp_path, "--format", "json").out)
    assert held[0]["asr_before"] == float(rows[0]["asr_before"])
    latex = mmdefense("grid", "export", "-o", tmp_path, "--format", "latex").out
    assert latex.startswith(r"\begin{tabular}")
    table = tmp_path / "cells.parquet"
    mmdefense("grid", "export", "-o", tmp_path, "--format", "parquet", "--to", table)
    assert len(pandas.read_parquet(table)) == 3
    digest = rows[0]["digest"]
    assert digest[:12] in mmdefense("store", "ls", tmp_path).out
    shown = json.loads(mmdefense("store", "show", tmp_path, digest[:12]).out)
    assert shown["content"]["row"]["defense"] == "quick"
    assert mmdefense("store", "verify", tmp_path).code == 0
    (tmp_path / rows[0]["record"]).write_text("{}")
    broken = mmdefense("store", "verify", tmp_path)
    assert broken.code == 1
    assert "is damaged" in broken.out
    assert mmdefense("store", "rm", tmp_path, digest).code == 0
    assert mmdefense("store", "verify", tmp_path).code == 0
    assert mmdefense("store", "gc", tmp_path).out.startswith("removed 0 files")  # it is young
    assert mmdefense(*run).code == 0
    assert mmdefense("store", "verify", tmp_path).code == 0


def test_the_leaderboard_holds_every_cell_and_no_foreign_markup(grid, tmp_path):
    grid.run(tmp_path)
    rows = [{**row, "case": "</script><b>"} for row in rows_of(Store(tmp_path))]
    html = leaderboard(rows)
    assert "</script><b>" not in html
    data = html.partition('id="data">')[2].partition("</script>")[0]
    groups = json.loads(data)
    assert {group["defense"] for group in groups} == set(ROWS)
    assert groups[0]["records"] == [["0", rows[0]["record"]]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cases = [", "cannot be read as TOML"),
        ("defence = []", "has no key 'defence'; known are"),
        ("cases = ['quick']", "must list its defenses"),
        ("defenses = ['fip']\nviews = ['crop']", "views of .* must be among"),
        ("defenses = ['fip']\nclean = [2]", r"share must lie in \(0, 1\), got 2"),
        ("defenses = ['fip']\nclean = [{ kind = 'old' }]", "kind of CleanData must be 'seen' or"),
        ("defenses = ['fip']\nseeds = 'two'", "seeds of .* must be a list of int"),
        ("defenses = [{ settings = {} }]", "must be a name or a table"),
        ("defenses = [{ name = 'fip', lr = 1 }]", "has no key 'lr'"),
        ("defenses = ['fip']\ncases = ['none']", "unknown case 'none'"),
        ("defenses = ['fip']\nshared = 'digits'", "shared must be a table of keys of a case"),
    ],
)
def test_a_bad_spec_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=words):
        read_spec(path)


def test_a_spec_says_what_is_measured(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        "cases = ['digits-clean']\nseeds = 2\nviews = ['standard']\n"
        "clean = [0.05, { share = 0.1, kind = 'noisy' }]\n"
        "baselines = false\n"
        "defenses = ['tsbd', { name = 'fip', label = 'strong', settings = { radius = 4.0 } }]\n"
    )
    cells = read_spec(path).planned()
    assert len(cells) == 8
    assert {(c.label, c.case.clean, c.kind, c.defense.seed) for c in cells} == {
        (label, share, kind, seed)
        for label in ("tsbd", "strong")
        for share, kind in ((0.05, "unseen"), (0.1, "noisy"))
        for seed in (0, 1)
    }
    assert next(cell for cell in cells if cell.label == "strong").defense.radius == 4.0
    assert len({cell.identity.digest for cell in cells}) == 8
    assert len({cell.victim.digest for cell in cells}) == 4  # two seeds, two shares kept apart


def test_cases_have_what_is_shared_unless_they_say_otherwise(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        "defenses = ['fip']\n"
        "cases = ['digits-clean', { name = 'a' }, { name = 'b', attack = 'blended' }]\n"
        "shared = { base = 'digits-badnets', attack = 'sig', training = { steps = 7 } }\n"
    )
    cases = {case.name: case for case in read_spec(path).cases}
    assert {name: case.attack for name, case in cases.items()} == {
        "digits-clean": None,
        "a": "sig",
        "b": "blended",
    }
    assert [cases[name].training.steps == 7 for name in ("digits-clean", "a", "b")] == [0, 1, 1]
