from __future__ import annotations

import copy
from dataclasses import replace

import torch

from mmdefense.data.batch import split
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.ft_sam import FTSAM
from mmdefense.runtime.run import copy_state

ONE = {"steps": 1, "lr": 0.1, "momentum": 0.0, "max_norm": None, "max_utility_drop": 1.0,
       "restarts": 0}  # fmt: skip


def test_one_update_is_that_of_the_formula(learnt, corners):
    """In the order of the paper, on one long vector, with a second model for the worst weights."""
    defense = FTSAM(**ONE, batch_size=24, radius=0.5, eta=0.01)
    found = copy_state(defense.purify(learnt, corners).model)
    twin = copy.deepcopy(learnt)
    parameters = list(twin.model.parameters())
    twin.model.train()
    batch = split(corners, defense.holdout, defense.seed)[0].everything()

    def gradient():
        loss = twin.per_sample_loss(batch).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    theta = torch.cat([p.detach().flatten() for p in parameters])
    scale, first = theta.abs() + 0.01, gradient()
    worst = theta + 0.5 * scale.square() * first / (scale * first).norm()
    put(parameters, worst)
    put(parameters, theta - 0.1 * gradient())
    for name, parameter in twin.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-9, atol=1e-12)


def put(parameters, values):
    with torch.no_grad():
        for parameter, value in zip(
            parameters, values.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.copy_(value.view_as(parameter))


def test_without_a_radius_it_is_plain_fine_tuning(learnt, corners):
    plain = FineTuning(steps=6, batch_size=8, max_utility_drop=1.0)
    sharp = FTSAM(**{name: getattr(plain, name) for name in ("steps", "batch_size")}, radius=0.0)
    first = plain.purify(learnt, corners).model
    second = replace(sharp, max_utility_drop=1.0).purify(learnt, corners).model
    for (name, value), other in zip(
        copy_state(first).items(), copy_state(second).values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=name)
