"""The core step of each baseline that trains, against a slow and explicit version in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmdefense.data.batch import split
from mmdefense.defenses.fst import FST
from mmdefense.defenses.nft import NFT, mask_floors, mixup_loss
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.hooks import mode
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
    with pytest.raises(UnsupportedError, match=r"is that of model\.embed_tokens\.weight too"):
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


def in_order(batch, step):
    """Return images and labels in the order in which a step takes them."""
    order = torch.randperm(BATCH, generator=Run(0).generator(f"mask/epoch{step}"))
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
