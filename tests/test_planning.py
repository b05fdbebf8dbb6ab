"""What `mmdefense purify --dry-run` says; it writes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from clocks import Clock
from commands import Net, small_images

from mmdefense.defenses.base import TrainingDefense
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.pipeline.planning import Plan, _duration, _seconds
from mmdefense.prepared import prepare
from mmdefense.registry import adapt


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
        "evidence  fast, at most about",
        "GiB at its peak",
    ):
        assert words in outcome.out


def test_fast_fip_trains_few_values(place, mmdefense):
    arguments = place.purify("--dry-run", "--set", "norms_and_biases=False")
    arguments[arguments.index("fine-tuning")] = "fast-fip"
    outcome = mmdefense(*arguments)
    assert outcome.code == 0, outcome.err
    assert "trains    7 values" in outcome.out  # 4 singular values of the filters, 3 of the head


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_defenses_that_prune_by_a_mask_train_one_for_each_unit(place, mmdefense, name):
    arguments = place.purify("--dry-run")
    arguments[arguments.index("fine-tuning")] = name
    arguments = [text if text != "steps=4" else "seed=1" for text in arguments]
    outcome = mmdefense(*arguments)
    assert outcome.code == 0, outcome.err
    assert "trains    4 unit masks" in outcome.out


def test_a_dry_run_of_what_cannot_be_is_refused(place, mmdefense):
    outcome = mmdefense(*place.purify("--dry-run", "--set", "lr=-1"))
    assert outcome.code == 2
    assert place.files() == []


TOLD = {"task": "t", "adapter": "A", "architecture": "N", "parameters": 2000, "trains": "nothing"}


def test_what_is_not_told_is_said():
    plan = Plan(**TOLD, fit=4, holdout=1, defense=FineTuning(), seconds=70, memory=2**30)
    assert "trains    nothing" in plan.lines()
    longer = (
        "the rate is halved, up to 8 times, until the utility guard passes, and with few held-out "
        "samples it also runs on up to four other splits"
    )
    assert f"time      about 70 s a run; {longer}" in plan.lines()
    assert "evidence  none" in plan.lines()
    assert "memory    1.00 GiB at its peak" in plan.lines()
    unsure = replace(plan, at_least=True, evidence="fast", evidence_seconds=10.5)
    assert f"time      at least 70 s a run; {longer}" in unsure.lines()
    assert "evidence  fast, at most about 10 s more" in unsure.lines()


@dataclass(frozen=True, kw_only=True)
class Timed(TrainingDefense):
    """Takes its time by a clock: ``before`` seconds for a first stage, ``each`` for an update.

    Attributes:
        clock: What it moves.
    """

    clock: Any = None
    before: float = 0.0
    each: float = 1.0
    steps: int = 100

    def _run(self, work):
        work.run.report("measure", 0, 5)
        for step in range(1, 6):
            self.clock.now += self.before / 5
            work.run.report("measure", step, 5)
        work.run.report("train", 0, self.steps)
        for step in range(1, self.steps + 1):
            self.clock.now += self.each
            work.run.report("train", step, self.steps)


# The trial is cut off after 8 s.
@pytest.mark.parametrize(
    ("settings", "seconds", "at_least"),
    [
        ({"each": 0.01}, 1.0, False),
        ({"each": 1.0}, 100.0, False),
        ({"each": 1.0, "before": 4.0}, 104.0, False),
        ({"before": 50.0}, 50.0, True),  # and what comes after it is not known
    ],
)
def test_the_time_is_that_of_a_trial_that_goes_on_as_it_began(settings, seconds, at_least):
    clock = Clock()
    told = _seconds(small(), Timed(clock=clock, **settings), 0.0, clock)
    assert told == (pytest.approx(seconds), at_least)
    assert clock.now <= 10


def test_what_grows_with_the_samples_is_tried_on_some_of_them():
    clock = Clock()
    told = _seconds(small(1024), Timed(clock=clock, before=2.0, each=0.01), 0.0, clock)
    assert told == (pytest.approx(2 * 2.0 + 1.0), False)


def test_fewer_samples_than_classes_are_enough_for_a_trial():
    classes = 600  # more than are tried
    data = small_images(classes)[0], torch.arange(classes)
    clock = Clock()
    told = _seconds(prepare(adapt(Net(classes)), data), Timed(clock=clock, each=0.01), 0.0, clock)
    assert told == (pytest.approx(1.0), False)


def test_a_model_whose_update_alone_takes_too_long_is_not_tried():
    told = _seconds(small(), FineTuning(steps=10, batch_size=4), 3.0, Clock())
    assert told == ((10 * 4 + 30) * 3.0, True)


def small(count=30):
    return prepare(adapt(Net()), small_images(count))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 1 s"), (89, "about 89 s"), (600, "about 10 min"), (7200, "about 2.0 h")],
)
def test_times_are_rounded(seconds, words):
    assert _duration(seconds) == words


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
