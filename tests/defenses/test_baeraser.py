"""What BAERASER does with the triggers that it has recovered; the search has tests of its own."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F

from mmdefense.data.batch import split
from mmdefense.defenses import baeraser
from mmdefense.defenses.baeraser import BaEraser
from mmdefense.defenses.outcome import TriggerSearch
from mmdefense.errors import BadInputError
from mmdefense.kernels import inversion
from mmdefense.kernels.inversion import Recovered, success_of
from mmdefense.runtime.run import copy_state

TARGET = 2
SETTINGS = {"max_utility_drop": 1.0, "batch_size": 24}
ONE_STEP = SETTINGS | {"steps": 1, "rounds": 1, "lr": 1.0, "momentum": 0.0, "max_norm": None}


def record(adapter, accepted):
    """Return a find of two patches that cover the images with the corner of the target."""
    family = adapter.trigger_families()[0]
    pool = torch.rand(3, 2, *family.shape, generator=torch.Generator().manual_seed(0)) / 5
    pool[:, :, :, 4:, :4] += 0.8  # both the mask and the pattern
    return Recovered(
        family=family,
        targets=torch.arange(3),
        levels=torch.full((3,), 0.8),
        success=torch.tensor([0.2, 0.1, 0.95]),
        size=torch.full((3,), 0.05),
        accepted=torch.tensor(accepted),
        pool=pool.double(),
    )


@pytest.fixture
def finds(monkeypatch):
    """Let the searches, in turn, find what a test says; collect what they were called with."""

    def script(*found):
        calls, left = [], iter(found)

        def recover(adapter, samples, search, run, *, stage):
            calls.append((copy_state(adapter.model), samples, search, stage))
            return next(left)

        monkeypatch.setattr(inversion, "recover", recover)
        return calls

    return script


NOTHING, TRIGGER = [False, False, False], [False, False, True]


def test_where_nothing_is_found_the_model_comes_back_as_it_was(learnt, corners, finds):
    calls = finds([record(learnt, NOTHING)])
    result = BaEraser(**SETTINGS).purify(learnt, corners)
    assert len(calls) == 1
    for name, value in copy_state(learnt.model).items():
        assert torch.equal(value, result.model.state_dict()[name]), name
    assert result.guard.drop == 0
    assert result.history == [{"stage": "recover 0", "step": 1, "accepted": 0.0}]
    (plot,) = result.plots
    assert (plot.accepted, plot.works) == (NOTHING, TRIGGER)
    assert result.search == TriggerSearch(targets=3, found=0, working=1)


def test_samples_are_shown_with_the_trigger_that_works_best(learnt, corners, finds):
    finds([record(learnt, TRIGGER)])
    _, shown = BaEraser(**ONE_STEP).purify(learnt, corners).plots
    assert (shown.name, shown.success) == ("patch to 2", pytest.approx(0.95))
    clean, triggered = shown.clean, shown.triggered
    assert clean.shape == triggered.shape
    assert len(clean) == 10
    moved = (triggered - clean).abs().mean((0, 1))
    assert moved[4:, :4].mean() > 2 * moved[:4, 4:].mean()
    finds([record(learnt, NOTHING)])
    assert len(BaEraser(**ONE_STEP).purify(learnt, corners).plots) == 1


def test_the_search_sees_the_fit_part_and_these_settings(learnt, corners, finds):
    calls = finds([record(learnt, NOTHING)])
    settings = {
        "tau": 0.7,
        "levels": (0.4, 0.6),
        "search_steps": 11,
        "screening": 7,
        "entropy": 0.3,
    }
    BaEraser(seed=3, **settings, **SETTINGS).purify(learnt, corners)
    state, samples, search, _ = calls[0]
    assert samples.fingerprint() == split(corners, 0.2, 3)[0].fingerprint()
    found = (search.threshold, search.levels, search.steps, search.screening, search.entropy)
    assert found == tuple(settings.values())
    assert all(torch.equal(value, learnt.model.state_dict()[n]) for n, value in state.items())


def successes(result, turn=0):
    return {
        entry["step"]: entry["recovered_success"]
        for entry in result.history
        if entry["stage"] == f"unlearn {turn}" and "recovered_success" in entry
    }


def test_all_steps_are_done_and_the_recovered_triggers_fail(learnt, corners, finds):
    finds([record(learnt, TRIGGER)])
    pool = record(learnt, TRIGGER).pool[TARGET]
    family = learnt.trigger_families()[0]
    fit = split(corners, 0.2, 0)[0]
    assert success_of(learnt, fit, family, TARGET, pool) >= 0.5
    result = BaEraser(steps=100, rounds=1, **SETTINGS).purify(learnt, corners)
    looks = successes(result)
    assert list(looks) == [0, 20, 40, 60, 80, 100]
    assert looks[0] >= 0.5
    assert looks[100] <= 0.1
    assert success_of(result.adapter, fit, family, TARGET, pool) == looks[100]


def test_the_ascent_pauses_while_a_trigger_fails_and_goes_on_where_it_succeeds_again(
    learnt, corners, finds, monkeypatch
):
    """Two targets, whose success at each look is scripted."""
    script = {0: [0.9, 0.1, 0.0, 0.9], 2: [0.9, 0.9, 0.1, 0.1]}
    asked, looks = [], {target: iter(shares) for target, shares in script.items()}

    class Watched(type(learnt)):
        def target_log_probability(self, batch, targets):
            asked.append(int(targets[0]))
            return super().target_log_probability(batch, targets)

        def per_sample_loss(self, batch):
            if torch.is_grad_enabled() and self.model.training:
                asked.append("step")
            return super().per_sample_loss(batch)

    def success(adapter, samples, family, target, triggers):
        return next(looks[target])

    monkeypatch.setattr(baeraser, "success_of", success)
    learnt.__class__ = Watched
    finds([record(learnt, [True, False, True])])
    result = BaEraser(steps=60, rounds=1, stop=0.1, **SETTINGS).purify(learnt, corners)
    words = [word for word in asked if word == "step"]
    assert len(words) == 60
    ascents = [word for word in asked if word != "step"]
    assert ascents == [0, 2] * 10 + [2] * 20
    assert successes(result) == {0: 0.9, 20: 0.9, 40: 0.1, 60: 0.9}


def test_without_ascent_they_go_on_to_succeed(learnt, corners, finds):
    finds([record(learnt, TRIGGER)])
    defense = BaEraser(steps=60, rounds=1, ascent_weight=0.0, repair_weight=0.0, **SETTINGS)
    assert successes(defense.purify(learnt, corners))[60] > 0.1


def test_it_searches_again_in_what_it_has_cleaned_until_nothing_is_found(learnt, corners, finds):
    calls = finds(
        [record(learnt, TRIGGER)], [record(learnt, [True, False, False])], [record(learnt, NOTHING)]
    )
    defense = BaEraser(steps=4, rounds=5, **SETTINGS)
    result = defense.purify(learnt, corners)
    assert [stage for *_, stage in calls] == ["recover 0", "recover 1", "recover 2"]
    first, second, third = (state["0.weight"] for state, *_ in calls)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(third, result.model[0].weight)
    accepted = [entry["accepted"] for entry in result.history if "accepted" in entry]
    assert accepted == [1, 1, 0]


def test_no_more_rounds_are_done_than_allowed(learnt, corners, finds):
    calls = finds([record(learnt, TRIGGER)], [record(learnt, TRIGGER)])
    BaEraser(steps=2, rounds=2, **SETTINGS).purify(learnt, corners)
    assert len(calls) == 2


@pytest.mark.parametrize(("weight", "repair"), [(0.0, 0.0), (0.5, 0.0), (0.5, 2.0)])
def test_a_step_descends_the_clean_loss_and_ascends_on_the_triggers(
    learnt, corners, finds, weight, repair
):
    """Against explicit autograd; the stamped batch is seen in eval mode, as it is judged."""
    find = record(learnt, TRIGGER)
    finds([find])
    defense = BaEraser(ascent_weight=weight, repair_weight=repair, **ONE_STEP)
    result = defense.purify(learnt, corners)
    batch = split(corners, 0.2, 0)[0]
    order = step_order(learnt, corners, finds, find)
    inputs, labels = batch.inputs[order], batch.labels[order]
    fork = learnt.fork()
    model = fork.model.train()
    triggers = find.pool[TARGET][torch.arange(24) % 2]
    stamped = inputs + triggers[:, :1] * (triggers[:, 1:] - inputs)
    log_p = model.eval()(stamped).log_softmax(1)[:, TARGET].clamp(min=math.log(1 / 3))
    ascent = log_p[labels != TARGET].sum() / 24
    mended = F.cross_entropy(model(stamped), labels)
    clean = F.cross_entropy(model.train()(inputs), labels)
    loss = clean + weight * ascent + repair * mended
    expected = reference.gradient_of(loss, model.parameters())
    given = reference.flat(learnt.model.parameters()).detach()
    found = given - reference.flat(result.model.parameters()).detach()
    torch.testing.assert_close(found, expected)
    mean = result.model[1].running_mean
    only_clean = learnt.fork().model.train()
    only_clean(inputs)
    torch.testing.assert_close(mean, only_clean[1].running_mean)


def step_order(adapter, samples, finds, find):
    """Return which samples of the fit part the step took, in order, as it pairs them by place."""
    taken = []

    class Watched(type(adapter)):
        def per_sample_loss(self, batch):
            if self.model.training:  # triggered samples are seen in eval mode
                taken.append(batch.inputs)
            return super().per_sample_loss(batch)

    watched = adapter.fork()
    watched.__class__ = Watched
    finds([find])
    BaEraser(**ONE_STEP).purify(watched, samples)
    fit = split(samples, 0.2, 0)[0].inputs
    return [int((fit == image).flatten(1).all(1).nonzero()[0, 0]) for image in taken[-1]]


@pytest.mark.parametrize(("share", "moves"), [(1.1, True), (0.9, False)])
def test_the_ascent_ends_at_chance(learnt, corners, finds, share, moves):
    """With no clean loss beside it, nothing moves once the target is that unlikely."""

    class Blind(type(learnt)):
        def per_sample_loss(self, batch):
            return 0 * super().per_sample_loss(batch)

        def logits(self, inputs):  # the target's probability is just about the share of chance
            logits = 1e-3 * super().logits(inputs)
            odds = share / 3 / (1 - share / 3)
            return logits + torch.tensor([0.0, 0.0, math.log(2 * odds)], dtype=torch.float64)

    learnt.__class__ = Blind
    finds([record(learnt, TRIGGER)])
    result = BaEraser(drift_weight=0.0, stop=-1.0, **ONE_STEP).purify(learnt, corners)
    given = reference.flat(learnt.model.parameters())
    assert torch.equal(reference.flat(result.model.parameters()), given) is not moves


def test_the_drift_penalty_follows_the_importance_of_each_weight(
    learnt, corners, finds, monkeypatch
):
    """Two runs differ, after a second step, by the penalty alone: rate x beta x w x sign(drift)."""
    weights = []
    genuine = baeraser.fisher_diagonal

    def watch(*arguments, **settings):
        weights.append(genuine(*arguments, **settings))
        return weights[-1]

    monkeypatch.setattr(baeraser, "fisher_diagonal", watch)
    after = []
    for steps, beta in ((1, 0.0), (2, 0.0), (2, 1e-3)):
        finds([record(learnt, TRIGGER)])
        settings = ONE_STEP | {"steps": steps, "lr": 0.1, "drift_weight": beta}
        model = BaEraser(**settings).purify(learnt, corners).model
        after.append(reference.flat(model.parameters()).detach())
    given = reference.flat(learnt.model.parameters()).detach()
    importance = reference.flat(weights[-1])
    importance = importance / importance.mean()
    expected = 0.05 * 1e-3 * importance * (after[0] - given).sign()  # the cosine's second rate
    torch.testing.assert_close(after[1] - after[2], expected, rtol=1e-6, atol=1e-12)


def test_the_importance_is_measured_anew_on_the_moving_model(learnt, corners, finds):
    seen = []

    class Watched(type(learnt)):
        def sampled_loss(self, batch, generator):
            weight = copy_state(self.model)["0.weight"]
            if not seen or not torch.equal(seen[-1], weight):
                seen.append(weight)
            return super().sampled_loss(batch, generator)

    learnt.__class__ = Watched
    finds([record(learnt, TRIGGER)])
    # Without ascent the triggers go on to succeed, and no step is left out.
    BaEraser(steps=45, rounds=1, ascent_weight=0.0, **SETTINGS).purify(learnt, corners)
    assert len(seen) == 3  # at steps 0, 20 and 40
    assert torch.equal(seen[0], learnt.model[0].weight)


def test_several_finds_are_unlearnt_in_turn(learnt, corners, finds, monkeypatch):
    finds([record(learnt, [True, False, True])])
    asked = []

    class Watched(type(learnt)):
        def target_log_probability(self, batch, targets):
            if torch.is_grad_enabled():
                asked.append(int(targets[0]))
            return super().target_log_probability(batch, targets)

    learnt.__class__ = Watched
    BaEraser(steps=4, rounds=1, stop=-1.0, **SETTINGS).purify(learnt, corners)
    assert asked == [0, 2, 0, 2]


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"tau": 1.5}, {"levels": ()}, {"levels": (1.0,)}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(BadInputError, match=rf"{next(iter(wrong))} must .*, got"):
        BaEraser(**wrong)
