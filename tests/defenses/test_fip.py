"""FIP step by step against the formula, differentiated by autograd in float64.

The clean set is one image many times over, and a batch is one of them: then the empirical trace of
a step is the exact ``||grad CE||^2``, and a few equally likely sign patterns give the true one.
"""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.func import functional_call

from mmdefense.data.batch import split
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses import fip
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.runtime.run import copy_state

ONE_STEP = {
    "steps": 1, "batch_size": 1, "lr": 1.0, "momentum": 0.0, "max_norm": None,
    "batch_norm": "eval", "fade": 0.0, "max_utility_drop": 1.0, "restarts": 0,
}  # fmt: skip
ETA = 0.3


@pytest.fixture
def one(corners):
    """Return ten times the same image, whose answer is yet to be learnt."""
    inputs, labels = corners.inputs[:1].repeat(10, 1, 1, 1), torch.full((10,), 1)
    return LabelledSamples(inputs, labels, corners.augmentation)


def weights_after(defense, adapter, samples):
    """Return all weights of the purified model in one vector."""
    return reference.flat(defense.purify(adapter, samples).model.parameters()).detach()


def gradient_of_a_step(defense, adapter, samples):
    given = reference.flat(adapter.model.parameters()).detach()
    return given - weights_after(defense, adapter, samples)


def clean_loss(adapter, one):
    return F.cross_entropy(adapter.logits(one.inputs[:1]), one.labels[:1])


def squared_gradient(value, parameters):
    return reference.gradient_of(value, parameters, create_graph=True).square().sum()


def test_a_step_descends_ce_and_the_empirical_trace(adapter, one):
    parameters = list(adapter.model.parameters())
    loss = clean_loss(adapter, one)
    expected = reference.gradient_of(loss + ETA * squared_gradient(loss, parameters), parameters)
    found = gradient_of_a_step(FIP(eta_f=ETA, trace="empirical", **ONE_STEP), adapter, one)
    torch.testing.assert_close(found, expected)


