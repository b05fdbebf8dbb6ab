from __future__ import annotations

import pytest
import torch
from condition import assert_same, condition

from mmdefense.analysis.unlearning_changes import Changes, activeness, unlearning_changes
from mmdefense.runtime.run import Run

SIZES = {"first": 4, "second": 6}


def test_both_unlearnings_leave_the_model_as_it_is(victims, data, triggered):
    adapter = victims[0]
    before = condition(adapter.model)
    found = unlearning_changes(adapter, data[0], triggered.samples, Run(0), lr=1e-2, max_epochs=50)
    assert_same(before, condition(adapter.model))
    units = sum(group.size for group in adapter.unit_groups())
    assert found.clean.shape == found.poison.shape == (units,)
    assert (found.clean > 0).all()
    assert not torch.equal(found.clean, found.poison)
    assert -1 <= found.correlation <= 1


def test_correlations_and_overlap_are_those_of_known_orders():
    rising = torch.arange(1.0, 11)
    changes = Changes(rising, rising.square(), SIZES)
    assert changes.rank_correlation == pytest.approx(1)
    assert 0.9 < changes.correlation < 1
    assert changes.overlap(0.3) == 1
    assert Changes(rising, rising.flip(0), SIZES).overlap(0.3) == 0
    assert Changes(rising, -rising, SIZES).correlation == pytest.approx(-1)


def test_the_changes_of_one_layer_are_those_of_its_units():
    rising = torch.arange(1.0, 11)
    found = Changes(rising, rising.square(), SIZES).within("second")
    assert found.clean.tolist() == [5, 6, 7, 8, 9, 10]
    assert found.poison.tolist() == [25, 36, 49, 64, 81, 100]
    assert found.sizes == {"second": 6}


def test_activeness_is_the_gradient_norm_of_each_unit_and_changes_nothing(victims, data):
    adapter = victims[0]
    before = condition(adapter.model)
    whole = len(data[0])
    norms = activeness(adapter, data[0], batch_size=whole)
    assert_same(before, condition(adapter.model))
    fork = adapter.fork()
    fork.model.train()
    fork.per_sample_loss(data[0].take(torch.arange(whole))).mean().backward()
    weight = fork.model[0].weight.grad.flatten(1)
    torch.testing.assert_close(norms["0"], weight.norm(dim=1).double(), rtol=1e-4, atol=1e-7)
