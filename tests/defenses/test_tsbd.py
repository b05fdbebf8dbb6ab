"""TSBD's choices against a list-of-floats version, and on which data it makes them."""

from __future__ import annotations

from itertools import groupby

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from mmdefense.data.batch import split
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses import tsbd
from mmdefense.defenses.tsbd import TSBD, unlearning_change
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import mean_score
from mmdefense.kernels.units import parameters_by_name
from mmdefense.kernels.unlearning import chance_level, unlearn
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run, copy_state

UNLEARNING = {"unlearn_lr": 0.5, "unlearn_batch_size": 8, "unlearn_epochs": 60}
QUICK = UNLEARNING | {"max_utility_drop": 1.0}


def change_of(adapter, samples, holdout=0.2, seed=0):
    """Return what TSBD takes for the change of the weights."""
    settings = {"lr": 0.5, "batch_size": 8, "max_epochs": 60}
    return unlearning_change(adapter, split(samples, holdout, seed)[0], Run(seed), **settings)


def zeroed(given, purified):
    """Return the (name, index) of the weights that became zero; the others must be as given."""
    hit = {name: (value == 0) & (given[name] != 0) for name, value in purified.items()}
    for name, value in purified.items():
        assert torch.equal(value[~hit[name]], given[name][~hit[name]]), name
    return reference.where(hit)


def expected_zeros(change, groups, ratio, share):
    scores = [
        [reference.unit_sum(change, group, unit) for unit in range(group.size)] for group in groups
    ]
    order = reference.ranking(scores, descending=True)
    chosen = order[: int(ratio * len(order))]
    return reference.sub_weights(change, groups, chosen, share) if chosen else set()


@pytest.mark.parametrize(("ratio", "share"), [(0.3, 0.7), (0.6, 0.25), (1.0, 1.0), (0.1, 0.7)])
def test_the_zeroed_weights_are_those_of_the_list_of_floats_version(learnt, corners, ratio, share):
    defense = TSBD(ratio=ratio, sub_ratio=share, fine_tuning="none", **QUICK)
    result = defense.purify(learnt, corners)
    groups = learnt.unit_groups()
    assert sum(group.size for group in groups) == 7  # filters and hidden units, not the classes
    expected = expected_zeros(change_of(learnt, corners), groups, ratio, share)
    found = zeroed(copy_state(learnt.model), copy_state(result.model))
    assert found == expected
    assert (len(found) == 0) is (ratio == 0.1)  # a tenth of seven units is none


def test_the_change_is_how_far_unlearning_moves_each_parameter(learnt, corners):
    given = copy_state(learnt.model)
    settings = {"stop": 0.5, "lr": 0.5, "batch_size": 8, "max_epochs": 60}
    change = unlearning_change(learnt, corners, Run(seed=3), **settings)
    assert all(torch.equal(value, given[name]) for name, value in copy_state(learnt.model).items())
    unlearn(learnt, corners, Run(seed=3), **settings)
    after = parameters_by_name(learnt.model)
    assert change.keys() == after.keys()
    for name, value in change.items():
        torch.testing.assert_close(value, (after[name] - given[name]).abs())
        assert value.count_nonzero() or name == "0.bias"  # BatchNorm takes it away


def unlearning_scores(result):
    return [e["score"] for e in result.history if e["stage"] == "unlearn" and "score" in e]


def test_unlearning_ends_at_chance(learnt, corners):
    result = TSBD(fine_tuning="none", **QUICK).purify(learnt, corners)
    scores = unlearning_scores(result)
    assert scores[-1] <= 1 / 3 < min(scores[:-1])


def test_unlearning_ends_at_the_share_of_the_most_frequent_class(learnt, corners):
    often = torch.cat([torch.arange(30)[corners.labels == 0].repeat(2), torch.arange(30)])
    result = TSBD(fine_tuning="none", **QUICK).purify(learnt, corners.subset(often))
    scores = unlearning_scores(result)
    fit = split(corners.subset(often), 0.2, 0)[0]
    share = float((fit.labels == 0).double().mean())
    assert 0.55 < share < 0.65
    assert scores[-1] <= share < min(scores[:-1])


def test_a_given_stop_replaces_chance(learnt, corners):
    result = TSBD(fine_tuning="none", unlearn_stop=0.8, **QUICK).purify(learnt, corners)
    scores = unlearning_scores(result)
    assert scores[-1] <= 0.8 < min(scores[:-1], default=1)


