"""The choice of a defense, on scripted defenses and searches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from mmdefense.checkpoints.runs import RunStore
from mmdefense.defenses import auto
from mmdefense.defenses.auto import Auto
from mmdefense.defenses.base import Defense, Purifying
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.inversion import Recovered
from mmdefense.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class Marking(Defense):
    """Writes its mark into the first bias; ``left`` is the success of triggers that it leaves."""

    mark: ClassVar[float]

    def _run(self, work):
        work.run.report("mark", 1, 1, mark=self.mark)
        with torch.no_grad():
            work.adapter.model.get_submodule(work.adapter.head).bias += self.mark
        work.run.report("mark", 1, 2)


@dataclass(frozen=True, kw_only=True)
class Weak(Marking):
    mark = 1e-4


@dataclass(frozen=True, kw_only=True)
class Strong(Marking):
    mark = 2e-4


@dataclass(frozen=True, kw_only=True)
class Impossible(Marking):
    def _run(self, work):
        raise UnsupportedError("no such layer")


@dataclass(frozen=True, kw_only=True)
class Idle(Marking):
    mark = 0.0


@pytest.fixture
def scripted(monkeypatch, taught):
    """Return a function that purifies: triggers succeed as ``left`` says of each mark."""
    adapter, samples = taught("small-resnet")
    plugged = {"weak": Weak, "strong": Strong, "impossible": Impossible, "idle": Idle}
    monkeypatch.setattr(auto.registry, "load", lambda _, name: plugged[name])
    given = adapter.model.get_submodule(adapter.head).bias.detach().clone()

    def purify(left, *, found=True, **settings):
        def success(adapter, *_):
            moved = adapter.model.get_submodule(adapter.head).bias.detach() - given
            return left[round(float(moved[0]) * 1e4)]

        def search(self, work):
            row = {"family": {"name": "patch", "shape": (2, 2, 2), "budget": 0.1}, "target": 0}
            return [{**row, "triggers": torch.zeros(1, 2, 2, 2), "size": 0.5}] if found else []

        monkeypatch.setattr(auto, "_success", success)
        monkeypatch.setattr(Auto, "_found", search)
        kept = {"candidates": ("weak", "strong"), "fallback": ("strong",), "max_utility_drop": 1.0}
        more = {k: settings.pop(k) for k in ("store", "max_seconds") if k in settings}
        result = Auto(**{**kept, **settings}).purify(adapter, samples, **more)
        return result, result.choice

    return purify


def test_the_first_that_is_good_enough_is_taken(scripted):
    result, choice = scripted({0: 1.0, 1: 0.05, 2: 0.0})
    assert choice.defense == "weak"
    assert choice.settings["max_utility_drop"] == 1.0
    assert (choice.success_before, choice.success_after) == (1.0, 0.05)
    assert len(choice.why) == 3
    assert "the smallest (patch to target 0) succeeds on 100%" in choice.why[0]
    assert "up to 5%: good enough" in choice.why[1]
    assert "not searched for would go unnoticed" in choice.why[2]
    assert {"stage": "weak: mark", "step": 1, "mark": Weak.mark} in result.history
    assert result.guard.state == "final"


def test_what_leaves_a_trigger_is_not_good_enough(scripted):
    _, choice = scripted({0: 1.0, 1: 0.5, 2: 0.0})
    assert choice.defense == "strong"
    assert "up to 50%: not good enough" in choice.why[1]


def test_where_none_is_good_enough_the_best_is_taken(scripted):
    assert scripted({0: 1.0, 1: 0.4, 2: 0.6})[1].defense == "weak"


def test_what_is_not_possible_is_said_and_passed_over(scripted):
    _, choice = scripted({0: 1.0, 2: 0.0}, candidates=("impossible", "strong"))
    assert choice.defense == "strong"
    assert choice.why[1] == "impossible: could not run (no such layer)"
    with pytest.raises(UnsupportedError, match="no such layer"):
        scripted({0: 1.0}, candidates=("impossible",))


def test_where_nothing_can_be_told_apart_the_fallback_is_taken(scripted):
    _, choice = scripted({0: 0.05}, found=False)
    assert choice.defense == "strong"
    assert "nothing to choose by" in choice.why[0]
    assert choice.why[1] == "strong: utility 1.000 to 1.000: good enough"
    assert (choice.success_before, choice.success_after) == (None, None)


def test_a_model_that_the_fallback_does_not_support_gets_the_next(scripted):
    """The triggers that a search finds in the purified model only do not count."""
    _, choice = scripted({0: 0.05}, found=False, fallback=("impossible", "weak", "strong"))
    assert choice.why[1] == "impossible: could not run (no such layer)"
    assert choice.defense == "weak"


def test_a_defense_that_changes_nothing_is_taken_only_if_no_other_passes(scripted):
    """Random triggers may succeed least on the unchanged model."""
    left = {0: 0.5, 1: 0.9, 2: 0.8}
    _, choice = scripted(left, candidates=("idle", "weak", "strong"))
    assert choice.why[1] == "idle: changed nothing (Idle changed no weight)"
    assert choice.defense == "strong"
    assert "no criterion" in choice.why[4]
    _, choice = scripted({0: 0.05}, found=False, fallback=("idle", "strong"))
    assert choice.defense == "strong"
    result, choice = scripted({0: 0.5}, candidates=("idle", "impossible"))
    assert choice.defense == "idle"
    assert result.unchanged == "Idle changed no weight"


def test_triggers_that_no_defense_weakens_are_no_criterion(scripted):
    _, choice = scripted({0: 1.0, 1: 0.6, 2: 0.9}, fallback=("strong", "weak"))
    assert choice.defense == "strong"
    assert "no criterion" in choice.why[3]
    _, choice = scripted({0: 1.0, 1: 0.4, 2: 0.9}, fallback=("strong", "weak"))
    assert choice.defense == "weak"


def test_no_other_is_tried_when_the_time_is_up(scripted):
    result, choice = scripted({0: 1.0, 1: 0.5, 2: 0.0}, max_seconds=0)
    assert choice.defense == "weak"
    assert result.stopped == "mark, step 1 of 2"
    assert "time ran out in mark" in choice.why[1]


def test_each_candidate_keeps_states_of_its_own(scripted, tmp_path):
    scripted({0: 1.0, 1: 0.5, 2: 0.0}, store=RunStore(tmp_path))
    assert RunStore(tmp_path).load("search")["value"]["found"][0]["target"] == 0


def trigger(size, target=0, value=0.0):
    family = {"name": "patch", "shape": (2, 2, 2), "budget": 0.1}
    triggers = torch.full((1, 2, 2, 2), value)
    return {"family": family, "target": target, "triggers": triggers, "size": size}


def test_the_smallest_trigger_is_the_suspect_and_natural_ones_do_not_count(monkeypatch, taught):
    """A natural trigger goes on working on every purified model, and a backdoor's does not."""
    adapter, samples = taught("small-resnet")
    in_given = [trigger(0.9, 1, value=1.0), trigger(0.3, 0)]
    in_purified = [trigger(0.9, 1, value=1.0), trigger(0.5, 2, value=1.0), trigger(0.7, 0, 1.0)]
    searches = iter([in_given, in_purified])
    asked = []

    def success(adapter, samples, pools):
        asked.append([(target, float(values.mean())) for _, target, values in pools])
        return max((value for _, value in asked[-1]), default=0.0)

    monkeypatch.setattr(auto.registry, "load", lambda _, name: Weak)
    monkeypatch.setattr(auto, "_success", success)
    monkeypatch.setattr(Auto, "_found", lambda self, work: next(searches))
    defense = Auto(candidates=("weak",), fallback=("weak",), max_utility_drop=1.0)
    choice = defense.purify(adapter, samples).choice
    assert asked == [[(0, 0.0)], [(0, 0.0)], []]
    assert "good enough" in choice.why[1]
    assert "not good" not in choice.why[1]


