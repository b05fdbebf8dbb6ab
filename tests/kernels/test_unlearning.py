from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.checkpoints.runs import RunStore
from mmdefense.errors import DivergenceError
from mmdefense.kernels.loop import mean_score, train
from mmdefense.kernels.unlearning import mean_gradient, unlearn
from mmdefense.runtime.run import Run, copy_state
from mmdefense.training import Training

SETTINGS = {"stop": 1 / 3, "lr": 0.1, "batch_size": 16, "max_epochs": 60}


@pytest.fixture
def learnt(build, separable):
    """Return a function that gives the same trained model each time."""
    adapter = build()
    train(adapter, separable, Training(steps=60, batch_size=20, lr=0.2), Run())
    assert mean_score(adapter, separable) == 1
    return adapter.fork


def test_it_ends_at_chance_and_before_the_bound(learnt, separable):
    adapter, run = learnt(), Run()
    epochs = unlearn(adapter, separable, run, **SETTINGS)
    looks = [entry["score"] for entry in run.history if "score" in entry]
    assert 1 < epochs < SETTINGS["max_epochs"]
    assert len(looks) == epochs
    assert looks[-1] <= 1 / 3 < min(looks[:-1])
    assert mean_score(adapter, separable) == looks[-1]
    losses = [entry["loss"] for entry in run.history if "loss" in entry]
    assert losses[-1] > losses[0]


def test_a_model_that_does_not_forget_ends_at_the_bound(learnt, separable):
    settings = SETTINGS | {"lr": 1e-9, "max_epochs": 3}
    assert unlearn(learnt(), separable, Run(), **settings) == 3


def test_an_ascent_that_leaves_the_finite_numbers_ends_in_its_last_finite_state(learnt, separable):
    adapter, step = learnt(), 0
    genuine = adapter.per_sample_loss

    def runs_away(batch):
        nonlocal step
        step += 1
        return genuine(batch) * (float("inf") if step > 8 else 1)

    adapter.per_sample_loss = runs_away
    unlearn(adapter, separable, Run(), **SETTINGS | {"stop": 0.0})
    assert all(value.isfinite().all() for value in adapter.model.state_dict().values())
    assert step > 8


def test_an_ascent_that_never_had_a_finite_loss_is_refused(learnt, separable):
    adapter = learnt()
    adapter.per_sample_loss = lambda batch: (
        torch.full((len(batch.labels),), torch.inf)
        * next(adapter.model.parameters()).sum().clamp(1, 1)
    )
    with pytest.raises(DivergenceError):
        unlearn(adapter, separable, Run(), **SETTINGS)


def test_it_is_reproducible(learnt, separable):
    states = []
    for seed in (0, 0, 1):
        adapter = learnt()
        unlearn(adapter, separable, Run(seed=seed), **SETTINGS)
        states.append(copy_state(adapter.model)["0.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_an_interrupted_run_goes_on_to_the_same_bits(learnt, separable, tmp_path):
    adapter = learnt()
    expected = unlearn(adapter, separable, Run(), **SETTINGS)

    def cut_off(event):
        if event.step >= 9:
            raise KeyboardInterrupt

    store = RunStore(tmp_path, every=1)
    run = Run(store=store, progress=cut_off)
    with pytest.raises(KeyboardInterrupt):
        unlearn(learnt(), separable, run, **SETTINGS)
    assert store.load("unlearn.progress") is not None
    for _ in range(2):  # the second time it is read, and not run
        twin = learnt()
        assert unlearn(twin, separable, Run(store=store), **SETTINGS) == expected
        for name, value in copy_state(adapter.model).items():
            assert torch.equal(value, twin.model.state_dict()[name]), name


def test_mean_gradient_is_that_of_the_mean_loss_by_name(adapter, samples):
    batch = samples.everything()
    adapter.model[0].bias.requires_grad_(False)
    found = mean_gradient(adapter, batch)
    nn.functional.cross_entropy(adapter.logits(batch.inputs), batch.labels).backward()
    assert set(found) == {name for name, _ in adapter.model.named_parameters()}
    for name, parameter in adapter.model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected)
