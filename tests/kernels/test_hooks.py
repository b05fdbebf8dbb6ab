from __future__ import annotations

import copy

import pytest
import torch
from condition import assert_same, condition
from torch import nn

from mmdefense.kernels.hooks import (
    capture,
    channels_last,
    frozen,
    frozen_statistics,
    mode,
    second_derivatives,
    watch_modules,
)


@pytest.fixture
def net():
    """A net in a mixed mode, with a frozen weight and a gradient."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    net.train()[2].eval()
    net[0].bias.requires_grad_(False)
    net[1].weight.grad = torch.ones(3)
    return net


CONTEXTS = {
    "mode": lambda net: mode(net, train=False),
    "mode of BatchNorm": lambda net: mode(net, train=False, batch_norm=True),
    "frozen": frozen,
    "frozen_statistics": frozen_statistics,
    "channels_last": channels_last,
    "watch_modules": lambda net: watch_modules([net[0], net], print),
    "capture": lambda net: capture(net, ["0", "1"]),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_undone(net, name, fails):
    before = condition(net)
    try:
        with CONTEXTS[name](net):
            assert condition(net) != before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert_same(before, condition(net))


def test_mode_sets_batchnorm_apart(net):
    with mode(net, train=True, batch_norm=False):
        assert [module.training for module in net.modules()] == [True, True, False, True]
    with mode(net, train=False, batch_norm=True):
        assert [module.training for module in net.modules()] == [False, False, True, False]


def test_frozen_statistics_normalise_by_batch_but_learn_nothing(net):
    images = torch.randn(4, 2, 5, 5)
    twin = copy.deepcopy(net)
    with frozen_statistics(net):
        found = net(images)
    assert torch.equal(found, twin(images))
    assert int(net[1].num_batches_tracked) == 0
    assert torch.equal(net[1].running_mean, torch.zeros(3))
    net.eval()
    with frozen_statistics(net):
        found = net(images)
    assert torch.equal(found, copy.deepcopy(net)(images))
    assert not torch.equal(found, twin(images))


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_channels_last_survives_strided_convolutions_of_one_pixel(channels):
    """On the CPU oneDNN corrupts the memory of such a layer's gradient, at 8 channels of 48x64."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 16, 1, stride=2, bias=False)
    images = torch.rand(4, channels, 48, 64).contiguous(memory_format=torch.channels_last)
    with channels_last(nn.Sequential(layer)):
        answers = layer(images)
        answers.square().sum().backward()
    expected = torch.einsum("nohw,nchw->oc", 2 * answers.double(), images[:, :, ::2, ::2].double())
    assert torch.allclose(layer.weight.grad[..., 0, 0].double(), expected, rtol=1e-4)
    assert not layer._forward_pre_hooks


def test_channels_last_survives_strided_convolutions_of_one_pixel_over_clips():
    torch.manual_seed(0)
    layer = nn.Conv3d(8, 16, 1, stride=(1, 2, 2), bias=False)
    clips = torch.rand(4, 8, 3, 48, 64).contiguous(memory_format=torch.channels_last_3d)
    with channels_last(nn.Sequential(layer)):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)
        answers = layer(clips)
        answers.square().sum().backward()
    seen = clips[..., ::2, ::2].double()
    expected = torch.einsum("nothw,ncthw->oc", 2 * answers.double(), seen)
    assert torch.allclose(layer.weight.grad[..., 0, 0, 0].double(), expected, rtol=1e-4)
    assert layer.weight.is_contiguous()
    assert not layer._forward_pre_hooks


def test_channels_last_orders_the_weights_and_keeps_parameters_the_same_objects(net):
    weight = net[0].weight
    with channels_last(net):
        assert net[0].weight is weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    assert weight.is_contiguous()
    net.to(memory_format=torch.channels_last)
    with channels_last(net):
        pass
    assert weight.is_contiguous(memory_format=torch.channels_last)  # the user's own choice stays


def test_capture_is_not_changed_by_what_the_model_does_in_place(net):
    images = torch.randn(4, 2, 5, 5)
    with capture(net, ["0", "1"]) as outputs, capture(net, ["2"], inputs=True) as inputs:
        net(images)
    expected = net[1](net[0](images))
    assert expected.min() < 0
    torch.testing.assert_close(outputs["0"], net[0](images))
    torch.testing.assert_close(outputs["1"], expected)
    torch.testing.assert_close(inputs["2"].relu(), expected.relu())
    outputs["1"].square().sum().backward()  # with its graph
    assert net[0].weight.grad.count_nonzero() > 0


def test_second_derivatives_choose_the_plain_attention_and_leave_other_settings():
    def backends():
        return (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        )

    before, benchmark = backends(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with second_derivatives():
            assert backends() == (False, False, True)
            assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = benchmark
    assert backends() == before
