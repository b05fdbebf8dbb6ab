from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmdefense.kernels.outliers import anomaly_index
from mmdefense.scanning.weights import (
    channel_lipschitz,
    largest_singular_value,
    scan_weights,
    spectral_excess,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_lipschitz(weight, scale):
    """CLP's constant, a channel and a full decomposition at a time."""
    constants = []
    for channel, kernel in enumerate(weight):
        values = torch.linalg.svdvals(kernel.reshape(kernel.shape[0], -1))
        constants.append(values.max() * (1 if scale is None else scale[channel]))
    return torch.stack(constants)


@pytest.mark.parametrize(
    "shape", [(6, 5, 3, 3), (4, 16, 3, 3), (3, 2, 1, 1), (5, 7), (4, 3, 2, 3, 3), (2, 1, 7, 7)]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_channel_constants_are_those_of_a_full_decomposition(shape, scaled):
    weight = torch.randn(shape, generator=generator(), dtype=torch.float64)
    scale = torch.rand(shape[0], generator=generator(1), dtype=torch.float64) if scaled else None
    torch.testing.assert_close(channel_lipschitz(weight, scale), slow_lipschitz(weight, scale))


def test_a_channel_constant_bounds_the_gain_of_a_folded_convolution():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4).eval()
    norm.running_var.uniform_(0.5, 2, generator=generator())
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    constants = channel_lipschitz(conv.weight.detach(), scale)
    inputs = torch.randn(64, 3, 3, 3, generator=generator())  # one position: the matrix itself
    outputs = norm(conv(inputs)) - norm(conv(torch.zeros(1, 3, 3, 3)))
    rows = (conv.weight.flatten(1) * scale[:, None]).norm(dim=1)
    gains = outputs.flatten(1).abs() / inputs.flatten(1).norm(dim=1, keepdim=True)
    assert (gains <= rows + 1e-5).all()
    assert (constants <= rows + 1e-5).all()  # a spectral norm is below the Frobenius norm


@pytest.mark.parametrize("shape", [(40, 60), (300, 700), (900, 300)])
def test_the_largest_singular_value_is_that_of_a_full_decomposition(shape):
    matrix = torch.randn(shape, generator=generator())
    exact = float(torch.linalg.svdvals(matrix)[0])
    assert largest_singular_value(matrix) == pytest.approx(exact, rel=0.01)
    matrix += 3 * torch.outer(torch.ones(shape[0]), torch.ones(shape[1]))
    exact = float(torch.linalg.svdvals(matrix)[0])
    assert largest_singular_value(matrix) == pytest.approx(exact, rel=1e-5)


def test_the_spectral_excess_has_no_scale_and_is_one_for_an_orthogonal_matrix():
    matrix = torch.linalg.qr(torch.randn(8, 8, generator=generator())).Q
    assert spectral_excess(5 * matrix) == pytest.approx(1, rel=1e-5)
    assert spectral_excess(torch.ones(8, 8)) == pytest.approx(8**0.5, rel=1e-5)
    assert spectral_excess(torch.zeros(3, 3)) == 0


def test_the_anomaly_index_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])  # median 3, deviations 2 1 0 1 97
    torch.testing.assert_close(anomaly_index(values)[-1], torch.tensor(97 / 1.4826))
    assert anomaly_index(torch.ones(5)).tolist() == [0] * 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.embed = nn.Embedding(9, 32)
        self.head = nn.Linear(32, 10)


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def subjects(findings, rule):
    return [finding.subject for finding in findings if finding.id == f"weights-{rule}"]


@pytest.mark.parametrize("form", [lambda m: m, lambda m: m.state_dict()])
def test_planted_outliers_are_named(net, form):
    with torch.no_grad():
        net.bn.weight[7] = 20
        net.blocks[3].weight += 0.2
        net.head.weight[4] *= 10
        net.head.bias[6] = 9
    findings = scan_weights(form(net))
    assert subjects(findings, "channel-lipschitz")[0] == "conv.weight"
    assert "first 7" in next(f.reference for f in findings if f.subject == "conv.weight")
    assert subjects(findings, "spectrum") == ["blocks.3.weight"]
    assert set(subjects(findings, "head-row")) == {"head.weight[4]", "head.weight[6]"}
    levels = {finding.id.removeprefix("weights-"): finding.level for finding in findings}
    assert levels == {"channel-lipschitz": "info", "spectrum": "info", "head-row": "low"}


def test_tensors_in_another_order_are_told_apart_by_name(net):
    """As in safetensors, which sorts: no BatchNorm is paired, and the head is no other matrix."""
    with torch.no_grad():
        net.head.weight[4] *= 10
        net.head.bias[6] = 9
        net.bn.weight[7] = 20
    others = {"head": "classifier", "blocks": "layers", "bn": "conv_norm"}  # the head is not last
    named = {others.get(n.partition(".")[0], n.partition(".")[0]) + n[n.index("."):]: value
             for n, value in net.state_dict().items()}  # fmt: skip
    findings = scan_weights(dict(sorted(named.items())), ordered=False)
    rows = {"classifier.weight[4]", "classifier.weight[6]"}
    assert set(subjects(findings, "head-row")) == rows
    assert "conv.weight" not in subjects(findings, "channel-lipschitz")


def test_an_ordinary_net_has_no_outliers(net):
    assert scan_weights(net) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_left_out(net, value):
    with torch.no_grad():
        for weight in (net.conv.weight, net.bn.running_var, net.blocks[3].weight, net.head.weight):
            weight.view(-1)[0] = value
    findings = scan_weights(net)
    names = ["conv.weight", "bn.running_var", "blocks.3.weight", "head.weight"]
    assert subjects(findings, "not-finite") == names
    assert {(f.level, f.value) for f in findings if f.subject == "conv.weight"} == {
        ("medium", "1 of 864")
    }


def test_tensors_without_values_are_passed_by(net):
    empty = {"a.weight": torch.zeros(5, 0), "b.weight": torch.zeros(0, 5, 3)}
    assert scan_weights({**empty, **net.state_dict()}) == []


def test_the_model_is_left_as_it_was(net):
    before = copy.deepcopy(net.state_dict())
    scan_weights(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_the_channels_of_gpt2_are_columns():
    from transformers.pytorch_utils import Conv1D

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(48, 16), nn.Linear(48, 5))
    with torch.no_grad():
        model[0].weight[:, 40] *= 30
    for form in (model, model.state_dict()):
        (found,) = scan_weights(form)
        assert "first 40 " in found.reference
