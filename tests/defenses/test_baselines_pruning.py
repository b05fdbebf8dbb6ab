"""CLP, ANP, RNP and AWM against slow explicit versions, one unit or one update at a time."""

from __future__ import annotations

import copy
import statistics

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from mmdefense.data.batch import split
from mmdefense.defenses.anp import ANP
from mmdefense.defenses.awm import AWM
from mmdefense.defenses.clp import CLP, lipschitz_bounds
from mmdefense.defenses.guard import judge
from mmdefense.defenses.rnp import RNP
from mmdefense.kernels.coordinates import UnitMasks
from mmdefense.kernels.loop import scores
from mmdefense.kernels.units import mask_out
from mmdefense.protocol import UnitGroup
from mmdefense.runtime.run import copy_state

ANY = {"max_utility_drop": 1.0}
FILTERS, NEURONS = ("1.weight", range(3)), ("4.weight", range(4))  # what masks of the net multiply


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(5, 4, (2, 3))
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv1d(6, 4, 3, groups=2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.linear = nn.Linear(7, 5)
        self.back = nn.Linear(5, 3)
        self.heads = nn.Linear(6, 4)


@pytest.fixture
def net():
    net, generator = Net().double(), torch.Generator().manual_seed(0)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator).double() + 0.1)
    return net


def singular(matrix):
    return np.linalg.svd(matrix.detach().numpy(), compute_uv=False)[0]


def test_a_filters_bound_is_that_of_its_convolution_and_batch_norm(net):
    axes = {"conv.weight": 0, "conv.bias": 0, "norm.weight": 0, "norm.bias": 0}
    with torch.no_grad():
        net.norm.weight[1] *= -1
    found = lipschitz_bounds(net, UnitGroup("conv", 4, axes))
    norm = net.norm
    for unit in range(4):
        factor = norm.weight[unit] / torch.sqrt(norm.running_var[unit] + norm.eps)
        folded = factor * net.conv.weight[unit]
        assert found[unit].item() == pytest.approx(singular(folded.reshape(5, 6)), rel=1e-12)


def test_other_units_have_the_bound_of_their_own_weights(net):
    axes = {"grouped.weight": 0, "group_norm.weight": 0, "group_norm.bias": 0}
    found = lipschitz_bounds(net, UnitGroup("grouped", 4, axes))
    for unit in range(4):
        expected = abs(net.group_norm.weight[unit].item()) * singular(net.grouped.weight[unit])
        assert found[unit].item() == pytest.approx(expected, rel=1e-12)
    found = lipschitz_bounds(net, UnitGroup("linear", 5, {"linear.weight": 0, "linear.bias": 0}))
    torch.testing.assert_close(found, net.linear.weight.detach().norm(dim=1))
    heads = UnitGroup("heads", 2, {"heads.weight": 1}, width=3, kind="head")
    for unit, bound in enumerate(lipschitz_bounds(net, heads).tolist()):
        columns = net.heads.weight[:, 3 * unit : 3 * unit + 3]
        assert bound == pytest.approx(singular(columns), rel=1e-12)
    ranks = lipschitz_bounds(net, UnitGroup("linear", 5, {"linear.weight": 0, "back.weight": 1}))
    for unit, bound in enumerate(ranks.tolist()):
        update = torch.outer(net.back.weight[:, unit], net.linear.weight[unit])
        assert bound == pytest.approx(singular(update), rel=1e-12)


