"""The victim zoo: every shipped file is the one of its card, and a victim loads as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from quick import CASE

import mmdefense as mmd
from mmdefense.checkpoints.weights import hash_file, write_state
from mmdefense.errors import BadInputError
from mmdefense.evaluation import kept, zoo
from mmdefense.evaluation.cases import CleanData
from mmdefense.evaluation.grid import Grid
from mmdefense.evaluation.spec import read_spec
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.encoding import plain
from mmdefense.store import Store

CASES = zoo.zoo_cases()
CARDS = {name: found for name in CASES if (found := zoo.find_card(name, zoo.SHIPPED))}
BACKDOORED = [name for name in CARDS if CASES[name][0].attack]
MOST_BYTES, MOST_IN_ALL = 1_000_000, 16_000_000
FAST = "surfaces-pcba"


def test_five_domains_have_a_backdoored_net_and_its_twin():
    cards = {name: card for name, (card, _) in CARDS.items()}
    assert len({cards[name].task for name in BACKDOORED}) == 5
    for name in BACKDOORED:
        mine, twin = CASES[name][0], CASES[cards[name].twin][0]
        assert twin == replace(mine, name=twin.name, attack=None, settings={})
        assert twin.name in cards


def test_what_is_in_the_repository_is_small_and_known():
    sizes = {path.name: path.stat().st_size for path in zoo.SHIPPED.iterdir()}
    assert set(sizes) == {f"{name}.{end}" for name in CARDS for end in ("json", "safetensors")}
    assert max(sizes.values()) < MOST_BYTES
    assert sum(sizes.values()) < MOST_IN_ALL


@pytest.mark.parametrize("name", CARDS)
def test_card_is_of_its_file_and_of_the_zoo(name):
    card, weights = CARDS[name]
    case, seed = CASES[name]
    assert (card.name, card.task, card.case, card.seed) == (name, case.task, plain(case), seed)
    assert (card.sha256, card.size) == (hash_file(weights), weights.stat().st_size)
    assert card.data.startswith(f"{case.data}: ")
    assert card.licence == "Apache-2.0"
    assert card.arch.startswith(case.model.partition("(")[0])
    assert card.rates.acc > 0.7
    if case.attack is None:
        assert (card.rates.asr, card.rates.ra, card.attack) == (None, None, "none")
    else:
        assert card.rates.asr > 0.8
        assert card.attack in card.about


def test_a_shipped_victim_measures_as_its_card_says():
    found = zoo.verify_victim(FAST, zoo.SHIPPED)
    assert found.faults == ()
    assert found.rates.asr == pytest.approx(found.card.rates.asr, abs=zoo.TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_every_shipped_victim_measures_as_its_card_says(name):
    assert zoo.verify_victim(name, zoo.SHIPPED).faults == ()


@pytest.mark.parametrize("name", [FAST, "digits-trojannn"])
def test_a_victim_is_what_purify_and_evaluate_take(name):
    victim = mmd.load_victim(name)
    card, _ = CARDS[name]
    assert victim.before == card.rates
    evaluation = mmd.evaluate(victim.adapter, victim.test, attack=victim.attack)
    assert evaluation.value == pytest.approx(card.rates.acc, abs=zoo.TOLERANCE)
    assert evaluation.asr.value == pytest.approx(card.rates.asr, abs=zoo.TOLERANCE)
    purified = mmd.purify(victim.adapter, victim.clean, "fine-tuning", steps=2, evidence="none")
    assert type(purified.model) is type(victim.adapter.model)
    assert len(repr(victim)) < 1000


@pytest.fixture
def quick_zoo(monkeypatch, tmp_path):
    """A zoo of one victim that is trained in a second, of which nothing ships."""
    monkeypatch.setattr(zoo, "zoo_cases", lambda: {"quick": (CASE, 0)})
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_does_not_ship_is_built_and_verified(quick_zoo, mmdefense):
    with pytest.raises(BadInputError, match="train it in minutes: mmdefense zoo build quick"):
        mmd.load_victim("quick")
    assert "to build" in mmdefense("zoo", "list").out
    assert mmdefense("zoo", "build").code == 0
    assert sorted(path.name for path in zoo.BUILT.iterdir()) == [
        "quick.json",
        "quick.safetensors",
    ]
    assert "to build" not in mmdefense("zoo", "list").out
    assert mmd.load_victim("quick").attack.target == 0
    outcome = mmdefense("zoo", "verify")
    assert (outcome.code, "agrees" in outcome.out) == (0, True)
    (row,) = json.loads(mmdefense("zoo", "list", "--format", "json").out)
    assert row["acc"] == mmd.load_victim("quick").before.acc


@pytest.fixture
def built(quick_zoo):
    return zoo.build_victim("quick", quick_zoo / "out" / "zoo")


def test_other_weights_are_refused(built, mmdefense):
    weights = zoo.BUILT / "quick.safetensors"
    state = zoo.read_checkpoint(weights)
    write_state({name: value + 0.1 for name, value in state.items()}, weights)
    with pytest.raises(BadInputError, match="SHA-256"):
        mmd.load_victim("quick")
    outcome = mmdefense("zoo", "verify", "quick")
    assert outcome.code == 1
    assert "not measured" in outcome.out


def test_weights_of_another_net_are_refused(built):
    weights = zoo.BUILT / "quick.safetensors"
    write_state({"model.other": torch.zeros(1)}, weights)
    _write(replace(built, sha256=hash_file(weights)))
    with pytest.raises(BadInputError, match="is no quick"):
        mmd.load_victim("quick")


def test_a_rate_that_is_not_reached_is_named(built, mmdefense):
    _write(replace(built, rates=Rates(acc=0.5 * built.rates.acc, asr=built.rates.asr)))
    found = zoo.verify_victim("quick")
    assert [line.split(" is ")[0] for line in found.faults] == ["quick: ACC", "quick: RA"]
    assert mmdefense("zoo", "verify").code == 1


def test_a_card_cannot_name_the_code_that_is_run(built):
    _write(replace(built, case={**built.case, "model": "os:getcwd()"}))
    with pytest.raises(BadInputError, match="other settings"):
        mmd.load_victim("quick")


def _write(card):
    (zoo.BUILT / "quick.json").write_text(card.to_json())


def test_unknown_victim_is_named(mmdefense):
    outcome = mmdefense("zoo", "verify", "digits-bednets")
    assert (outcome.code, "unknown victim 'digits-bednets'" in outcome.err) == (2, True)
    with pytest.raises(BadInputError, match="choose from digits-badnets"):
        mmd.load_victim("digits-bednets")


def test_a_grid_takes_victims_of_the_zoo_without_training_them(built, mmdefense, monkeypatch):
    monkeypatch.setattr(kept, "train_and_describe", None)
    monkeypatch.setattr("mmdefense.evaluation.victims.train", None)
    run = ("grid", "run", "-o", "store", "--zoo", "--no-baselines", "--defense", "pruning")
    assert mmdefense(*run).code == 0
    (victim,) = Store("store").entries("victim")
    assert victim.identity["weights"] == built.sha256
    assert Store("store").content(victim)["before"] == plain(built.rates)
    (cell,) = Store("store").entries("cell")
    assert cell.name.startswith("quick/0: pruning")


def test_a_victim_of_the_zoo_is_another_than_one_trained_here(built):
    grid = Grid(cases=[CASE], defenses=["pruning"], seeds=[0])
    of_zoo = replace(grid, zoo=True)
    assert grid.planned()[0].victim.digest != of_zoo.planned()[0].victim.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [0, 1]}, "has seed 0, got 1; set seeds"),
        ({"clean": [CleanData(share=0.2)]}, "was trained with clean=0.05"),
        ({"cases": [replace(CASE, name="other")]}, "unknown victim 'other'"),
    ],
)
def test_a_grid_asks_the_zoo_for_what_it_has(built, change, words):
    grid = Grid(cases=[CASE], defenses=["pruning"], seeds=[0], zoo=True)
    with pytest.raises(BadInputError, match=words):
        replace(grid, **change).planned()


def test_a_spec_names_victims_of_the_zoo(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text("zoo = true\ndefenses = ['fip']\ncases = ['digits-trojannn']\n")
    (cell,) = [cell for cell in read_spec(path).planned() if not cell.baseline][:1]
    assert cell.victim.parts["weights"] == CARDS["digits-trojannn"][0].sha256
    path.write_text("zoo = true\ndefenses = ['fip']\n")
    assert {cell.case.name for cell in read_spec(path).planned()} == set(CARDS)
    path.write_text("zoo = 'yes'\ndefenses = ['fip']\n")
    with pytest.raises(BadInputError, match="must be true or false"):
        read_spec(path)
