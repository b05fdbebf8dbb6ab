"""Which state the guard returns, on scores that are made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from clocks import Clock
from torch import nn

from mmdefense.checkpoints.runs import RunStore
from mmdefense.data.batch import folds, split
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses.base import Defense, TrainingDefense
from mmdefense.defenses.guard import judge
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.errors import BadInputError, DivergenceError
from mmdefense.plots.weight_change import WeightChange
from mmdefense.runtime.deadline import Deadline
from mmdefense_adapters.torch_classifier import TorchClassifier

HELD = 100


class Dial(nn.Module):
    """Its one weight is the share of the samples that it is right about."""

    def __init__(self, level=1.0, classes=HELD):
        super().__init__()
        self.classes = classes
        self.level = nn.Parameter(torch.tensor(level))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, images):
        return images.flatten(1)[:, :1] * torch.ones(self.classes)


class DialAdapter(TorchClassifier):
    def score(self, batch):
        return (batch.inputs.flatten(1)[:, 0] < self.model.level).float()


@dataclass(frozen=True, kw_only=True)
class Scripted(Defense):
    """Does what it is told.

    Attributes:
        script: Receives what a defense works with.
    """

    script: Callable[[Any], object]
    holdout: float = 0.5

    def _run(self, work):
        self.script(work)


@pytest.fixture
def adapter():
    return DialAdapter(Dial())


@pytest.fixture
def clean():
    """A hundred classes of two equal samples: each part of a split in half has one of each.

    So every drop is a whole number of hundredths.
    """
    labels = torch.arange(HELD).repeat_interleave(2)
    return LabelledSamples(((labels + 0.5) / HELD).view(-1, 1, 1, 1), labels)


def levels(*given):
    """Return a script that keeps a state for each level but the last, which is final."""

    def script(work):
        for level in given:
            with torch.no_grad():
                work.adapter.model.level.fill_(level)
            if level is not given[-1]:
                work.run.snapshot(f"at {level}", work.adapter.model)

    return script


def purify(adapter, clean, *given, bound=0.02):
    result = Scripted(script=levels(*given), max_utility_drop=bound).purify(adapter, clean)
    return result.guard, result.model.level.item()


def test_a_final_state_within_the_bound_is_returned(adapter, clean):
    guard, level = purify(adapter, clean, 0.5, 0.99)
    assert (guard.state, guard.violated, level) == ("final", False, pytest.approx(0.99))
    assert (guard.before, guard.samples, guard.bound) == (1.0, 2 * HELD, 0.02)  # of both halves
    assert guard.after == pytest.approx(0.99)
    assert guard.drop == pytest.approx(0.01)
    assert guard.verdict == "not decidable"  # 0.01 +- 0.0116 against 0.02
    assert "bound not decidable with 200 held-out samples (about 271 would decide)" in guard.message
    assert "accuracy went from 1.000 to 0.99" in guard.message
    assert guard.instead == ""


def test_a_state_of_when_the_time_was_up_is_judged_and_named(adapter, clean):
    def script(work):
        levels(0.5, 0.99)(work)
        work.run.report("purify", 20, 100)

    result = Scripted(script=script).purify(adapter, clean, max_seconds=0)
    assert result.stopped == "purify, step 20 of 100"
    assert result.guard.state == "purify, step 20 of 100, when time ran out"
    assert result.model.level.item() == pytest.approx(0.99)
    in_time = Scripted(script=script).purify(adapter, clean, max_seconds=1000)
    assert (in_time.stopped, in_time.guard.state) == ("", "final")


def test_training_ends_early_enough_for_the_guard(clean):
    clock = Clock()

    class Slow(DialAdapter):
        def score(self, batch):
            clock.now += 5 * len(batch) / HELD
            return super().score(batch)

    adapter = Slow(Dial())

    def script(work):
        for step in range(1, 1000):
            clock.now += 1
            work.run.report("purify", step, 1000)

    result = Scripted(script=script).purify(adapter, clean, max_seconds=Deadline(60, clock))
    # 55 s are left after the first evaluation, of which a tenth is kept.
    assert result.stopped == "purify, step 50 of 1000"
    assert result.seconds == clock.now == 60


def test_no_other_state_is_judged_when_the_time_is_up(adapter, clean):
    def script(work):
        levels(0.9, 0.5)(work)
        work.run.report("purify", 20, 100)

    result = Scripted(script=script).purify(adapter, clean, max_seconds=0)
    assert result.guard.violated
    assert result.model.level.item() == pytest.approx(0.5)


def test_a_better_model_passes(adapter, clean):
    guard, _ = purify(DialAdapter(Dial(0.5)), clean, 0.8)
    assert guard.drop == pytest.approx(-0.3)
    assert not guard.violated


@pytest.mark.parametrize(
    ("wrong", "bound", "verdict"),
    [
        (0, 0.02, "kept"),  # half a sample is the error: 0 to 0.0082
        (1, 0.02, "not decidable"),
        (2, 0.02, "not decidable"),
        (2, 0.1, "kept"),
        (15, 0.02, "violated"),
        (100, 1.0, "kept"),
    ],
)
def test_the_guard_has_three_verdicts(adapter, clean, wrong, bound, verdict):
    guard, _ = purify(adapter, clean, 1 - wrong / 100, bound=bound)
    if verdict != "violated":
        assert (guard.state, guard.verdict) == ("final", verdict)
        return
    whole, _ = purify(adapter, clean, 1 - wrong / 100, bound=1.0)
    assert replace(whole, bound=bound).verdict == "violated"


@pytest.mark.parametrize("wrong", [1, 3, 4])
def test_as_many_samples_as_it_names_decide(adapter, clean, wrong):
    whole, _ = purify(adapter, clean, 1 - wrong / 100, bound=1.0)
    guard = replace(whole, bound=0.02)
    assert guard.verdict == "not decidable"
    fewer, enough = (replace(guard, samples=count) for count in (guard.needed - 2, guard.needed))
    assert fewer.verdict == "not decidable"
    assert enough.verdict == ("kept" if guard.drop < guard.bound else "violated")
    assert (enough.needed, enough.undecided) == (None, "")


def test_a_drop_at_the_bound_is_decided_by_no_number(adapter, clean):
    guard, _ = purify(adapter, clean, 0.98)
    assert (guard.verdict, guard.needed) == ("not decidable", None)
    assert guard.undecided == "not decidable with 200 held-out samples"


# Of 100 paired samples k turn wrong: the drop is k/100, its standard error that of k ones and
# 100 - k zeros, and the half-width of the one-sided 95 % interval 1.645 of that.
@pytest.mark.parametrize(
    ("wrong", "margin", "passes"),
    [(2, 0.023146, True), (3, 0.028203, False), (30, 0.075763, False)],
)
def test_a_state_passes_by_its_mean_drop_and_the_interval_is_that_of_paired_samples(
    adapter, clean, wrong, margin, passes
):
    guard, _ = purify(adapter, clean, 1 - wrong / 100)
    assert (guard.state == "final") is passes
    whole, _ = purify(adapter, clean, 1 - wrong / 100, bound=1.0)
    assert whole.margin == pytest.approx(margin, abs=1e-5)


def test_no_change_at_all_has_the_margin_of_half_a_sample(adapter, clean):
    guard, _ = purify(adapter, clean, 1.0)
    assert guard.drop == 0
    assert guard.margin == pytest.approx(1.645 / 200)


def test_the_interval_is_that_of_pairs_and_not_of_two_means(clean):
    """A model that is right about other samples has no drop, but a wide interval."""
    result = Scripted(script=levels(0.5), max_utility_drop=1.0).purify(OtherHalf(Dial()), clean)
    assert result.guard.drop == pytest.approx(0)
    assert result.guard.margin == pytest.approx(1.645 * (100 / 99) ** 0.5 / 10)


class OtherHalf(DialAdapter):
    """The given model is right below one half, every other above."""

    def score(self, batch):
        below = batch.inputs.flatten(1)[:, 0] < 0.5
        return (below == (self.model.level == 1)).float()


def test_the_latest_state_that_keeps_the_bound_comes_next(adapter, clean):
    guard, level = purify(adapter, clean, 0.99, 0.98, 0.4, 0.2)
    assert (guard.state, guard.violated) == ("at 0.98", False)
    assert level == pytest.approx(0.98)
    assert "returned the state 'at 0.98'" in guard.message


@pytest.mark.parametrize(("bound", "share", "level"), [(0.75, 70, 0.3), (0.45, 40, 0.6)])
def test_then_states_between_the_given_and_the_final_one(adapter, clean, bound, share, level):
    guard, found = purify(adapter, clean, 0.0, bound=bound)
    assert guard.state == f"{share}% of the way to the final state"
    assert found == pytest.approx(level)
    assert not guard.violated


def test_a_state_on_the_way_keeps_the_final_counts(adapter, clean):
    def script(work):
        levels(0.0)(work)
        work.adapter.model.count += 5

    result = Scripted(script=script, max_utility_drop=0.5).purify(adapter, clean)
    assert "of the way" in result.guard.state
    assert result.model.count == 12


def test_where_all_states_are_as_bad_the_most_purified_is_returned_and_the_violation_said(
    adapter, clean
):
    guard, level = purify(adapter, clean, -3.0, -20.0, bound=0.0)
    assert (guard.state, guard.violated, level) == ("final", True, -20.0)
    assert (guard.after, guard.drop) == (0.0, 1.0)
    assert "bound VIOLATED by every state" in guard.message


def test_of_violating_states_the_least_harmful_is_returned(adapter, clean):
    guard, level = purify(adapter, clean, 0.7, 0.8, -20.0, bound=0.0)
    assert (guard.state, guard.violated) == ("at 0.8", True)
    assert level == pytest.approx(0.8)


@pytest.mark.parametrize("final", [-1000.0, -3.0, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("bound", [0.0, 0.02, 0.3])
def test_the_victim_itself_never_comes_back(adapter, clean, final, bound):
    guard, level = purify(adapter, clean, final, bound=bound)
    assert level != 1.0
    assert adapter.model.level == 1
    assert guard.violated == (guard.drop - guard.margin > bound)


def test_the_measures_are_those_of_the_model_that_is_returned(adapter, clean):
    result = Scripted(script=levels(0.6, 0.2), max_utility_drop=0.4).purify(adapter, clean)
    held = result.adapter.samples(clean)
    found = result.adapter.score(held.everything()).mean()
    assert float(found) == pytest.approx(result.guard.after)


def test_fit_and_holdout_are_apart_and_together_all():
    parts = {}

    def script(work):
        parts["fit"], parts["holdout"] = work.fit.everything(), work.holdout.everything()

    inputs, labels = torch.arange(40.0).view(-1, 1, 1, 1) / 40, torch.arange(40) % 2
    adapter = DialAdapter(Dial(classes=2))
    Scripted(script=script, holdout=0.25).purify(adapter, LabelledSamples(inputs, labels))
    seen = {name: set(part.inputs.flatten().tolist()) for name, part in parts.items()}
    assert len(seen["holdout"]) == 10
    assert seen["fit"].isdisjoint(seen["holdout"])
    assert len(seen["fit"] | seen["holdout"]) == 40
    assert parts["holdout"].labels.sum() == 5


def test_a_single_sample_cannot_be_split(adapter):
    one = LabelledSamples(torch.rand(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(BadInputError, match="at least"):
        Scripted(script=levels(1.0)).purify(adapter, one)


@dataclass(frozen=True, kw_only=True)
class Rated(TrainingDefense):
    """Costs as much of the metric as its rate says; above ``limit`` it diverges.

    Attributes:
        limit: The largest rate that keeps the loss finite.
        tried: Filled with the rates that were run.
    """

    limit: float = 1.0
    tried: list[float] = field(default_factory=list)
    holdout: float = 0.5
    restarts: int = 3

    def _run(self, work):
        self.tried.append(self.lr)
        assert work.adapter.model.level == 1  # each begins with the given model
        if self.lr > self.limit:
            raise DivergenceError("the loss stopped being finite", {})
        work.run.once("fisher", lambda: {"of": self.lr})
        levels(-20.0, 1 - self.lr)(work)
        work.run.report("purify", 1, 1, lr=self.lr)
        work.plots.append(WeightChange([self.lr]))


def test_a_smaller_rate_comes_before_states_far_from_the_final_one(adapter, clean):
    events, defense = [], Rated(lr=0.4, max_utility_drop=0.1)
    result = defense.purify(adapter, clean, progress=events.append)
    # 60 % of 0.2, and what passes at 0.1, are judged on the other half as well.
    assert defense.tried == [0.4, 0.2, 0.2, 0.1, 0.1]
    assert result.model.level.item() == pytest.approx(0.9)
    assert (result.guard.state, result.guard.rate) == ("final", 0.25)
    assert result.guard.instead == "final, at 0.25 times the learning rate"
    assert "the state 'final, at 0.25 times the learning rate'" in result.guard.message
    assert [plot.change for plot in result.plots] == [[0.1]]
    assert [event.note for event in events if event.note] == [
        "too much utility is lost; restarting at 0.5 times the learning rate",
        "100 held-out samples are too few to decide; repeating the training on up to 2 folds of "
        "the clean data",
        "too much utility is lost; restarting at 0.25 times the learning rate",
    ]
    told = [(entry["stage"], entry["lr"]) for entry in result.history]
    assert told == [("purify", 0.4), ("at 0.25 times the learning rate: purify", 0.1)]


def test_a_state_near_to_the_final_one_comes_before_a_smaller_rate(adapter, clean):
    defense = Rated(lr=0.4, max_utility_drop=0.37)
    result = defense.purify(adapter, clean)
    assert defense.tried == [0.4, 0.4]  # the other half does not decide either
    assert result.guard.instead == "90% of the way to the final state"


def test_where_every_rate_costs_too_much_a_state_on_the_way_is_taken(adapter, clean):
    defense = Rated(lr=0.8, max_utility_drop=0.06, restarts=1)
    result = defense.purify(adapter, clean)
    assert defense.tried == [0.8, 0.4, 0.8]  # the last on the other half
    assert (result.guard.rate, result.guard.violated) == (1.0, False)
    assert result.guard.state == "10% of the way to the final state"
    assert [plot.change for plot in result.plots] == [[0.8]]


def test_where_none_keeps_the_bound_the_least_harmful_of_all_is_returned(clean):
    class Rough(DialAdapter):
        """Right about nothing at a level between the given one and the final ones."""

        def score(self, batch):
            known = min(abs(float(self.model.level) - level) for level in (1, 0.6, 0.2)) < 1e-3
            return super().score(batch) * known

    defense = Rated(lr=0.8, max_utility_drop=0.0, restarts=1)
    result = defense.purify(Rough(Dial()), clean)
    assert (result.guard.state, result.guard.rate) == ("final", 0.5)
    assert result.guard.violated
    assert "VIOLATED by every state" in result.guard.message
    assert "at 0.5 times the learning rate" in result.guard.message
    assert result.model.level.item() == pytest.approx(0.6)


@dataclass(frozen=True, kw_only=True)
class Redrawn(RateFindingDefense):
    """Keeps half of the score below a rate of 0.5 and a tenth above, as if a layer was redrawn."""

    tried: list[float] = field(default_factory=list)
    holdout: float = 0.5

    def _run(self, work):
        self.tried.append(self.lr)
        levels(0.5 if self.lr < 0.5 else 0.1)(work)


def test_where_no_rate_keeps_most_of_the_score_the_best_one_is_the_measure(adapter, clean):
    defense = Redrawn(restarts=3, max_utility_drop=1.0)
    assert defense.purify(adapter, clean).guard.rate == 0.25
    assert defense.tried == [1.28, 0.64, 0.32, 0.16, 0.32]  # four short trainings, then in full


def test_a_milder_run_that_is_cut_off_is_not_taken(adapter, clean):
    class Slow(Rated):
        def _run(self, work):
            if self.lr < 0.8:  # the model is still the given one, which would keep any bound
                work.run.deadline = Deadline(0.0)
                work.run.report("purify", 1, 2)
            super()._run(work)

    result = Slow(lr=0.8, max_utility_drop=0.06).purify(adapter, clean, max_seconds=3600)
    assert result.model.level.item() == pytest.approx(0.92)
    assert result.guard.state == "10% of the way to the final state"
    assert result.stopped == "purify, step 1 of 2"


@dataclass(frozen=True, kw_only=True)
class Lucky(TrainingDefense):
    """Costs a share of the metric that depends on the fold: ``drops`` in the order of the calls."""

    drops: tuple[float, ...]
    tried: list[int] = field(default_factory=list)
    restarts: int = 0

    def _run(self, work):
        assert work.adapter.model.level == 1  # each begins with the given model
        self.tried.append(len(work.fit))
        levels(1 - self.drops[len(self.tried) - 1])(work)


@pytest.fixture
def few():
    """Seventy classes of one sample, of which 14 are held out at a time."""
    labels = torch.arange(70)
    return LabelledSamples(((labels + 0.5) / 70).view(-1, 1, 1, 1), labels)


def test_what_one_fold_leaves_open_the_others_decide(few):
    """One of 14 turns wrong, 7 points; of the other 56 none does."""
    defense = Lucky(drops=(0.05, 0.0, 0.0, 0.0, 0.0))
    guard = defense.purify(DialAdapter(Dial(classes=70)), few).guard
    assert defense.tried == [56] * 5
    assert (guard.state, guard.samples, guard.folds) == ("final", 70, 5)
    assert guard.drop == pytest.approx(1 / 70)
    assert "on 70 held-out samples of 5 folds" in guard.message


def test_a_drop_on_every_fold_does_not_pass_for_chance(few):
    """Two or three of 14 turn wrong, which alone could be chance with a bound of 7 points."""
    defense = Lucky(drops=(0.18,) * 5, max_utility_drop=0.07)
    guard = defense.purify(DialAdapter(Dial(classes=70)), few).guard
    assert guard.state == "30% of the way to the final state"
    assert guard.drop <= 0.07
    assert guard.folds == 5


def test_what_one_fold_lets_pass_by_chance_the_others_refuse(few):
    """Of 14 none turns wrong, of the other 56 one in seven."""
    defense = Lucky(drops=(0.0, *(1 / 7,) * 4))
    guard = defense.purify(DialAdapter(Dial(classes=70)), few).guard
    assert guard.state != "final"
    assert guard.folds > 1
    assert guard.drop <= 0.02


def test_a_clear_verdict_needs_no_other_fold(few):
    defense = Lucky(drops=(0.0,), max_utility_drop=0.1)
    defense.purify(DialAdapter(Dial(classes=70)), few)
    assert defense.tried == [56]


def test_a_fold_that_the_time_cuts_off_does_not_count(few):
    class Slow(Lucky):
        def _run(self, work):
            if self.tried:
                work.run.deadline = Deadline(0.0)
                work.run.report("purify", 1, 2)
            super()._run(work)

    guard = Slow(drops=(0.05,)).purify(DialAdapter(Dial(classes=70)), few, max_seconds=3600).guard
    assert (guard.folds, guard.samples) == (1, 14)
    assert guard.drop <= 0.02


def test_a_rate_that_diverges_on_another_fold_is_not_taken(few):
    class Wild(Lucky):
        def _run(self, work):
            if self.restarts == 1 and self.tried:
                raise DivergenceError("the loss stopped being finite", {})
            super()._run(work)

    guard = (
        Wild(drops=(0.05, *(0.0,) * 5), restarts=1).purify(DialAdapter(Dial(classes=70)), few).guard
    )
    assert (guard.state, guard.rate, guard.drop) == ("final", 0.5, 0.0)


def test_each_sample_is_held_out_once(few):
    parts = folds(few, 0.2, seed=3)
    held = torch.cat([holdout.labels for _, holdout in parts])
    assert held.sort().values.tolist() == list(range(70))
    for fit, holdout in parts:
        both = torch.cat([fit.labels, holdout.labels])
        assert both.sort().values.tolist() == list(range(70))
    first = split(few, 0.2, seed=3)
    assert torch.equal(first[1].labels, parts[0][1].labels)


@pytest.mark.parametrize(("total", "share", "count"), [(2, 0.2, 2), (3, 0.5, 2), (9, 0.9, 2)])
def test_folds_of_few_samples_are_never_empty(few, total, share, count):
    parts = folds(few.subset(torch.arange(total)), share, seed=0)
    assert len(parts) == count
    assert all(len(fit) and len(holdout) for fit, holdout in parts)


def test_what_does_not_depend_on_the_rate_is_computed_once(adapter, clean, tmp_path):
    computed = []

    class Measured(Rated):
        def _run(self, work):
            kept = work.run.once("measure", lambda: self.measured(work), at_any_rate=True)
            assert kept["of"] == 0.8
            super()._run(work)

        def measured(self, work):
            computed.append(self.lr)
            return {"of": self.lr}

    defense = Measured(lr=0.8, max_utility_drop=0.0, restarts=2)
    defense.purify(adapter, clean, store=RunStore(tmp_path))
    defense.purify(adapter, clean, store=RunStore(tmp_path))  # reads it from the store
    assert computed == [0.8]


@pytest.mark.parametrize("settings", [{"restarts": 0}, {"steps": 0}])
def test_without_restarts_it_is_run_once(adapter, clean, settings):
    defense = Rated(lr=0.8, max_utility_drop=0.0, **settings)
    defense.purify(adapter, clean)
    assert defense.tried == [0.8]


def test_a_loss_that_is_not_finite_is_met_by_a_smaller_rate(adapter, clean):
    defense = Rated(lr=0.08, limit=0.03, max_utility_drop=0.5)
    result = defense.purify(adapter, clean)
    assert defense.tried == [0.08, 0.04, 0.02]
    assert result.guard.rate == 0.25


def test_one_that_diverges_at_every_rate_says_so(adapter, clean):
    defense = Rated(lr=0.8, limit=0.0)
    with pytest.raises(DivergenceError, match="stopped being finite"):
        defense.purify(adapter, clean)
    assert defense.tried == [0.8, 0.4, 0.2, 0.1]


def test_each_attempt_keeps_files_of_its_own(adapter, clean, tmp_path):
    for _ in range(2):  # the second time all is read from the store
        defense = Rated(lr=0.2, max_utility_drop=0.1)
        result = defense.purify(adapter, clean, store=RunStore(tmp_path))
        assert result.model.level.item() == pytest.approx(0.9)
    part = RunStore(tmp_path / "at 0.5 times the learning rate")
    assert [store.load("fisher")["value"]["of"] for store in (RunStore(tmp_path), part)] == [
        0.2,
        0.1,
    ]


@pytest.mark.parametrize(("rate", "low"), [(1.0, False), (1 / 32, False), (1 / 64, True)])
def test_a_rate_at_which_backdoors_stay_is_said(rate, low):
    guard = judge(torch.ones(HELD), torch.ones(HELD), 0.02, "final", rate)
    assert guard.passes
    assert ("a backdoor often stays; more clean samples" in guard.message) == low
    assert bool(guard.caution) == low