def test_clp_prunes_what_stands_out_in_its_layer(learnt, corners):
    model = learnt.model
    with torch.no_grad():
        model[0].weight[1] *= 20
    found = copy_state(CLP(spread=0.5, **ANY).purify(learnt, corners).model)
    expected = copy_state(model)
    norm = model[1]
    filters = [
        abs(float(norm.weight[k])) / float(norm.running_var[k] + norm.eps) ** 0.5
        * singular(model[0].weight[k].reshape(1, 9))
        for k in range(3)
    ]  # fmt: skip
    neurons = [singular(model[4].weight[k][None]) for k in range(4)]
    count = 0
    for bounds, names in ((filters, ("0", "1")), (neurons, ("4",))):
        limit = statistics.mean(bounds) + 0.5 * statistics.stdev(bounds)
        for unit, bound in enumerate(bounds):
            if bound > limit:
                count += 1
                for name in names:
                    expected[f"{name}.weight"][unit] = expected[f"{name}.bias"][unit] = 0
    assert count >= 2
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_a_masked_out_unit_is_one_whose_mask_is_zero(net):
    groups = [
        UnitGroup("conv", 4, {"conv.weight": 0, "conv.bias": 0, "norm.weight": 0, "norm.bias": 0}),
        UnitGroup("linear", 5, {"linear.weight": 0, "linear.bias": 0}, kind="neuron"),
        UnitGroup("heads", 2, {"heads.weight": 1}, width=3, kind="head"),
    ]
    twin = copy.deepcopy(net)
    chosen = [(0, 2), (1, 0), (1, 4), (2, 1)]
    space = UnitMasks(twin, groups, biases="none")
    with torch.no_grad():
        for group, unit in chosen:
            space.masks[group][unit] = 0
    space.write()
    mask_out(net, groups, chosen)
    for name, value in twin.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert not net.norm.weight[2].any()
    assert net.norm.bias[2].any()


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.4, 1.0])
def test_as_many_units_are_pruned_as_the_guard_lets_pass(learnt, corners, bound):
    """Against pruning one unit after another in copies."""
    defense = RNP(unlearn_epochs=2, epochs=0, threshold=1.0, max_utility_drop=bound, holdout=0.5)
    assert not defense.purify(learnt, corners).plots[0].chosen  # all masks are one
    defense = CLP(spread=0.01, points=100, max_utility_drop=bound, holdout=0.5)
    result = defense.purify(learnt, corners)
    groups = learnt.unit_groups()
    outlying = []
    for group, one in enumerate(groups):
        bounds = lipschitz_bounds(learnt.model, one).tolist()
        mean, deviation = statistics.mean(bounds), statistics.stdev(bounds)
        outlying += [((b - mean) / deviation, group, unit) for unit, b in enumerate(bounds)]
    suspects = sorted((entry for entry in outlying if entry[0] > 0.01), reverse=True)
    before, kept = scores(learnt, corners), 0
    names = (("0", "1"), ("4",))
    for count in range(1, len(suspects) + 1):
        twin = learnt.fork()
        with torch.no_grad():
            for _, group, unit in suspects[:count]:
                for name in names[group]:
                    for parameter in twin.model.get_submodule(name).parameters():
                        parameter[unit] = 0
        if not judge(before, scores(twin, corners), bound, "").passes:
            break
        kept = count
    assert result.plots[0].chosen == pytest.approx(kept / 7)
    assert not result.guard.violated
    assert result.guard.state == "final"
    assert bool(result.unchanged) == (kept == 0)


def masked_loss(adapter, batch, filters, neurons, biases=None):
    """Return the loss of the net with factors on gamma, beta, and the rows of the linear layer."""
    given = dict(adapter.model.named_parameters())
    filter_bias, neuron_bias = biases or (1.0, 1.0)
    masked = {
        "1.weight": filters * given["1.weight"],
        "1.bias": filter_bias * given["1.bias"],
        "4.weight": neurons[:, None] * given["4.weight"],
        "4.bias": neuron_bias * given["4.bias"],
    }
    statistics = {name: value.clone() for name, value in adapter.model.named_buffers()}
    logits = functional_call(adapter.model, {**given, **masked, **statistics}, (batch.inputs,))
    return F.cross_entropy(logits, batch.labels)


