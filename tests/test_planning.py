"""What `mmdefense purify --dry-run` says; it writes nothing."""

from __future__ import annotations

import pytest

from mmdefense.defenses.auto import Auto
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.planning import Plan, _duration, _shortened


def test_the_plan_is_shown_and_nothing_written(place, mmdefense):
    before = place.model.read_bytes()
    outcome = mmdefense(*place.purify("--set", "steps=1000", "--dry-run"))
    assert outcome.code == 0, outcome.err
    assert place.files() == []
    assert place.model.read_bytes() == before
    for words in (
        "image-classification, read by TorchClassifier",
        "Net, 91 weights",
        "30 clean samples: 24 to fit, 6 held out",
        "FineTuning(seed=0",
        "trains    91 values",
        "scan      ",
        "not looked at: behaviour",
        "time      about",
        "GiB at its peak",
    ):
        assert words in outcome.out


def test_fast_fip_trains_few_values(place, mmdefense):
    arguments = place.purify("--dry-run", "--set", "norms_and_biases=False")
    arguments[arguments.index("fine-tuning")] = "fast-fip"
    outcome = mmdefense(*arguments)
    assert outcome.code == 0, outcome.err
    assert "trains    7 values" in outcome.out  # 4 singular values of the filters, 3 of the head


def test_a_dry_run_of_what_cannot_be_is_refused(place, mmdefense):
    outcome = mmdefense(*place.purify("--dry-run", "--set", "lr=-1"))
    assert outcome.code == 2
    assert place.files() == []


def test_what_is_not_told_is_said():
    told = {"task": "t", "adapter": "A", "architecture": "N", "parameters": 2000, "trained": None}
    shown = Plan(**told, fit=4, holdout=1, defense=FineTuning(), seconds=None, memory=2**30).lines()
    assert "trains    no values" in shown
    longer = "up to 4 times as long where the rate has to be lowered"
    assert f"time      not told by a few updates; {longer}" in shown
    assert "memory    1.00 GiB at its peak" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 1 s"), (89, "about 89 s"), (600, "about 10 min"), (7200, "about 2.0 h")],
)
def test_times_are_rounded(seconds, words):
    assert _duration(seconds) == words


def test_a_trial_is_run_once_with_few_steps():
    assert _shortened(FineTuning(lr=0.5), 2) == FineTuning(lr=0.5, steps=2, restarts=0)
    assert _shortened(Auto(search_steps=5), 2) == Auto(search_steps=5, steps=2)


@pytest.mark.parametrize("defense", ["auto", "fine-tuning"])
def test_parts_of_a_run_write_nothing_either(place, mmdefense, monkeypatch, defense):
    monkeypatch.chdir(place.folder)
    before = sorted(place.folder.rglob("*"))
    fast = {"auto": ("search_steps=2", "steps=3"), "fine-tuning": ("steps=30", "lr=9.0")}
    arguments = place.purify("--dry-run", *(w for one in fast[defense] for w in ("--set", one)))
    arguments[arguments.index("fine-tuning")] = defense
    outcome = mmdefense(*arguments)
    assert outcome.code == 0, outcome.err
    assert sorted(place.folder.rglob("*")) == before
