from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from torch import nn

from mmdefense.kernels.loop import mean_score
from mmdefense.kernels.pruning_curve import head_activations, pruning_curve
from mmdefense.kernels.units import prune
from mmdefense.runtime.run import copy_state
from mmdefense_adapters.torch_classifier import TorchClassifier

SIZE = 12


@pytest.fixture
def taught(draw):
    """An adapter around a random net that is right about all samples but every seventh."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(64, SIZE),
            nn.Tanh(),  # signed features: a magnitude is not the value
            nn.Linear(SIZE, 3),
        ).double()
    samples = draw(60)
    adapter = TorchClassifier(net.eval(), example=samples.inputs[:1])
    with torch.no_grad():
        net[-1].bias -= adapter.logits(samples.inputs).mean(0)
        labels = adapter.logits(samples.inputs).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    return adapter, replace(samples, labels=labels)


def evaluated(adapter, samples, order, counts):
    """Return the score after pruning the first units of ``order``, each time on a fresh copy."""
    found = []
    for count in counts:
        fork = adapter.fork()
        prune(fork.model, [fork.head_group()], [(0, unit) for unit in order[:count]])
        found.append(mean_score(fork, samples))
    return found


@pytest.mark.parametrize("counts", [range(SIZE + 1), [0], [2, 5, 6, 12], [3, 3, 4]])
@pytest.mark.parametrize("batch_size", [7, 60, 256])
def test_every_point_is_that_of_the_pruned_model(taught, counts, batch_size):
    adapter, samples = taught
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1)).tolist()
    curve = pruning_curve(adapter, samples, order, list(counts), batch_size)
    expected = evaluated(adapter, samples, order, counts)
    torch.testing.assert_close(curve.tolist(), expected, rtol=0, atol=1e-6)
    assert len(set(expected)) > len(expected) // 2, "the curve is flat, so that this says nothing"


def test_a_head_without_bias_is_served(taught):
    adapter, samples = taught
    adapter.model[-1].bias = None
    counts = range(SIZE)  # with all pruned, every answer would be a tie of zeros
    curve = pruning_curve(adapter, samples, range(SIZE), counts)
    expected = evaluated(adapter, samples, list(range(SIZE)), counts)
    torch.testing.assert_close(curve.tolist(), expected, rtol=0, atol=1e-6)


def test_the_score_is_the_adapters_own(taught):
    class Partial(TorchClassifier):
        def score_outputs(self, batch, outputs):
            return outputs.softmax(1).gather(1, batch.labels[:, None])[:, 0]

    adapter, samples = taught
    adapter.__class__ = Partial
    curve = pruning_curve(adapter, samples, range(SIZE), [0, 4, 9])
    expected = evaluated(adapter, samples, list(range(SIZE)), [0, 4, 9])
    torch.testing.assert_close(curve.tolist(), expected, rtol=0, atol=1e-6)


def test_activations_are_mean_magnitudes_one_sample_at_a_time(taught):
    adapter, samples = taught
    expected = sum(adapter.embedding(one)[0].abs() for one in reference.one_by_one(samples)) / 60
    for batch_size in (7, 256):
        torch.testing.assert_close(head_activations(adapter, samples, batch_size), expected)
    assert (adapter.embedding(samples.everything()).mean(0).abs() < expected / 2).any()


def test_the_model_is_read_in_eval_mode_and_left_as_it_was(taught):
    adapter, samples = taught
    expected = pruning_curve(adapter, samples, range(SIZE), range(SIZE + 1))
    dormant = head_activations(adapter, samples)
    adapter.model.train()
    before = copy_state(adapter.model)
    assert torch.equal(pruning_curve(adapter, samples, range(SIZE), range(SIZE + 1)), expected)
    assert torch.equal(head_activations(adapter, samples), dormant)
    assert all(module.training for module in adapter.model.modules())
    for name, value in copy_state(adapter.model).items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_hooks for module in adapter.model.modules())
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_the_data_is_read_once_whatever_the_number_of_points(taught, monkeypatch):
    adapter, samples = taught
    adapter.unit_groups()  # it finds the head by a pass of its own
    calls = []
    genuine = adapter.logits
    monkeypatch.setattr(adapter, "logits", lambda inputs: (calls.append(1), genuine(inputs))[1])
    pruning_curve(adapter, samples, range(SIZE), range(SIZE + 1), batch_size=20)
    assert len(calls) == 3
