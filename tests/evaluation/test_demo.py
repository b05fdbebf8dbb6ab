"""The demo, in small: everything that it promises is on the page."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quick import CASE
from safetensors.torch import load_file

from mmdefense import registry
from mmdefense.errors import BadInputError
from mmdefense.evaluation import demo
from mmdefense.report.record import read_record


@pytest.fixture
def quick(plug):
    plug("defenses", quick="quick:Quick")


def test_the_page_holds_what_the_demo_promises(quick, tmp_path):
    events = []
    record = demo.run_demo(
        tmp_path / "out", case=CASE, defenses=("quick",), progress=events.append, seed=2
    )
    assert [row.defense for row in record.rows] == ["quick", "fine-tuning"]
    assert record.rows[1].settings["steps"] == 3  # the budget of the first defense
    assert record.rows[0].baseline == "fine-tuning"
    rates = record.rows[0]
    assert None not in (rates.before.asr, rates.after.acc, rates.after.ra, rates.after.der)
    assert record.attack == "BadNets, 10 % of the training set, target 0"
    assert read_record(tmp_path / "out" / "comparison.json") == record
    assert "conv.weight" in load_file(tmp_path / "out" / "model.safetensors")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for title in ("The trigger", "Pruning curve: quick", "Loss smoothness", "Penultimate layer"):
        assert title in page
    assert {event.stage for event in events} >= {"victim: victim", "quick: fine-tune"}


def test_a_folder_that_exists_is_refused_before_any_work(tmp_path):
    events = []
    (tmp_path / "note").touch()
    with pytest.raises(BadInputError, match="already exists"):
        demo.run_demo(tmp_path, progress=events.append)
    assert events == []


def test_the_demo_takes_the_case_that_is_marked_for_it_or_the_first(tmp_path, monkeypatch):
    taken = {}

    def train(case, _):
        taken[case.task] = case
        raise BadInputError("enough")

    monkeypatch.setattr(demo, "train_victim", train)
    for name in registry.names("tasks"):
        with pytest.raises(BadInputError, match="enough"):
            demo.run_demo(tmp_path / name, task=name)
    assert taken.pop("video-classification").name == "moving-digits-small-badnets"
    assert len(taken) == 4
    for name, case in taken.items():
        assert case == dataclasses.replace(registry.load("tasks", name)().cases()[0], clean=0.2)


def test_the_command_prints_the_table(quick, tmp_path, mmdefense, monkeypatch):
    def quickly(out, **options):
        return genuine(out, case=CASE, defenses=("quick",), **options)

    genuine = demo.run_demo
    monkeypatch.setattr(demo, "run_demo", quickly)
    outcome = mmdefense("demo", "-o", tmp_path / "out")
    assert outcome.code == 0
    for word in ("quick", "fine-tuning", "ACC", "ASR", "DER", "seconds", "report.html"):
        assert word in outcome.out


def test_the_command_names_the_metric_of_the_task(quick, tmp_path, mmdefense, monkeypatch):
    def in_map(out, **options):
        record = genuine(out, case=CASE, defenses=("quick",), **options)
        return dataclasses.replace(record, metric="mAP@50")

    genuine = demo.run_demo
    monkeypatch.setattr(demo, "run_demo", in_map)
    outcome = mmdefense("demo", "-o", tmp_path / "out")
    assert "mAP@50 %" in outcome.out
    assert "ACC" not in outcome.out


def test_the_victim_is_not_changed_by_the_demo(quick, tmp_path):
    record = demo.run_demo(tmp_path / "out", case=CASE, defenses=("quick",))
    kept = load_file(tmp_path / "out" / "model.safetensors")
    from mmdefense.checkpoints.weights import hash_weights

    assert hash_weights(kept) == record.model.sha256_before
    assert all(torch.isfinite(value).all() for value in kept.values())
