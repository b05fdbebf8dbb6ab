"""The grid: every cell once, the rest from the folder, and a table that hides nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
from quick import CASE

from mmdefense import registry
from mmdefense.augment import random_shift
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.errors import BadInputError
from mmdefense.evaluation import grid as grid_module
from mmdefense.evaluation import victims
from mmdefense.evaluation.grid import Cell, Grid, markdown
from mmdefense.evaluation.victims import all_cases, named_cases, train_victim
from mmdefense.kernels.run import Run
from mmdefense.report.record import Rates, Row


@pytest.fixture
def grid(plug):
    plug("defenses", quick="quick:Quick")
    return Grid(cases=[CASE], defenses=["quick"], seeds=(0,))


@pytest.fixture
def measured(monkeypatch):
    """Count the cells that are measured."""
    names = []
    genuine = grid_module._measure

    def measure(case, victim, name, *rest):
        names.append(name)
        return genuine(case, victim, name, *rest)

    monkeypatch.setattr(grid_module, "_measure", measure)
    return names


def without_time(cells):
    return [dataclasses.replace(c, row=dataclasses.replace(c.row, seconds=0.0)) for c in cells]


def test_a_grid_measures_each_cell_once(grid, measured, tmp_path):
    first = grid.run(tmp_path)
    assert [cell.row.defense for cell in first] == ["quick", "fine-tuning like quick"]
    assert measured == ["quick", "fine-tuning like quick"]
    assert grid.run(tmp_path) == first
    assert len(measured) == 2


@pytest.mark.parametrize("seen", [True, False])
def test_clean_samples_are_among_those_of_the_attacker_where_a_case_says_so(monkeypatch, seen):
    given = []

    def note(adapter, samples, *_, **__):
        given.append(samples)

    monkeypatch.setattr(victims, "train", note)
    case = dataclasses.replace(CASE, attack=None, seen=seen)
    victim = train_victim(case, Run(0))
    attackers, defenders = (
        {row.tobytes() for row in part.inputs.flatten(1).numpy()}
        for part in (given[0], victim.clean)
    )
    assert defenders.issubset(attackers) if seen else defenders.isdisjoint(attackers)


def test_standard_views_are_those_of_the_victims_training_and_cells_of_their_own(
    grid, measured, tmp_path, monkeypatch
):
    grid.run(tmp_path)
    given = []
    genuine = victims.purify

    def purify(adapter, clean, *rest, **more):
        given.append(clean.augmentation)
        return genuine(adapter, clean, *rest, **more)

    monkeypatch.setattr(victims, "purify", purify)
    standard = dataclasses.replace(grid, views="standard").run(tmp_path)
    assert given == [random_shift, random_shift]
    assert [cell.views for cell in standard] == ["standard", "standard"]
    assert [cell.views for cell in grid.run(tmp_path)] == ["insertions", "insertions"]
    assert len(measured) == 4


def test_a_lost_cell_is_measured_again_to_the_same_result(grid, measured, tmp_path):
    first = grid.run(tmp_path)
    (tmp_path / "quick" / "quick-0.json").unlink()
    assert without_time(grid.run(tmp_path)) == without_time(first)
    assert measured == ["quick", "fine-tuning like quick", "quick"]


def test_a_cell_of_another_case_is_measured_again(grid, measured, tmp_path):
    grid.run(tmp_path)
    other = dataclasses.replace(CASE, clean=0.1)
    dataclasses.replace(grid, cases=[other], baselines=False).run(tmp_path)
    assert measured[2:] == ["quick"]


def test_a_damaged_cell_is_named(grid, tmp_path):
    path = tmp_path / "quick" / "quick-0.json"
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(BadInputError, match=r"quick-0\.json cannot be read"):
        grid.run(tmp_path)


def test_a_cell_names_what_it_was_measured_with(grid, tmp_path):
    cell = grid.run(tmp_path)[0]
    held = json.loads((tmp_path / "quick" / "quick-0.json").read_text("utf-8"))
    assert held["case"]["training"]["steps"] == 40
    assert held["row"]["settings"]["steps"] == 3
    assert cell.versions.keys() >= {"torch", "mmdefense"}


def test_the_clean_control_has_an_accuracy_and_no_asr():
    victim = train_victim(dataclasses.replace(CASE, attack=None), Run(0))
    assert victim.before.acc is not None
    assert victim.before.asr is None
    assert victim.after(victim.adapter).der is None


def test_a_victim_depends_on_its_seed_alone():
    nets = [train_victim(CASE, Run(seed)).adapter.model for seed in (0, 0, 1)]
    first, same, other = map(hash_weights, nets)
    assert first == same != other


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
    monkeypatch.setattr("mmdefense.evaluation.victims.all_cases", lambda: {CASE.name: CASE})
    outcome = mmdefense("grid", "-o", tmp_path, "--defense", "quick", "--seeds", "1")
    assert outcome.code == 0
    assert outcome.out.startswith("| victim | defense | ACC |")
    assert "fine-tuning like quick" in outcome.out
    alone = mmdefense(
        "grid", "-o", tmp_path, "--defense", "quick", "--seeds", "1", "--no-baselines"
    )
    assert "fine-tuning like quick" not in alone.out
