from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmdefense.kernels.batch_norm import batch_norm_twice
from mmdefense.kernels.hooks import second_derivatives

SHAPES = {"linear": (6, 3), "conv1d": (4, 3, 5), "conv2d": (4, 3, 5, 2), "conv3d": (2, 3, 2, 3, 2)}


def drawn(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def derivatives(x, context):
    """Return the output, the running statistics, and all first and second derivatives."""
    x = x.detach().clone().requires_grad_()
    weight, bias = drawn(3, 1).requires_grad_(), drawn(3, 2).requires_grad_()
    mean, var = drawn(3, 3), drawn(3, 4).exp()
    with context():
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
        out = (y.tanh() * drawn(x.shape, 5)).sum()
        first = torch.autograd.grad(out, (x, weight, bias), create_graph=True)
        mixed = sum((g * drawn(g.shape, 6)).sum() + g.square().sum() for g in first)
        second = torch.autograd.grad(mixed, (x, weight, bias))
    return [y, mean, var, *first, *second]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_derivatives_are_those_of_pytorch(shape):
    x = drawn(shape, 0) * 2 + 1
    same(derivatives(x, batch_norm_twice), derivatives(x, torch.enable_grad))


@pytest.mark.parametrize(
    ("shape", "order"),
    [("conv2d", torch.channels_last), ("conv3d", torch.channels_last_3d)],
)
def test_second_derivative_keeps_channels_last(shape, order):
    x = drawn(SHAPES[shape], 0).contiguous(memory_format=order)
    found = derivatives(x, batch_norm_twice)
    same(found, derivatives(x, torch.enable_grad))
    assert all(g.is_contiguous(memory_format=order) for g in (found[3], found[6]))


def test_eval_mode_and_layers_without_weights_stay_with_pytorch():
    x, mean, var = drawn((4, 3, 2, 2), 0), drawn(3, 1), drawn(3, 2).exp()
    weight, bias = drawn(3, 3), drawn(3, 4)
    plain = [F.batch_norm(x, mean, var, weight, bias), F.batch_norm(x, None, None, training=True)]
    with batch_norm_twice():
        same([F.batch_norm(x, mean, var, weight, bias)], plain[:1])
        same([F.batch_norm(x, None, None, training=True)], plain[1:])
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(x[:1, :, :1, :1], None, None, weight, bias, training=True)


def test_it_holds_inside_second_derivatives_and_not_after():
    x, weight = drawn((4, 3), 0), torch.ones(3, dtype=torch.float64, requires_grad=True)

    def name():
        return F.batch_norm(x, None, None, weight, weight, training=True).grad_fn.name()

    before = name()
    with second_derivatives():
        assert name() != before
    assert name() == before
