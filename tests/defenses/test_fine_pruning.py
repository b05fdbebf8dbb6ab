"""Pruning against pruning unit by unit and evaluating again, on a ResNet and on a ViT."""

from __future__ import annotations

import pytest
import torch

from mmdefense.data.batch import split
from mmdefense.defenses import fine_pruning
from mmdefense.defenses.fine_pruning import FinePruning, Pruning
from mmdefense.defenses.tsbd import unlearning_change
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.loop import mean_score
from mmdefense.kernels.units import mean_activations, prune, rank, weight_change
from mmdefense.runtime.run import Run, copy_state

MODELS = ["small-resnet", "hf-vit", "hf-resnet", "cnn-without-batchnorm"]
KINDS = [("last", "activation"), ("all", "activation"), ("all", "weight-change")]
SETTINGS = {"max_utility_drop": 1.0, "points": 16, "holdout": 0.5}


@pytest.fixture
def capped(monkeypatch):
    """End the unlearning of weight-change soon; a random net forgets slowly."""

    def soon(*arguments, **settings):
        return unlearning_change(*arguments, **settings | {"max_epochs": 2, "lr": 0.01})

    monkeypatch.setattr(fine_pruning, "unlearning_change", soon)
    return soon


def parts(samples, seed=0):
    return split(samples, SETTINGS["holdout"], seed)


def ordered(adapter, samples, layers, order, change):
    """Return the groups and all their units, first to be pruned first."""
    fit = parts(samples)[0]
    if layers == "last":
        magnitude = adapter.embedding(fit.everything()).double().abs().mean(0)
        return [adapter.head_group()], rank([magnitude], descending=False)
    groups = list(adapter.unit_groups())
    if order == "weight-change":
        return groups, rank(weight_change(change(adapter, fit, Run()), groups), descending=True)
    scores = mean_activations(adapter, fit, groups)
    return groups, rank([s / s.mean() for s in scores], descending=False)


def pruned(adapter, groups, units):
    fork = adapter.fork()
    prune(fork.model, groups, units)
    return fork


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("layers", "order"), KINDS)
def test_the_curve_is_that_of_repeated_masked_evaluation(taught, capped, model, layers, order):
    adapter, samples = taught(model)
    groups, units = ordered(adapter, samples, layers, order, capped)
    held = parts(samples)[1]
    defense = Pruning(layers=layers, order=order, max_pruning_drop=1.0, **SETTINGS)
    (plot,) = defense.purify(adapter, samples).plots
    shares, curve, kept = plot.fractions, plot.accuracy, plot.chosen
    assert shares[0] == 0
    assert curve[0] == 1
    assert len(shares) == len(curve) == min(16, int(0.99 * len(units))) + 1
    for share, score in zip(shares, curve, strict=True):
        fork = pruned(adapter, groups, units[: round(share * len(units))])
        assert score == pytest.approx(mean_score(fork, held), abs=1e-6), share
    assert len(set(curve)) > 2, "the curve is flat, so that this says nothing"
    assert kept == shares[-1]


@pytest.mark.parametrize("model", ["small-resnet", "hf-vit"])
@pytest.mark.parametrize(("layers", "order"), KINDS)
@pytest.mark.parametrize("allowed", [0.0, 0.15, 0.4])
def test_the_model_is_the_last_one_before_the_score_falls_too_far(
    taught, capped, model, layers, order, allowed
):
    """It equals a fresh masked model: what was pruned beyond it is rolled back."""
    adapter, samples = taught(model)
    groups, units = ordered(adapter, samples, layers, order, capped)
    held = parts(samples)[1]
    defense = Pruning(layers=layers, order=order, max_pruning_drop=allowed, **SETTINGS)
    result = defense.purify(adapter, samples)
    (plot,) = result.plots
    shares, curve, kept = plot.fractions, plot.accuracy, plot.chosen
    expected = pruned(adapter, groups, units[: round(kept * len(units))])
    for name, value in copy_state(result.model).items():
        assert torch.equal(value, expected.model.state_dict()[name]), name
    assert 1 - mean_score(expected, held) <= allowed + 1e-6
    beyond = shares.index(kept) + 1
    if beyond < len(curve):
        assert 1 - curve[beyond] > allowed
    assert all(1 - score <= allowed + 1e-6 for score in curve[:beyond])


def test_pruning_is_not_resumed_where_the_score_recovers(adapter, corners, monkeypatch):
    curve = torch.tensor([1.0, 0.95, 0.8, 0.97, 0.99])
    monkeypatch.setattr(fine_pruning, "pruning_curve", lambda *_: curve)
    result = Pruning(points=4, max_utility_drop=1.0, max_share=1.0).purify(adapter, corners)
    assert result.plots[0].chosen == 1 / 4


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_no_more_than_the_largest_share_is_pruned(taught, share):
    adapter, samples = taught("hf-vit")
    defense = Pruning(max_share=share, max_pruning_drop=1.0, **SETTINGS)
    weight = defense.purify(adapter, samples).model.classifier.weight
    assert int((weight == 0).all(0).sum()) == share * 16