CANDIDATES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)


def scores_of_candidates(adapter, change, samples):
    """Return the score on ``samples`` after zeroing for each candidate, one weight at a time."""
    found = []
    for ratio in CANDIDATES:
        fork = adapter.fork()
        parameters = dict(fork.model.named_parameters())
        with torch.no_grad():
            for name, index in expected_zeros(change, adapter.unit_groups(), ratio, 0.7):
                parameters[name][index] = 0
        found.append(mean_score(fork, samples))
    return found


def chosen_by(scores, before):
    enough = before - (before - 1 / 3) / 4
    return next((r for r, s in zip(CANDIDATES, scores, strict=True) if s <= enough), CANDIDATES[-1])


def test_the_ratio_is_chosen_on_the_holdout_part(learnt, corners):
    seed = 1  # of those whose fit part would choose otherwise
    fit, held = split(corners, 0.5, seed)
    defense = TSBD(candidates=CANDIDATES, fine_tuning="none", holdout=0.5, seed=seed, **QUICK)
    result = defense.purify(learnt, corners)
    change = change_of(learnt, corners, 0.5, seed)
    choices = [
        chosen_by(scores_of_candidates(learnt, change, part), mean_score(learnt, part))
        for part in (held, fit)
    ]
    chosen = next(e["ratio"] for e in result.history if e["stage"] == "reinitialise")
    assert chosen == choices[0] != choices[1]


def test_a_chosen_ratio_leaves_what_a_given_one_does(learnt, corners, monkeypatch):
    """Hidden units change more in all, filters more in each weight, and so take their place."""
    noise = torch.Generator().manual_seed(0)
    change = {n: torch.rand(v.shape, generator=noise) for n, v in learnt.model.named_parameters()}
    change["0.weight"] += 10
    change["4.weight"] += 5
    monkeypatch.setattr(tsbd, "unlearning_change", lambda *_, **__: change)
    settings = {"sub_ratio": 0.05, "fine_tuning": "none"} | QUICK
    chosen = TSBD(candidates=(0.6, 0.9), **settings).purify(learnt, corners)
    given = TSBD(ratio=0.9, **settings).purify(learnt, corners)
    assert next(e["ratio"] for e in chosen.history if e["stage"] == "reinitialise") == 0.9
    for name, value in copy_state(given.model).items():
        assert torch.equal(value, chosen.model.state_dict()[name]), name


def test_milder_runs_neither_unlearn_nor_choose_again(learnt, corners):
    events = []
    harmful = TSBD(candidates=(1.0,), lr=0.0, steps=1, restarts=2, max_utility_drop=0, **UNLEARNING)
    harmful.purify(learnt, corners, progress=events.append)
    stages = [stage for stage, _ in groupby(event.stage for event in events)]
    first = [stage for stage in stages if "fold" not in stage]
    assert sum("reinitialise" in stage for stage in first) > 1
    assert sum("unlearn" in stage for stage in first) == 1
    assert sum("choose" in stage for stage in first) == 1


def test_a_given_ratio_is_not_chosen(learnt, corners):
    result = TSBD(ratio=0.45, fine_tuning="none", **QUICK).purify(learnt, corners)
    assert next(e["ratio"] for e in result.history if e["stage"] == "reinitialise") == 0.45
    assert result.plots[0].reset == 3  # int(0.45 * 7)


def test_where_no_ratio_is_enough_the_largest_is_taken(learnt, corners):
    defense = TSBD(candidates=(0.01, 0.02), fine_tuning="none", **QUICK)
    result = defense.purify(learnt, corners)
    assert next(e["ratio"] for e in result.history if e["stage"] == "reinitialise") == 0.02


