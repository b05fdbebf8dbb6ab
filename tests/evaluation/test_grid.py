"""The grid: every cell once, the rest from the folder, and a table that hides nothing."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys

import pytest
import torch
from quick import CASE
from quick import CLOUDS as QUICK_CLOUDS

from mmdefense import registry
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.errors import BadInputError
from mmdefense.evaluation import grid as grid_module
from mmdefense.evaluation import identity, victims
from mmdefense.evaluation import kept as kept_module
from mmdefense.evaluation.cases import CleanData, described_case, named_cases
from mmdefense.evaluation.export import rows_of
from mmdefense.evaluation.grid import Grid
from mmdefense.evaluation.lineup import Lineup, with_baselines
from mmdefense.evaluation.tables import markdown
from mmdefense.evaluation.victims import train_victim
from mmdefense.evaluation.workers import run_workers
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.record import Row
from mmdefense.runtime.run import Run
from mmdefense.store import Store

ROWS = ["quick", "fine-tuning like quick", "ft-sam like quick"]


@pytest.fixture
def measured(monkeypatch):
    """Count the cells that are measured."""
    names = []
    genuine = grid_module.purified_row

    def measure(victim, name, *rest):
        names.append(name)
        return genuine(victim, name, *rest)

    monkeypatch.setattr(grid_module, "purified_row", measure)
    return names


@pytest.fixture
def trained(monkeypatch):
    """Count the victims that are trained."""
    cases = []
    genuine = victims.train_victim

    def train(case, *rest):
        cases.append(case)
        return genuine(case, *rest)

    monkeypatch.setattr(victims, "train_victim", train)
    return cases


def without_time(cells):
    return [dataclasses.replace(c, row=dataclasses.replace(c.row, seconds=0.0)) for c in cells]


def test_a_grid_measures_each_cell_and_trains_each_victim_once(grid, measured, trained, tmp_path):
    first = grid.run(tmp_path)
    assert [cell.row.defense for cell in first] == ROWS
    assert measured == ROWS
    assert len(trained) == 1
    assert grid.run(tmp_path) == first
    assert (len(measured), len(trained)) == (3, 1)


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


def test_views_are_those_of_each_defense_and_cells_of_their_own(
    grid, measured, trained, tmp_path, monkeypatch
):
    grid.run(tmp_path)
    given = []
    genuine = victims.purify

    def purify(adapter, clean, *rest, **more):
        given.append(more["defense"].views if "defense" in more else rest[0].views)
        return genuine(adapter, clean, *rest, **more)

    monkeypatch.setattr(victims, "purify", purify)
    inserted = dataclasses.replace(grid, views=["insertions"]).run(tmp_path)
    assert given == ["insertions"] * 3
    assert [cell.views for cell in inserted] == ["insertions"] * 3
    both = dataclasses.replace(grid, views=["insertions", "standard"]).run(tmp_path)
    assert [cell.views for cell in both] == ["insertions"] * 3 + ["standard"] * 3
    assert (len(measured), len(trained)) == (6, 1)


def test_a_lost_cell_is_measured_again_to_the_same_result(grid, measured, trained, tmp_path):
    first = grid.run(tmp_path)
    store = Store(tmp_path)
    store.forget(store.entries("cell")[0])
    assert without_time(grid.run(tmp_path)) == without_time(first)
    assert measured == [*ROWS, "quick"]
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("change", "victims_trained"),
    [
        ({"training": dataclasses.replace(CASE.training, lr=0.05)}, 2),
        ({"training": dataclasses.replace(CASE.training, steps=41)}, 2),
        ({"settings": {"ratio": 0.2}}, 2),
        ({"attack": "blended"}, 2),
        ({"model": "commands:Net(classes={classes}) "}, 2),
        ({"clean": 0.1}, 1),  # the victim is trained on all samples
        ({"clean": 0.1, "seen": False}, 2),
    ],
    ids=str,
)
def test_a_changed_case_of_the_same_name_has_a_victim_of_its_own(
    grid, measured, trained, tmp_path, change, victims_trained
):
    alone = dataclasses.replace(grid, baselines=False)
    alone.run(tmp_path)
    other = dataclasses.replace(CASE, **change)
    dataclasses.replace(alone, cases=[other]).run(tmp_path)
    assert measured == ["quick", "quick"]
    assert len(trained) == victims_trained


def test_cells_of_other_code_or_another_setting_are_measured_again(
    grid, measured, tmp_path, monkeypatch
):
    alone = dataclasses.replace(grid, baselines=False)
    alone.run(tmp_path)
    other = Lineup(defense="quick", settings={"lr": 0.01})
    dataclasses.replace(alone, defenses=[other]).run(tmp_path)
    assert measured == ["quick", "quick (lr=0.01)"]
    monkeypatch.setattr(identity, "code_version", lambda *_: "of tomorrow")
    alone.run(tmp_path)
    assert measured[2:] == ["quick"]


def test_cells_of_like_settings_keep_their_names_and_baselines(plug, tmp_path):
    plug("defenses", quick="quick:Quick")
    alone = Grid(cases=[CASE], defenses=["quick"], seeds=(0,), baselines=False)
    assert alone.run(tmp_path)[0].row.baseline == ""
    twins = [
        Lineup(defense="quick", label="first"),
        Lineup(defense="quick", label="second"),
        "quick",
    ]
    cells = dataclasses.replace(alone, defenses=twins, baselines=True).run(tmp_path)
    rows = {cell.row.defense: cell.row.baseline for cell in cells}
    beside = "fine-tuning like first"  # of one budget, they have one baseline
    named = dict.fromkeys(("first", "second", "quick"), beside)
    assert rows == {**named, beside: "", "ft-sam like first": ""}


def test_two_rows_of_one_name_are_refused(plug):
    plug("defenses", quick="quick:Quick")
    twins = [Lineup(defense="quick", label="x", settings={"steps": n}) for n in (1, 2)]
    with pytest.raises(BadInputError, match="two defenses of the grid have the name 'x'"):
        Grid(cases=[CASE], defenses=twins).planned()
    with pytest.raises(BadInputError, match="two cases of the grid have the name 'quick'"):
        Grid(cases=[CASE, CASE], defenses=["quick"]).planned()


@pytest.fixture
def two_baselines(plug):
    plug("defenses", **{"quick": "quick:Quick", "broken": "quick:Broken", "ft-sam": "quick:Sam"})


def test_each_budget_has_fine_tuning_and_ft_sam_beside_it_once(two_baselines):
    quick, other = (Lineup(defense="quick", settings={"steps": n}).build(0) for n in (3, 4))
    like = Lineup(defense="broken", settings={"steps": 3}).build(0)
    rows = with_baselines({"a": quick, "b": like, "c": other})
    assert [(row.label, row.baseline) for row in rows] == [
        ("a", "fine-tuning like a"),
        ("fine-tuning like a", ""),
        ("ft-sam like a", ""),
        ("b", "fine-tuning like a"),
        ("c", "fine-tuning like c"),
        ("fine-tuning like c", ""),
        ("ft-sam like c", ""),
    ]
    assert [row.defense.steps for row in rows] == [3, 3, 3, 3, 4, 4, 4]


def test_baselines_that_are_named_are_not_added_and_those_without_a_budget_have_their_own(
    two_baselines,
):
    plain, sam = (Lineup(defense=name).build(1) for name in ("fine-tuning", "ft-sam"))
    rows = with_baselines({"plain": plain, "sam": sam})
    assert [row.label for row in rows] == ["plain", "sam"]
    assert rows[1].baseline == "plain"
    alone = with_baselines({"pruning": Lineup(defense="pruning").build(1)})
    assert [row.label for row in alone] == ["pruning", "fine-tuning", "ft-sam"]
    assert {row.defense.seed for row in alone} == {1}


@pytest.mark.parametrize(("kind", "victims_trained"), [("noisy", 1), ("blurred", 1), ("unseen", 2)])
def test_a_kind_of_clean_data_is_a_cell_of_its_own(
    grid, trained, tmp_path, monkeypatch, kind, victims_trained
):
    given = []
    genuine = victims.purify

    def purify(adapter, clean, *rest, **more):
        given.append(clean.fingerprint())
        return genuine(adapter, clean, *rest, **more)

    monkeypatch.setattr(victims, "purify", purify)
    both = [CleanData(share=0.1), CleanData(share=0.1, kind=kind)]
    cells = dataclasses.replace(grid, clean=both, baselines=False).run(tmp_path)
    assert [cell.kind for cell in cells] == ["seen", kind]
    assert [cell.case["clean"] for cell in cells] == [0.1, 0.1]
    assert (given[0] == given[1]) is (kind == "unseen")
    assert len(trained) == victims_trained
    assert [row["kind"] for row in rows_of(Store(tmp_path))] == ["seen", kind]
    assert f"| quick, 10 % {kind} | quick |" in markdown(cells)


def test_a_kind_that_the_data_does_not_have_is_said_in_the_row(tmp_path, monkeypatch):
    def keep(victim, *_):
        raise AssertionError("nothing is to be purified")

    monkeypatch.setattr(grid_module, "purified_row", keep)
    cells = Grid(
        cases=[QUICK_CLOUDS],
        defenses=["fine-tuning"],
        seeds=(0,),
        baselines=False,
        clean=[CleanData(kind="blurred")],
    ).run(tmp_path)
    assert "clean data of kind 'blurred' is for images and clips" in cells[0].row.note
    assert cells[0].row.after == Rates()


def test_a_case_is_described_by_what_differs_from_a_known_one():
    case = described_case({"base": "digits-badnets", "ratio": 0.01, "training": {"steps": 7}})
    base = named_cases(["digits-badnets"])[0]
    training = dataclasses.replace(base.training, steps=7)
    name = "digits-badnets (ratio=0.01, training={'steps': 7})"
    assert case == dataclasses.replace(
        base, name=name, settings={**base.settings, "ratio": 0.01}, training=training
    )
    assert described_case({"base": "digits-badnets", "attack": "none"}).attack is None
    whole = {**dataclasses.asdict(base), "training": {"steps": 7}, "name": "mine"}
    for field in ("clean", "demo"):
        del whole[field]
    assert described_case(whole).name == "mine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"base": "none"}, "unknown case 'none'"),
        ({"base": "digits-badnets", "rate": 1}, "a case has no 'rate'; known are attack"),
        ({"task": "image-classification"}, "name, data, model, training is missing"),
        ({"base": "digits-badnets", "ratio": 2}, r"ratio must lie in \[0, 1\]"),
        ({"base": "digits-badnets", "attack": "irba"}, "is for point-cloud-classification, not"),
        ({"base": "digits-badnets", "attack": "none", "ratio": 0.1}, "ratio has no effect"),
        ({"base": "digits-badnets", "training": {"step": 1}}, "no setting 'step'"),
        ({"base": "digits-badnets", "seen": 3}, "seen of Case must be True or False"),
    ],
)
def test_a_bad_case_is_refused_in_one_line(given, words):
    with pytest.raises(BadInputError, match=words):
        described_case(given)


def test_a_victim_from_the_store_is_the_one_that_was_trained(tmp_path):
    fresh = train_victim(CASE, Run(0))
    for _ in range(2):
        kept = kept_module.kept_victim(
            Store(tmp_path), identity.victim_identity(CASE, 0), CASE, 0, lambda event: None
        )
        assert hash_weights(kept.adapter.model) == hash_weights(fresh.adapter.model)
        assert kept.before == fresh.before
        assert kept.attack == fresh.attack
        assert kept.clean.fingerprint() == fresh.clean.fingerprint()


def test_what_an_attack_has_learnt_is_in_the_store(tmp_path):
    case = dataclasses.replace(CASE, attack="trojannn", settings={})
    before = [
        kept_module.kept_victim(
            Store(tmp_path), identity.victim_identity(case, 0), case, 0, lambda event: None
        ).attack.fitted
        for _ in range(2)
    ]
    assert before[0].keys() == before[1].keys() != set()
    assert all(torch.equal(before[0][name], before[1][name]) for name in before[0])


def test_a_cell_that_fails_is_a_row_and_the_others_are_measured(plug, tmp_path, monkeypatch):
    plug("defenses", quick="quick:Quick", broken="quick:Broken")
    grid = Grid(cases=[CASE], defenses=["broken", "quick"], seeds=(0,), baselines=False)
    assert [cell.row.defense for cell in grid.run(tmp_path)] == ["quick"]
    store = Store(tmp_path)
    failed = next(entry for entry in store.entries() if entry.status == "failed")
    assert failed.error == "it breaks"
    assert "in _run" in failed.trace
    monkeypatch.setattr("quick.Broken._run", lambda self, work: None)
    assert len(grid.run(tmp_path)) == 1
    assert len(grid.run(tmp_path, retry_failed=True)) == 2


def test_a_victim_that_cannot_be_trained_fails_its_cells_alone(grid, tmp_path):
    wild = dataclasses.replace(CASE, name="wild", settings={"ratio": 5})
    both = dataclasses.replace(grid, cases=[wild, CASE], baselines=False)
    assert [cell.row.victim for cell in both.run(tmp_path)] == ["quick"]
    errors = [entry.error for entry in Store(tmp_path).entries() if entry.error]
    assert len(errors) == 2
    assert errors[1].startswith("the victim could not be trained")


def test_a_damaged_cell_is_named(grid, tmp_path):
    grid.run(tmp_path)
    store = Store(tmp_path)
    path = tmp_path / store.content_path(store.entries("cell")[0])
    path.write_text("{}")
    with pytest.raises(BadInputError, match="is damaged; `mmdefense store rm"):
        grid.run(tmp_path)


def test_a_cell_names_what_it_was_measured_with(grid, tmp_path):
    cell = grid.run(tmp_path)[0]
    assert cell.case["training"]["steps"] == 40
    assert cell.row.settings["steps"] == 3
    assert cell.versions.keys() >= {"torch", "mmdefense"}


def test_a_data_set_is_loaded_once_for_all_victims(grid, tmp_path, monkeypatch):
    task = registry.load("tasks", CASE.task)
    genuine, parts = task.load, []

    def load(where, *, split="train", **options):
        parts.append(split)
        return genuine(where, split=split, **options)

    monkeypatch.setattr(task, "load", staticmethod(load))
    identity.loaded.cache_clear()
    identity.data_fingerprint.cache_clear()
    dataclasses.replace(grid, seeds=(0, 1)).run(tmp_path)
    assert sorted(parts) == ["test", "train"]


def test_victims_come_first_then_a_cell_of_each_kind_then_the_longest(plug, tmp_path, monkeypatch):
    plug("defenses", quick="quick:Quick")
    names = []

    def row(victim, name, *rest):
        names.append(name)
        return Row(defense=name, before=victim.before, after=Rates(), seconds=len(name)), None

    def train(case, run, *rest):
        names.append("victim")
        return genuine(case, run, *rest)

    genuine = victims.train_victim
    monkeypatch.setattr(victims, "train_victim", train)
    monkeypatch.setattr(grid_module, "purified_row", row)
    defenses = [Lineup(defense="quick", label=label) for label in ("xx", "xxx", "x")]
    Grid(cases=[CASE], defenses=defenses, seeds=(0, 1), baselines=False).run(tmp_path)
    assert names == ["victim", "victim", "xx", "xxx", "x", "xxx", "xx", "x"]


def test_workers_get_the_digests_of_their_parent_and_give_the_cells_of_one(
    grid, tmp_path, monkeypatch
):
    both = dataclasses.replace(grid, seeds=(0, 1))
    torch.set_num_threads(1)
    alone = both.run(tmp_path / "one")

    def digest(*given):
        (tmp_path / f"digest-{os.getpid()}").touch()
        return genuine(*given)

    genuine = grid_module.victim_identity
    monkeypatch.setattr(grid_module, "victim_identity", digest)
    run_workers(both, tmp_path / "two", 2)
    assert without_time(both.measured(Store(tmp_path / "two"))) == without_time(alone)
    assert [p.name for p in tmp_path.glob("digest-*")] == [f"digest-{os.getpid()}"]


def test_workers_on_devices_of_two_kinds_are_refused(grid, tmp_path):
    with pytest.raises(BadInputError, match="devices of one kind, got cpu, cuda:0"):
        run_workers(grid, tmp_path, 2, devices=["cpu", "cuda:0"])


@pytest.mark.slow
def test_two_workers_give_the_cells_of_one(tmp_path):
    fast = Lineup(defense="fine-tuning", settings={"steps": 50, "restarts": 0})
    grid = Grid(cases=named_cases(["digits-badnets"]), defenses=[fast], seeds=(0, 1))
    run_workers(grid, tmp_path / "two", 2)
    torch.set_num_threads(1)
    alone = grid.run(tmp_path / "one")
    assert without_time(grid.measured(Store(tmp_path / "two"))) == without_time(alone)


@pytest.mark.slow
def test_killed_workers_lose_nothing_and_do_nothing_twice(tmp_path):
    command = [sys.executable, "-m", "mmdefense", "grid", "run", "-o", str(tmp_path / "s")]
    command += ["--case", "digits-badnets"]
    for name in ("fine-tuning", "tsbd"):  # cross-validation takes minutes, and shows nothing here
        command += ["--defense", f"{name},max_utility_drop=1.0"]
    command += ["--seeds", "1", "--no-baselines"]
    draw = random.Random(0)
    kept = set()
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(5, 25))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if (tmp_path / "s" / "index.sqlite").exists():
            store = Store(tmp_path / "s")
            now = {(entry.digest, entry.created) for entry in store.entries()}
            assert kept <= now
            assert store.verify() == []
            kept = now
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    entries = Store(tmp_path / "s").entries()
    assert [entry.kind for entry in entries] == ["victim", "cell", "cell"]
    assert kept <= {(entry.digest, entry.created) for entry in entries}


def test_the_clean_control_has_an_accuracy_and_no_asr():
    victim = train_victim(dataclasses.replace(CASE, attack=None), Run(0))
    assert victim.before.acc is not None
    assert victim.before.asr is None
    assert victim.after(victim.adapter).der is None


def test_a_victim_depends_on_its_seed_alone():
    nets = [train_victim(CASE, Run(seed)).adapter.model for seed in (0, 0, 1)]
    first, same, other = map(hash_weights, nets)
    assert first == same != other