def test_points_beyond_the_number_of_units_are_looked_at_once(adapter, corners):
    shares = Pruning(points=100).purify(adapter, corners).plots[0].fractions
    assert shares == [0, 0.25, 0.5, 0.75]  # 0.99 of four units


@pytest.mark.parametrize("model", ["small-resnet", "hf-vit"])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_the_mask_holds_while_all_else_is_trained(taught, model, layers):
    adapter, samples = taught(model)
    settings = SETTINGS | {"layers": layers, "max_pruning_drop": 1.0, "max_share": 0.3}
    mask = {
        name: value == 0
        for name, value in copy_state(Pruning(**settings).purify(adapter, samples).model).items()
    }
    mask = {n: m & (copy_state(adapter.model)[n] != 0) for n, m in mask.items()}
    assert any(bool(m.any()) for m in mask.values())
    seen = []

    class Watched(type(adapter)):
        def per_sample_loss(self, batch):
            state = self.model.state_dict()
            seen.append(max(float(state[n][m].abs().max()) for n, m in mask.items() if m.any()))
            return super().per_sample_loss(batch)

    adapter.__class__ = Watched
    result = FinePruning(steps=6, lr=0.1, batch_size=8, restarts=0, **settings).purify(
        adapter, samples
    )
    after, given = copy_state(result.model), copy_state(adapter.model)
    assert len(seen) == 6
    assert max(seen) == 0, "a step saw a pruned unit alive"
    for name, value in result.model.named_parameters():
        assert not after[name][mask[name]].any(), name
        if value.grad_fn is None and (~mask[name]).any() and "key.bias" not in name:
            assert not torch.equal(after[name][~mask[name]], given[name][~mask[name]]), name


def test_fine_pruning_where_nothing_can_be_pruned_is_fine_tuning(adapter, corners):
    settings = {"steps": 3, "batch_size": 8, "max_utility_drop": 1.0}
    result = FinePruning(max_share=0.0, **settings).purify(adapter, corners)
    (plot,) = result.plots
    assert (plot.fractions, plot.chosen) == ([0.0], 0.0)
    assert plot.accuracy == [pytest.approx(result.guard.before)]
    assert not torch.equal(result.model[0].weight, adapter.model[0].weight)


def test_the_guard_may_go_back_to_the_model_that_is_pruned_and_not_trained(learnt, corners):
    class Spoilt(type(learnt)):
        def per_sample_loss(self, batch):
            return -super().per_sample_loss(batch)

    learnt.__class__ = Spoilt
    defense = FinePruning(steps=40, lr=1.0, max_pruning_drop=0.0, holdout=0.5, restarts=0)
    result = defense.purify(learnt, corners)
    assert result.guard.state == "pruned, not fine-tuned"
    given = copy_state(learnt.model)
    given["6.weight"] = given["6.weight"] * (result.model[6].weight != 0)
    for name, value in copy_state(result.model).items():
        assert torch.equal(value, given[name]), name


def test_a_tied_weight_is_pruned_under_each_of_its_names(adapter, corners):
    """Two layers share one parameter, and the units of the second are pruned."""
    model = adapter.model
    twin = torch.nn.Linear(4, 4).double()
    model[5] = torch.nn.Sequential(torch.nn.Tanh(), twin, torch.nn.Linear(4, 4).double())
    model[5][2].weight = twin.weight
    settings = {"layers": "all", "max_pruning_drop": 1.0, "max_utility_drop": 1.0}
    result = FinePruning(steps=2, **settings).purify(adapter, corners)
    assert result.model[5][2].weight is result.model[5][1].weight
    assert not result.model[5][2].weight.any(1).all()


def last_of_pruning(events):
    """Return the last sign of progress of the pruning."""
    return [event for event in events if event.stage == "prune"][-1]


def test_all_layers_are_pruned_where_the_last_cannot_be(adapter, corners, monkeypatch):
    events = []
    Pruning().purify(adapter, corners, progress=events.append)
    assert last_of_pruning(events).total == adapter.head_group().size

    def no_head(_):
        raise UnsupportedError("no head")

    monkeypatch.setattr(type(adapter), "head_weights", no_head)
    Pruning().purify(adapter, corners, progress=events.append)
    assert last_of_pruning(events).total == sum(group.size for group in adapter.unit_groups())
    with pytest.raises(UnsupportedError, match="no head"):
        Pruning(layers="last").purify(adapter, corners)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_pruning_drop": 1.5}, "max_pruning_drop must lie"),
        ({"points": 0}, "points must be at least 1, got 0"),
        ({"order": "weight-change", "layers": "last"}, "must go with layers 'all', got 'last'"),
    ],
)
@pytest.mark.parametrize("kind", [Pruning, FinePruning])
def test_wrong_settings_are_refused(kind, settings, message):
    with pytest.raises(BadInputError, match=message):
        kind(**settings)
