from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.metrics.tac import neuron_coverage_ratio, trigger_activated_change
from mmdefense_adapters.torch_classifier import TorchClassifier


@pytest.fixture
def net() -> nn.Sequential:
    """Three filters that see the pixel itself, nothing, and twice the pixel; then two classes."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 64, 2)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1, 1))
    return net.train()


def test_tac_is_the_mean_change_of_the_pooled_activation(net):
    adapter = TorchClassifier(net)
    samples = LabelledSamples(torch.zeros(5, 1, 8, 8), torch.tensor([0, 1, 1, 1, 1]))
    adapter.samples(samples)
    triggered = BadNets(size=2, pattern="white").triggered(samples, adapter)
    change = trigger_activated_change(adapter, triggered, batch_size=3)
    torch.testing.assert_close(change, {"0": torch.tensor([1.0, 0.0, 2.0]) * 4 / 64})
    assert net.training


def test_tac_does_not_let_rises_and_falls_cancel(net):
    adapter = TorchClassifier(net)
    inputs = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    samples = LabelledSamples(inputs, torch.tensor([1, 1]))
    adapter.samples(samples)
    triggered = BadNets(size=2, pattern="checkerboard").triggered(
        samples, adapter
    )  # +2 and -2 pixels
    change = trigger_activated_change(adapter, triggered, layers=["0"])
    torch.testing.assert_close(change["0"], torch.tensor([1.0, 0.0, 2.0]) * 2 / 64)


def test_coverage_is_the_overlap_of_equal_tops():
    change = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.0])
    order = torch.tensor([3, 0, 1, 2, 4])
    assert neuron_coverage_ratio(order, change, 0.2) == 0.0  # 3 against 1
    assert neuron_coverage_ratio(order, change, 0.4) == 0.5  # 3, 0 against 1, 3
    assert neuron_coverage_ratio(order, change, 0.6) == pytest.approx(2 / 3)
    assert neuron_coverage_ratio(order, change, 1.0) == 1.0
    assert neuron_coverage_ratio(change.argsort(descending=True), change, 0.01) == 1.0


def test_coverage_refuses_what_is_no_order():
    with pytest.raises(BadInputError, match="each of the 3 units once"):
        neuron_coverage_ratio(torch.tensor([0, 0, 1]), torch.rand(3), 0.5)
    with pytest.raises(BadInputError, match="fraction must"):
        neuron_coverage_ratio(torch.arange(3), torch.rand(3), 0.0)
