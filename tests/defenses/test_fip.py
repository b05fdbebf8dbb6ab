"""FIP step by step against the formula, differentiated by autograd in float64.

The clean set is one image many times over, and a batch is one of them: then the empirical trace of
a step is the exact ``||grad CE||^2``, and a few equally likely sign patterns give the true one.
"""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.func import functional_call

from mmdefense.batches import LabelledSamples
from mmdefense.defenses import fip
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.run import copy_state

ONE_STEP = {
    "steps": 1, "batch_size": 1, "lr": 1.0, "momentum": 0.0, "max_norm": None,
    "batch_norm": "eval", "fade": 0.0, "max_utility_drop": 1.0,
}  # fmt: skip
ETA = 0.3


@pytest.fixture
def one(corners):
    """Return ten times the same image, whose answer is yet to be learnt."""
    return LabelledSamples(corners.inputs[:1].repeat(10, 1, 1, 1), torch.full((10,), 1))


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
        step = gradient_of_a_step(FIP(eta_f=ETA, seed=seed, **ONE_STEP), adapter, one)
        found.setdefault(tuple(step[:20].mul(1e8).round().tolist()), step)
        if len(found) == 4:
            break
    assert len(found) == 4
    torch.testing.assert_close(torch.stack([*found.values()]).mean(0), loss + ETA * trace)


def test_the_true_trace_is_that_of_the_model_in_whose_modes_it_trains(adapter, corners):
    """In train mode BatchNorm normalises by the batch, in the penalty as in the loss."""
    settings = ONE_STEP | {"batch_size": 24, "eta_f": 0.0}
    model = adapter.model.train()
    fit = fit_part(corners, settings)
    expected = reference.gradient_of(
        F.cross_entropy(model(fit.inputs), fit.labels), list(model.parameters())
    )
    settings["batch_norm"] = "train"
    torch.testing.assert_close(gradient_of_a_step(FIP(**settings), adapter, corners), expected)


def fit_part(samples, settings):
    return fip_split(samples, settings.get("holdout", 0.2), settings.get("seed", 0))[0].everything()


from mmdefense.batches import split as fip_split  # noqa: E402
