"""The core step of each baseline that trains, against a slow and explicit version in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mmdefense.data.batch import split
from mmdefense.data.labelled import LabelledBatch
from mmdefense.defenses.fst import FST
from mmdefense.defenses.i_bau import IBAU, hypergradient
from mmdefense.defenses.neural_cleanse import NeuralCleanse, outlying
from mmdefense.defenses.nft import NFT, mask_floors, mixup_loss
from mmdefense.defenses.sau import SAU, divergence, unshared_loss
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.inversion import Recovered
from mmdefense.kernels.perturbations import worst_change
from mmdefense.protocol import TriggerFamily
from mmdefense.runtime.run import Run, copy_state

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
ONE = {"steps": 1, "lr": 0.1, "momentum": 0.0, "max_norm": None, "max_utility_drop": 1.0}
BATCH = 24


def learnt_from(defense, corners):
    """Return the part of the corners that a defense learns from, as one batch."""
    return split(corners, defense.holdout, defense.seed)[0].everything()


def descended(model, objective, rate=0.1):
    """Return the weights after one step along the gradient of an objective, by name."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(objective, list(named.values()))
    return {
        name: value.detach() - rate * gradient
        for (name, value), gradient in zip(named.items(), gradients, strict=True)
    }


# %% FST.


def test_one_update_of_fst_turns_a_new_classifier_away_from_the_given_one(learnt, corners):
    defense = FST(**ONE, batch_size=BATCH, alpha=0.3)
    found = copy_state(defense.purify(learnt, corners).model)
    twin, given = learnt.fork(), learnt.model[6].weight.detach().clone()
    head = twin.model[6].weight
    drawn = torch.rand(head.shape, generator=Run(0).generator("classifier"), dtype=torch.float64)
    head.data = (2 * drawn - 1) / 2  # four inputs a row
    twin.model.train()
    loss = twin.per_sample_loss(learnt_from(defense, corners)).mean()
    expected = descended(twin.model, loss + 0.3 * (head * given).sum())
    expected["6.weight"] *= given.norm() / expected["6.weight"].norm()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)
    assert found["6.weight"].norm().item() == pytest.approx(given.norm().item())


def test_fst_refuses_a_classifier_that_is_the_token_embedding(taught):
    adapter, samples = taught("llama")
    adapter.model.lm_head.weight = adapter.model.model.embed_tokens.weight
    with pytest.raises(UnsupportedError, match=r"is shared with model\.embed_tokens\.weight"):
        FST(steps=1).purify(adapter, samples)


def test_fst_draws_anew_what_tells_the_classes_of_objects(taught):
    adapter, samples = taught("fcos")
    result = FST(steps=1, lr=0.0, adamw_lr=0.0, batch_size=4, max_utility_drop=1.0).purify(
        adapter, samples
    )
    before, after = adapter.model.state_dict(), result.model.state_dict()
    weights = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in weights if "running" in name or "num_batches" in name}
    assert {name.rpartition(".")[0] for name in weights - norms} == set(adapter.class_layers())


# %% NFT.


def test_two_updates_of_nft_move_masks_by_mixed_samples_and_their_drift(learnt, corners):
    """With a mask of the one BatchNorm and one of the hidden layer, written out."""
    settings = ONE | {"steps": 2, "batch_size": BATCH}
    defense = NFT(**settings, drift=0.5, floor=0.9, decay=0.01)
    found = copy_state(defense.purify(learnt, corners).model)
    batch, twin = learnt_from(defense, corners), learnt.fork()
    masks = [torch.ones(3).double().requires_grad_(), torch.ones(4).double().requires_grad_()]
    floors = [0.9 * math.exp(-0.01), 0.9 * math.exp(-0.02)]
    per_class = BATCH / 3
    for step, rate in ((0, 0.1), (1, 0.05)):
        images, labels = in_order(batch, step)
        loss = mixed_loss(masked(twin.model, masks), images, labels, step)
        drift = sum((mask - 1).abs().sum() for mask in masks)
        gradients = torch.autograd.grad(loss + 0.5 / per_class * drift, masks)
        masks = [
            (m - rate * g).clamp(least, 1).detach().requires_grad_()
            for m, g, least in zip(masks, gradients, floors, strict=True)
        ]
    for name, mask in (("1.weight", masks[0]), ("4.weight", masks[1][:, None])):
        torch.testing.assert_close(found[name], twin.model.get_parameter(name) * mask, **CLOSE)
    for name in ("0.weight", "1.bias", "4.bias", "6.weight", "6.bias"):
        assert torch.equal(found[name], twin.model.get_parameter(name))
    assert any(
        (floor < mask).logical_and(mask < 1).any()
        for mask, floor in zip(masks, floors, strict=True)
    )