def test_a_step_descends_ce_and_the_true_trace_in_the_mean_over_signs(adapter, one):
    parameters = list(adapter.model.parameters())
    loss = reference.gradient_of(clean_loss(adapter, one), parameters)
    trace = reference.trace_gradient(adapter, one.subset(torch.tensor([0])), parameters, "true")
    found = {}
    for seed in range(40):  # three signs, alike when all are turned: four patterns
        step = gradient_of_a_step(FIP(eta_f=ETA, trace="true", seed=seed, **ONE_STEP), adapter, one)
        found.setdefault(tuple(step[:20].mul(1e8).round().tolist()), step)
        if len(found) == 4:
            break
    assert len(found) == 4
    torch.testing.assert_close(torch.stack([*found.values()]).mean(0), loss + ETA * trace)


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_the_loss_is_that_of_the_chosen_batchnorm(adapter, corners, batch_norm):
    defense = FIP(**ONE_STEP | {"batch_size": 24, "batch_norm": batch_norm, "trace": "none"})
    fit = split(corners, defense.holdout, defense.seed)[0].everything()
    found = gradient_of_a_step(defense, adapter, corners)
    adapter.model.train(batch_norm == "train")
    loss = F.cross_entropy(adapter.logits(fit.inputs), fit.labels)
    torch.testing.assert_close(found, reference.gradient_of(loss, adapter.model.parameters()))


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"trace_every": 2}, [2, 0, 2, 0, 2, 0]),
        ({"trace_every": 3}, [3, 0, 0, 3, 0, 0]),
        ({"fade": 1.0}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"fade": 0.5}, [1, 2 / 3, 1 / 3, 0, 0, 0]),
        ({"fade": 0.5, "trace_every": 2}, [2, 0, 2 / 3, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("eta_r", [0.0, 7.0])
def test_six_steps_follow_the_formula(adapter, one, recorded, settings, shares, eta_r):
    """Period, fading and anchor, against an optimiser of three lines over explicit autograd."""
    lr = 0.05
    steps = ONE_STEP | {"steps": 6, "lr": lr} | settings
    defense = FIP(eta_f=ETA, eta_r=eta_r, trace="empirical", **steps)
    found = weights_after(defense, adapter, one)
    parameters = list(adapter.model.parameters())
    start = reference.flat(parameters).detach()
    importance = reference.flat(recorded[0])
    for step, share in enumerate(shares):
        loss = clean_loss(adapter, one)
        drift = reference.flat(parameters) - start
        total = loss + eta_r / 2 * (importance * drift.square()).sum()
        if share:
            total = total + share * ETA * squared_gradient(loss, parameters)
        gradient = reference.gradient_of(total, parameters)
        rate = lr * (1 + torch.cos(torch.tensor(torch.pi * step / 6))) / 2  # the loop's cosine
        move(parameters, -rate.double() * gradient)
    torch.testing.assert_close(found, reference.flat(parameters).detach(), rtol=1e-5, atol=1e-8)
    assert (found - start).norm() > 0.01


def move(parameters, change):
    with torch.no_grad():
        for parameter in parameters:
            parameter += change[: parameter.numel()].view_as(parameter)
            change = change[parameter.numel() :]


@pytest.fixture
def recorded(monkeypatch):
    """Collect what FIP takes for the Fisher diagonal of the given model."""
    found, genuine = [], fip.fisher_diagonal

    def watch(*arguments, **settings):
        found.append(genuine(*arguments, **settings))
        return found[-1]

    monkeypatch.setattr(fip, "fisher_diagonal", watch)
    return found


def test_the_anchor_is_weighted_by_the_fisher_information_of_the_given_model(
    adapter, corners, recorded
):
    FIP(**ONE_STEP | {"steps": 0, "trace": "true"}).purify(adapter, corners)
    fit = split(corners, 0.2, 0)[0]
    exact = reference.fisher(adapter, fit, list(adapter.model.parameters()), "true").diagonal()
    found = reference.flat(recorded[0])
    assert torch.cosine_similarity(found, exact, dim=0) > 0.9  # an unbiased estimate of one pass
    assert 0.5 < found.sum() / exact.sum() < 2


def test_two_steps_follow_the_gradient_at_the_worst_weights_and_the_anchor(
    adapter, corners, recorded
):
    """On one long vector, with explicit autograd."""
    settings = {"steps": 2, "batch_size": 24, "momentum": 0.0, "max_norm": None, "lr": 0.1}
    defense = FIP(radius=0.5, eta_r=3.0, batch_norm="eval", max_utility_drop=1.0, **settings)
    found = weights_after(defense, adapter, corners)
    fit = split(corners, defense.holdout, defense.seed)[0].everything()
    parameters = list(adapter.model.parameters())
    start, importance = reference.flat(parameters).detach(), reference.flat(recorded[0])

    def gradient(theta):
        torch.nn.utils.vector_to_parameters(theta, parameters)
        loss = F.cross_entropy(adapter.logits(fit.inputs), fit.labels)
        return reference.gradient_of(loss, parameters)

    theta = start
    for step in range(2):
        scale, first = theta.abs() + 0.01, gradient(theta)
        worst = theta + 0.5 * scale.square() * first / (scale * first).norm()
        rate = 0.1 * (1 + math.cos(math.pi * step / 2)) / 2
        theta = theta - rate * (gradient(worst) + 3.0 * importance * (theta - start))
    torch.testing.assert_close(found, theta, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "settings", [{"strength": 1.0}, {"eta_f": 0.1}, {"fade": 0.0}, {"trace_every": 5}]
)
def test_what_has_no_effect_on_the_perturbation_is_refused(settings):
    (name,) = settings
    with pytest.raises(BadInputError, match=f"{name}=.* of FIP has no effect .*set trace='true'"):
        FIP(**settings)
    assert getattr(FIP(trace="true", **settings), name) == settings[name]


def test_the_papers_preset_yields_to_what_is_given(adapter):
    paper = FIP(preset="paper", steps=7)
    assert (paper.trace, paper.eta_f, paper.eta_r, paper.lr) == ("true", 0.5, 5.0, 0.005)
    assert (paper.steps, paper.batch_size, paper.trace_every, paper.fade) == (7, 128, 5, 0.0)
    assert paper.training(adapter).schedule == "constant"
    assert FIP().training(adapter).schedule == "cosine"


def test_a_strong_anchor_holds_the_weights_that_matter(adapter, corners, recorded):
    settings = ONE_STEP | {"steps": 60, "lr": 0.05, "batch_size": 24, "trace": "none"}
    moved = []
    for eta_r in (0.0, 100.0):
        drift = gradient_of_a_step(FIP(eta_r=eta_r, **settings), adapter, corners)
        moved.append(float((reference.flat(recorded[-1]) * drift.square()).sum()))
    assert moved[0] > 1e-3
    assert moved[1] < moved[0] / 10


def history_of(defense, adapter, samples):
    return defense.purify(adapter, samples).history[0]


def test_strength_is_the_penalty_of_the_given_model(adapter, corners):
    idle = {"steps": 0, "trace": "true"}
    at_one = history_of(FIP(strength=1e-3, **idle), adapter, corners)
    assert at_one["eta_f"] * at_one["fisher_trace"] == pytest.approx(1e-3)
    assert history_of(FIP(strength=1e9, **idle), adapter, corners)["eta_f"] == 0.5
    adapter.layer_norm = True  # steps that are twice as long take half the penalty
    longer = history_of(FIP(strength=1e-3, layer_norm_factor=2.0, **idle), adapter, corners)
    assert longer["eta_f"] == pytest.approx(at_one["eta_f"] / 2)
    assert longer["lr"] == pytest.approx(2 * at_one["lr"])
    other = history_of(FIP(strength=1e-3, optimizer="adamw", **idle), adapter, corners)
    assert other["eta_f"] == pytest.approx(at_one["eta_f"])  # its rate is not multiplied
    assert history_of(FIP(eta_f=0.7, **idle), adapter, corners)["eta_f"] == 0.7
    assert history_of(FIP(eta_f=0.7, **idle | {"trace": "none"}), adapter, corners)["eta_f"] == 0


def test_the_released_term_is_noise_of_mean_zero(adapter, one):
    """Over many draws its step is that of the loss alone, while single ones are far from it."""
    plain = gradient_of_a_step(FIP(trace="none", **ONE_STEP), adapter, one)
    steps = torch.stack(
        [
            gradient_of_a_step(
                FIP(trace="released", eta_f=ETA, seed=seed, **ONE_STEP), adapter, one
            )
            for seed in range(60)
        ]
    )
    extra = steps - plain
    assert extra.norm(dim=1).min() > 0.01 * plain.norm()
    # The squared length of a mean of n independent vectors of mean zero is 1/n of theirs.
    ratio = extra.mean(0).square().sum() / extra.square().sum(1).mean()
    assert ratio < 3 / len(steps)


def test_the_released_term_counts_early_layers_often(adapter, one, monkeypatch):
    """With all random numbers one, it is the mean over layers of partial sums of the gradient."""
    parameters = list(adapter.model.parameters())
    loss = clean_loss(adapter, one)
    gradient = torch.autograd.grad(-loss, parameters, create_graph=True)
    total, partial = 0, 0
    for layer in gradient:
        partial = partial + layer.sum()
        total = total + partial / len(gradient)
    expected = reference.gradient_of(loss + ETA * total, parameters)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.ones(shape))
    defense = FIP(trace="released", eta_f=ETA, **ONE_STEP)
    torch.testing.assert_close(gradient_of_a_step(defense, adapter, one), expected)


def parametrised(model, shifts, others, scale):
    """Return all weights by name, those of matrices as ``U diag(relu(s + scale d)) V^T``."""
    weights, left = {}, iter(shifts)
    for name, value in model.named_parameters():
        if value.ndim == 1:
            weights[name] = others[name]
            continue
        u, s, v = torch.linalg.svd(value.detach().flatten(1), full_matrices=False)
        weights[name] = ((u * (s + scale * next(left)).relu()) @ v).view_as(value)
    return weights


@pytest.mark.parametrize("trace", ["empirical", "none"])
@pytest.mark.parametrize("norms_and_biases", [True, False])
def test_fast_fip_is_fip_under_an_explicit_parametrisation(
    adapter, one, recorded, trace, norms_and_biases
):
    lr, eta_r, scale = 0.02, 3.0, 1.7
    steps = ONE_STEP | {"steps": 2, "lr": lr, "norms_and_biases": norms_and_biases}
    defense = FastFIP(eta_f=ETA, eta_r=eta_r, trace=trace, scale=scale, **steps)
    found = defense.purify(adapter, one).model.state_dict()
    model = adapter.model
    shifts = [
        torch.zeros(min(value.flatten(1).shape), dtype=torch.float64, requires_grad=True)
        for value in model.parameters()
        if value.ndim > 1
    ]
    others = {name: v.detach().clone() for name, v in model.named_parameters() if v.ndim == 1}
    if norms_and_biases:
        shifts += [value.requires_grad_() for value in others.values()]
    start = reference.flat(shifts).detach()
    fisher = reference.flat(recorded[0])
    for rate in (lr, lr / 2):
        weights = parametrised(model, shifts, others, scale)
        logits = functional_call(model, weights, (one.inputs[:1],))
        loss = F.cross_entropy(logits, one.labels[:1])
        drift = reference.flat(shifts) - start
        total = loss + eta_r / 2 * (fisher * drift.square()).sum()
        if trace == "empirical":
            total = total + ETA * squared_gradient(loss, shifts)
        move(shifts, -rate * reference.gradient_of(total, shifts))
    for name, value in parametrised(model, shifts, others, scale).items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-6, atol=1e-9)
        moves = norms_and_biases or value.ndim > 1
        assert torch.equal(found[name], model.get_parameter(name)) is not moves