@pytest.mark.parametrize("steps", [1, 3])
def test_anp_descends_the_loss_of_perturbed_units(learnt, corners, steps):
    """Against autograd of the formula, at masks that are not one."""
    defense = ANP(eps=0.3, alpha=0.2, inner_steps=steps)
    batch = corners.everything()
    twin = learnt.fork()
    learnt.model.train()
    twin.model.train()
    generator = torch.Generator().manual_seed(0)
    at = [torch.rand(count, generator=generator).double() for count in (3, 4)]
    space = UnitMasks(learnt.model, learnt.unit_groups(), biases="own")
    with torch.no_grad():
        for mask, value in zip(space.masks, at, strict=True):
            mask.copy_(value)
    space.write()
    before = copy_state(learnt.model)
    loss, found = defense.gradient(learnt, batch, space, torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(7)
    noise = [
        (2 * torch.rand(count, generator=draws, dtype=torch.float64) - 1) * 0.3
        for count in (3, 4, 3, 4)
    ]
    for _ in range(steps):
        leaves = [value.clone().requires_grad_() for value in noise]
        worst = masked_loss(twin, batch, at[0] + leaves[0], at[1] + leaves[1],
                            (1 + leaves[2], 1 + leaves[3]))  # fmt: skip
        slopes = torch.autograd.grad(worst, leaves)
        noise = [(n + 0.3 / steps * g.sign()).clamp(-0.3, 0.3)
                 for n, g in zip(noise, slopes, strict=True)]  # fmt: skip
    masks = [value.clone().requires_grad_() for value in at]
    clean = masked_loss(twin, batch, *masks)
    worst = masked_loss(twin, batch, masks[0] + noise[0], masks[1] + noise[1],
                        (1 + noise[2], 1 + noise[3]))  # fmt: skip
    expected = torch.autograd.grad(0.2 * clean + 0.8 * worst, masks)
    torch.testing.assert_close(loss, clean.detach())
    for value, gradient in zip(found, expected, strict=False):
        torch.testing.assert_close(value, gradient, rtol=1e-9, atol=1e-12)
    for name, value in learnt.model.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("share", [0.15, 0.45])
def test_rnp_prunes_what_recovery_masks_in_a_model_that_has_forgotten(learnt, corners, share):
    """Against plain loops of torch.optim on all of the data at once."""
    defense = RNP(unlearn_lr=0.05, unlearn_stop=0.0, unlearn_epochs=6, lr=0.3, alpha=0.5, epochs=5,
                  batch_size=24, threshold=1.0, max_share=share, **ANY)  # fmt: skip
    result = defense.purify(learnt, corners)
    batch = split(corners, defense.holdout, defense.seed)[0].everything()
    twin = learnt.fork()
    twin.model.train()
    ascent = torch.optim.SGD(twin.model.parameters(), lr=0.05, momentum=0.9, maximize=True)
    for _ in range(6):
        ascent.zero_grad()
        F.cross_entropy(twin.model(batch.inputs), batch.labels).backward()
        ascent.step()
    masks = [torch.ones(count, dtype=torch.float64, requires_grad=True) for count in (3, 4)]
    descent = torch.optim.SGD(masks, lr=0.3, momentum=0.9)
    for _ in range(5):
        descent.zero_grad()
        (0.5 * masked_loss(twin, batch, *masks)).backward()
        descent.step()
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(0, 1)
    ranked = sorted(
        (mask[unit].item(), group, unit)
        for group, mask in enumerate(masks)
        for unit in range(len(mask))
    )
    expected = copy_state(learnt.model)  # of the given model, its statistics too
    count = min(int(share * 7), sum(value < 1 for value, *_ in ranked))
    assert count
    for _, group, unit in ranked[:count]:
        expected[("1.weight", "4.weight")[group]][unit] = 0
    for name, value in copy_state(result.model).items():
        assert torch.equal(value, expected[name]), name


def test_one_update_of_awm_descends_all_three_terms(learnt, corners):
    """Against autograd of the formula and Adam on masks, the change sought by a loop of its own."""
    defense = AWM(steps=1, batch_size=24, adamw_lr=0.1, alpha=0.6, beta=0.5, gamma=0.01,
                  trigger_size=0.2, inner_steps=4, max_norm=None, **ANY)  # fmt: skip
    result = defense.purify(learnt, corners)
    batch = split(corners, defense.holdout, defense.seed)[0].everything()
    twin = learnt.fork()
    twin.model.eval()
    names = ["0.weight", "4.weight", "6.weight"]
    given = {name: value.detach() for name, value in twin.model.named_parameters()}

    def loss(inputs, weights):
        logits = functional_call(twin.model, {**given, **weights}, (inputs,))
        return F.cross_entropy(logits, batch.labels)

    radius = 0.2 * 64
    change = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    for _ in range(4):
        leaf = change.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss((batch.inputs + leaf).clamp(0, 1), {}), leaf)
        change = change + radius / 2 * slope / slope.abs().sum()
        change = change * min(1, radius / float(change.abs().sum()))
    masks = {name: torch.ones_like(given[name]).requires_grad_() for name in names}
    masked = {name: mask * given[name] for name, mask in masks.items()}
    objective = (
        0.6 * loss(batch.inputs, masked)
        + 0.5 * loss((batch.inputs + change).clamp(0, 1), masked)
        + 0.01 * sum(mask.abs().sum() for mask in masks.values())
    )
    objective.backward()
    torch.optim.Adam(list(masks.values()), lr=0.1).step()
    found = copy_state(result.model)
    for name, value in copy_state(learnt.model).items():
        expected = value * masks[name].detach().clamp(0, 1) if name in masks else value
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-11, msg=name)
    assert any(bool((mask < 1).any()) for mask in masks.values())


def test_units_without_batch_norm_are_told_of_before_the_start(taught):
    adapter, samples = taught("cnn-without-batchnorm")
    for defense in (ANP(steps=2, batch_size=8), RNP(unlearn_epochs=1, epochs=1)):
        events = []
        defense.purify(adapter, samples, progress=events.append)
        told = [place for place, event in enumerate(events) if "BatchNorm" in event.note]
        assert "26 of 26 units have no BatchNorm" in events[told[0]].note
        begun = next(n for n, event in enumerate(events) if event.stage in ("masks", "unlearn"))
        assert told[0] < begun