def in_order(batch, step, stage="mask"):
    """Return images and labels in the order in which a step takes them."""
    order = torch.randperm(BATCH, generator=Run(0).generator(f"{stage}/epoch{step}"))
    return batch.inputs[order], batch.labels[order]


def masked(net, masks):
    """Return what the net computes with masks, in train mode, from its weights."""

    def forward(images):
        conv, norm, hidden, head = net[0], net[1], net[4], net[6]
        maps = conv(images)
        mean = maps.mean((0, 2, 3), keepdim=True)
        var = maps.var((0, 2, 3), keepdim=True, unbiased=False)
        weight = (norm.weight * masks[0])[:, None, None]
        maps = (maps - mean) / (var + norm.eps).sqrt() * weight + norm.bias[:, None, None]
        rows = maps.relu().flatten(1)
        return head((rows @ (hidden.weight * masks[1][:, None]).T + hidden.bias).tanh())

    return forward


def mixed_loss(forward, images, labels, step):
    """Return the loss of MixUp, one sample and both of its labels at a time."""
    run = Run(0)
    share = np.random.default_rng(run.seed_for(f"share {step}")).beta(1.0, 1.0)
    partners = torch.randperm(len(images), generator=run.generator(f"partners {step}")).tolist()
    mixed = torch.stack(
        [share * images[n] + (1 - share) * images[p] for n, p in enumerate(partners)]
    )
    log_p = forward(mixed).log_softmax(1)
    total = 0
    for n, p in enumerate(partners):
        total -= share * log_p[n, labels[n]] + (1 - share) * log_p[n, labels[p]]
    return total / len(images)


def test_floors_fall_with_the_depth_of_a_layer():
    expected = [0.8 * math.exp(-0.5), 0.8 * math.exp(-1.0), 0.8 * math.exp(-1.5)]
    assert mask_floors(3, 0.8, 0.5) == pytest.approx(expected)


def test_a_share_of_one_is_no_mixture(learnt, corners):
    batch = corners.everything()
    with mode(learnt.model, train=True), torch.no_grad():
        compute = mixup_loss(learnt, batch, 1.0, torch.randperm(len(batch)))
        expected = learnt.per_sample_loss(batch).mean()
        torch.testing.assert_close(compute(slice(0, len(batch)))[0], expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "pointnet", "fcos"])
def test_texts_clouds_and_boxes_are_not_mixed(taught, name):
    adapter, samples = taught(name)
    short = {"steps": 2, "batch_size": 4, "max_utility_drop": 1.0}
    first, second = (
        copy_state(NFT(**short, mixup=mixup).purify(adapter, samples).model) for mixup in (0, 1)
    )
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_images_are_mixed(taught):
    adapter, samples = taught("cnn-without-batchnorm")
    short = {"steps": 2, "batch_size": 8, "max_utility_drop": 1.0}
    first, second = (
        copy_state(NFT(**short, mixup=mixup).purify(adapter, samples).model) for mixup in (0, 1)
    )
    assert any(not torch.equal(value, second[key]) for key, value in first.items())


# %% I-BAU.