def test_what_was_accepted_is_found_with_its_size_relative_to_the_budget(monkeypatch, taught):
    adapter, samples = taught("small-resnet")
    family = replace(adapter.trigger_families()[0], budget=0.2)
    record = Recovered(
        family=family,
        targets=torch.tensor([3, 4]),
        levels=torch.tensor([0.8, 0.8]),
        success=torch.tensor([1.0, 0.5]),
        size=torch.tensor([0.05, 0.1]),
        accepted=torch.tensor([True, False]),
        pool=torch.zeros(2, 1, *family.shape),
    )
    monkeypatch.setattr(auto, "recover", lambda *_, **__: [record])
    (found,) = Auto()._found(Purifying(adapter, samples, samples, Run(0)))
    assert found["target"] == 3
    assert found["size"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("size", "target", "counts"), [(0.6, 0, True), (0.7, 0, False), (0.3, 1, False)]
)
def test_what_is_found_in_a_purified_model_counts_if_it_may_be_the_suspects(size, target, counts):
    known = auto._Known(suspect=trigger(0.3, 0))
    assert known.like(trigger(size, target)) is counts
    assert auto._Known().like(trigger(size, target))


@pytest.mark.parametrize("settings", [{"tolerated": 1.5}, {"candidates": ()}])
def test_settings_that_are_none_are_refused(settings):
    with pytest.raises(BadInputError):
        Auto(**settings)
    with pytest.raises(BadInputError, match="other defenses"):
        Auto(candidates=("auto",))


@pytest.mark.parametrize("model", ["small-resnet", "hf-vit"])
def test_the_bank_holds_triggers_within_the_budget(taught, model):
    adapter, _ = taught(model)
    pools = list(auto._bank(adapter, 8, Run(seed=1)))
    assert {family.name for family, _, _ in pools} == {"patch", "additive"}
    for family, target, triggers in pools:
        assert 0 <= target < adapter.trigger_targets()
        assert triggers.shape[1:] == family.shape
        assert 1 <= len(triggers) <= 8
        assert triggers.min() >= 0
        assert triggers.max() <= 1
        assert (adapter.trigger_size(family, triggers) <= family.budget).all()
        assert (triggers.flatten(1).amax(1) > 0).all()
    again = list(auto._bank(adapter, 8, Run(seed=1)))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(pools, again, strict=True))