@pytest.mark.parametrize("kind", [FIP, FastFIP])
def test_frozen_weights_stay(adapter, corners, kind):
    frozen = ["4.weight", "1.bias"]
    for name in frozen:
        adapter.model.get_parameter(name).requires_grad_(False)
    given = copy_state(adapter.model)
    result = kind(steps=3, batch_size=8, max_utility_drop=1.0).purify(adapter, corners)
    moved = {n for n, v in result.model.named_parameters() if not torch.equal(v, given[n])}
    others = {n for n, _ in result.model.named_parameters()} - {*frozen, "0.bias"}
    assert moved - {"0.bias"} == others  # BatchNorm takes that bias away


@pytest.mark.parametrize("trace", ["true", "empirical"])
def test_a_model_that_cannot_be_differentiated_twice_is_refused_first(adapter, corners, trace):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    adapter.model[2].forward = Once.apply
    heard = []
    with pytest.raises(UnsupportedError, match="must be differentiated twice"):
        FIP(trace=trace).purify(adapter, corners, progress=heard.append)
    assert {event.stage for event in heard} <= {"utility before"}
    FIP(trace="none", steps=1).purify(adapter, corners)


@pytest.mark.parametrize(
    ("name", "value"),
    [("strength", -1.0), ("eta_r", -1.0), ("eta_f", -1.0), ("fade", 1.5), ("trace_every", 0)],
)
def test_wrong_settings_are_refused(name, value):
    for kind in (FIP, FastFIP):
        with pytest.raises(BadInputError, match=f"{name} must .* got {value}"):
            kind(**{name: value})


def test_a_scale_of_fast_fip_that_is_not_positive_is_refused():
    with pytest.raises(BadInputError, match="scale must be positive, got 0"):
        FastFIP(scale=0.0)