def with_change(adapter, batch, change, weights):
    """Return the mean loss of changed images as a function of a change and named weights."""
    images = (batch.inputs + change).clamp(0, 1)
    logits = torch.func.functional_call(adapter.model, weights, (images,))
    return nn.functional.cross_entropy(logits, batch.labels)


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_the_hypergradient_is_that_of_whole_jacobians(learnt, corners, iterations):
    """``v`` times the series of the map's Jacobian, times the mixed second derivative."""
    batch, rate, damping = corners.everything(), 0.3, 0.05
    generator = torch.Generator().manual_seed(0)
    change = 0.1 * torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    named = {name: value.detach() for name, value in learnt.model.named_parameters()}
    flat = torch.cat([value.flatten() for value in named.values()])

    def outer(d, theta):
        parts = theta.split([value.numel() for value in named.values()])
        weights = {
            name: part.view_as(value)
            for (name, value), part in zip(named.items(), parts, strict=True)
        }
        return with_change(learnt, batch, d.view(1, 1, 8, 8), weights)

    def step(d, theta):
        def inner(d):
            return outer(d, theta) - damping * d.square().sum()

        return d + rate * torch.func.grad(inner)(d)

    d = change.flatten()
    slope, direct = torch.func.grad(outer, (0, 1))(d, flat)
    by_change, by_weights = torch.func.jacrev(step, (0, 1))(d, flat)
    series = torch.zeros_like(slope)
    power = slope
    for _ in range(iterations):
        series, power = series + power, by_change.T @ power
    expected = direct + by_weights.T @ series
    loss, found = hypergradient(
        learnt, batch, change, list(learnt.model.parameters()),
        rate=rate, iterations=iterations, damping=damping,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([g.flatten() for g in found]), expected, **CLOSE)
    assert loss.item() == pytest.approx(outer(d, flat).item(), rel=1e-12)


def test_one_update_of_i_bau_is_along_the_hypergradient_at_the_worst_change(learnt, corners):
    defense = IBAU(**ONE, batch_size=BATCH, radius=0.3, ascents=3)
    found = copy_state(defense.purify(learnt, corners).model)
    batch, twin = learnt_from(defense, corners), learnt.fork()
    radius = 0.3 * batch.inputs.flatten(1).norm(dim=1).mean().item()
    change = worst_change(
        twin, batch, radius=radius, steps=3, step_size=2 * radius / 3, norm="l2", universal=True
    )
    assert change.norm().item() == pytest.approx(radius)
    named = dict(twin.model.named_parameters())
    _, gradients = hypergradient(
        twin, batch, change, list(named.values()), rate=0.1, iterations=5, damping=1e-3
    )
    for (name, value), gradient in zip(named.items(), gradients, strict=True):
        torch.testing.assert_close(found[name], value.detach() - 0.1 * gradient, **CLOSE)
    assert torch.equal(found["1.running_mean"], learnt.model[1].running_mean)


# %% SAU.