def test_the_defaults_reach_below_a_hundredth_of_the_units(corners, monkeypatch):
    """A wide net in which three units of a thousand do all the work: to zero ten is too much."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 3)).double()
    means = torch.stack([corners.inputs[corners.labels == k].flatten(1).mean(0) for k in range(3)])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[1].weight[:3] = means - means.mean(0)
        net[3].weight[:, :3] = torch.eye(3)
        net[3].bias[0] = -1e-3  # a sample that no unit sees is not of the first class
    adapter = adapt(net, example=corners.inputs[:1])
    assert mean_score(adapter, corners) == 1
    change = {name: value.detach().abs() for name, value in net.named_parameters()}
    monkeypatch.setattr(tsbd, "unlearning_change", lambda *_, **__: change)
    result = TSBD(fine_tuning="none", sub_ratio=1.0, **QUICK).purify(adapter, corners)
    assert result.plots[0].reset < 3
    assert mean_score(result.adapter, corners) > 1 / 3


def test_no_share_is_scored_twice(learnt, corners):
    """A share of less than one unit of seven is the given model, and both others are one unit."""
    scored = []

    class Watched(type(learnt)):
        def score(self, batch):
            scored[-1] += 1
            return super().score(batch)

    learnt.__class__ = Watched
    for candidates in ((0.15,), (0.01, 0.02, 0.15, 0.2)):
        scored.append(0)
        TSBD(candidates=candidates, fine_tuning="none", **QUICK).purify(learnt, corners)
    assert scored[0] == scored[1]


ONE_STEP = {
    "steps": 1,
    "lr": 0.1,
    "momentum": 0.0,
    "max_norm": None,
    "batch_size": 24,
    "restarts": 0,
}


def purified(adapter, samples, **settings):
    return TSBD(ratio=0.5, **QUICK | settings).purify(adapter, samples)


def flat_weights(result):
    return reference.flat(result.model.parameters()).detach()


@pytest.mark.parametrize(
    ("scheme", "radius", "mix"), [("vanilla", 0.05, 0.7), ("activeness-aware", 0.2, 0.6)]
)
def test_a_step_of_fine_tuning_starts_at_the_zeroed_weights(learnt, corners, scheme, radius, mix):
    """Against the formula: (1 - a) g(w) + a g(w + r g / ||g||), the batch being the fit part."""
    zero = purified(learnt, corners, fine_tuning="none").adapter
    settings = ONE_STEP | {"fine_tuning": scheme, "radius": radius, "mix": mix}
    found = flat_weights(purified(learnt, corners, **settings))
    fit = split(corners, 0.2, 0)[0].everything()
    parameters = list(zero.model.train().parameters())

    def gradient():
        loss = F.cross_entropy(zero.logits(fit.inputs), fit.labels)
        return reference.gradient_of(loss, parameters)

    start, first = reference.flat(parameters).detach().clone(), gradient()
    torch.nn.utils.vector_to_parameters(start + radius * first / first.norm(), parameters)
    second = gradient() if scheme == "activeness-aware" else first
    torch.testing.assert_close(found, start - 0.1 * ((1 - mix) * first + mix * second))
    assert (second - first).norm() > 0.01 * first.norm() or scheme == "vanilla"


def test_vanilla_is_activeness_aware_at_mix_zero(learnt, corners):
    vanilla = purified(learnt, corners, fine_tuning="vanilla", steps=5, batch_size=8)
    unmixed = purified(learnt, corners, mix=0.0, steps=5, batch_size=8)
    mixed = purified(learnt, corners, steps=5, batch_size=8)
    torch.testing.assert_close(copy_state(vanilla.model), copy_state(unmixed.model))
    assert (flat_weights(mixed) - flat_weights(vanilla)).norm() > 1e-4


def test_no_fine_tuning_trains_nothing(learnt, corners):
    stages = {entry["stage"] for entry in purified(learnt, corners, fine_tuning="none").history}
    assert "fine-tune" not in stages
    stages = {entry["stage"] for entry in purified(learnt, corners, steps=2).history}
    assert "fine-tune" in stages


def test_the_plots_hold_a_value_per_unit(learnt, corners):
    change, active = purified(learnt, corners, steps=2).plots
    groups = learnt.unit_groups()
    moved = change_of(learnt, corners)
    scores = [reference.unit_sum(moved, g, u) for g in groups for u in range(g.size)]
    expected = torch.tensor(sorted(scores, reverse=True), dtype=torch.float64)
    torch.testing.assert_close(change.change.sort(descending=True)[0], expected)
    assert change.reset == 3
    assert [len(active.before), len(active.after)] == [7, 7]


@pytest.mark.parametrize(
    "wrong", [{"ratio": 1.5}, {"ratio": -0.1}, {"sub_ratio": 0.0}, {"candidates": ()}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(BadInputError, match=rf"{next(iter(wrong))} must .* got"):
        TSBD(**wrong)


def test_samples_without_strata_leave_chance_to_the_adapter(learnt):
    class Unlabelled(LabelledSamples):
        def strata(self):
            return None

    samples = Unlabelled(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert chance_level(learnt, samples) == pytest.approx(1 / 3)