def test_losses_of_sau_are_those_of_plain_probabilities():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 5, generator=generator).double() for _ in range(2))
    classes = torch.tensor([0, 3, 4, 1])
    p, q = first.softmax(1), second.softmax(1)
    for n in range(4):
        rest = sum(float(p[n, k]) for k in range(5) if k != classes[n])
        assert unshared_loss(first, classes)[n].item() == pytest.approx(-math.log(rest))
        middle = [(float(p[n, k]) + float(q[n, k])) / 2 for k in range(5)]
        apart = sum(
            float(row[n, k]) * math.log(float(row[n, k]) / middle[k]) / 2
            for row in (p, q)
            for k in range(5)
        )
        assert divergence(first, second)[n].item() == pytest.approx(apart)
    surest = unshared_loss(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    assert surest.item() == pytest.approx(200)  # where 1 - p is zero in any precision


def test_one_update_of_sau_unlearns_what_misleads_the_given_model(learnt, corners):
    """The ascent written out, sign by sign; the descent a sample at a time."""
    defense = SAU(**ONE, batch_size=BATCH, radius=0.4, step_size=0.2, ascents=3, adversarial=0.5)
    found = copy_state(defense.purify(learnt, corners).model)
    twin, given = learnt.fork(), learnt.fork()
    images, labels = in_order(learnt_from(defense, corners), 0, "unlearn")
    noise = torch.rand(images.shape, generator=Run(0).generator("start 0"), dtype=torch.float64)
    changed = (images + (2 * noise - 1) * 0.4).clamp(0, 1)
    for _ in range(3):
        changed = changed.detach().requires_grad_()
        logits = twin.logits(changed), given.logits(changed)
        losses = [nn.functional.cross_entropy(z, labels) for z in logits]
        objective = 0.5 * (losses[0] + losses[1]) / 2 - divergence(*logits).mean()
        (slope,) = torch.autograd.grad(objective, changed)
        moved = (changed - images + 0.2 * slope.sign()).clamp(-0.4, 0.4)
        changed = (images + moved).clamp(0, 1)
    changed = changed.detach()
    taken_for = given.logits(changed).argmax(1)
    p = twin.logits(changed).softmax(1)
    total, misled = twin.logits(images).log_softmax(1), 0
    objective = -total[torch.arange(BATCH), labels].mean()
    for n in range(BATCH):
        if taken_for[n] != labels[n]:
            objective = objective - (1 - p[n, taken_for[n]]).log() / BATCH
            misled += 1
    assert 0 < misled < BATCH
    for name, value in descended(twin.model, objective).items():
        torch.testing.assert_close(found[name], value, **CLOSE)
    assert torch.equal(found["1.running_mean"], learnt.model[1].running_mean)


# %% Neural Cleanse.


def recovered(success, sizes, pool):
    count = len(sizes)
    return Recovered(
        family=TriggerFamily("patch", pool.shape[2:], 1.0),
        targets=torch.arange(count),
        levels=torch.full((count,), 0.9),
        success=torch.tensor(success),
        size=torch.tensor(sizes),
        accepted=torch.tensor(success) >= 0.9,
        pool=pool,
    )


def test_a_class_stands_out_by_its_anomaly_index_and_only_where_its_trigger_works():
    """The index of log costs by hand: 0.02 against a median of 0.4."""
    pool = torch.rand(7, 2, 3)
    sizes = [0.4, 0.5, 0.02, 0.3, 0.45, 0.35, 0.02]
    record = recovered([1.0] * 6 + [0.5], sizes, pool)
    logs = [math.log(1 - s + size) for s, size in zip(record.success.tolist(), sizes, strict=True)]
    middle = sorted(logs)[3]
    spread = 1.4826 * sorted(abs(log - middle) for log in logs)[3]
    index = (middle - logs[2]) / max(spread, 0.25)
    assert outlying(record, index - 0.01).accepted.tolist() == [n == 2 for n in range(7)]
    assert not outlying(record, index + 0.01).accepted.any()


def test_one_update_of_neural_cleanse_gives_the_triggered_share_its_right_labels(
    learnt, corners, monkeypatch
):
    family = learnt.trigger_families()[0]
    pool = torch.rand(3, 4, *family.shape, generator=torch.Generator().manual_seed(0)).double()
    record = replace(recovered([1.0] * 3, [0.1] * 3, pool), family=family)
    target = "mmdefense.defenses.neural_cleanse.recover_once"
    monkeypatch.setattr(target, lambda *_, **__: [record])
    defense = NeuralCleanse(**ONE, batch_size=BATCH, share=0.25, anomaly=-1.0)
    found = copy_state(defense.purify(learnt, corners).model)
    twin, batch = learnt.fork(), learnt_from(defense, corners)
    images, labels = in_order(batch, 0, "unlearn")
    count = BATCH // 4
    triggers = pool[0][torch.arange(count) % 4]
    stamped = twin.stamp(LabelledBatch(images[:count], labels[:count]), family, triggers[None])
    assert torch.equal(stamped.labels, labels[:count])
    carrying = nn.functional.cross_entropy(twin.logits(stamped.inputs), labels[:count])
    twin.model.train()
    rest = nn.functional.cross_entropy(twin.logits(images[count:]), labels[count:])
    for name, value in descended(twin.model, carrying / 4 + 3 * rest / 4).items():
        torch.testing.assert_close(found[name], value, **CLOSE)


def test_neural_cleanse_leaves_a_model_alone_in_which_no_class_stands_out(taught):
    adapter, samples = taught("small-resnet")
    result = NeuralCleanse(search_steps=2, anomaly=100.0).purify(adapter, samples)
    assert "targets" in result.unchanged or "target stands out" in result.unchanged
    assert all(
        torch.equal(value, result.model.state_dict()[name])
        for name, value in adapter.model.state_dict().items()
    )
