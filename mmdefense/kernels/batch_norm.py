"""BatchNorm in train mode with a cheap second derivative: a few passes over its input.

PyTorch composes the second derivative of BatchNorm from some thirty elementwise operations and
loses the memory format along the way; on a CPU that takes a third of the time of a step that
differentiates a gradient norm. Here both derivatives are written out. With ``x^ = (x - mean) r``,
``r`` the inverse standard deviation per channel, and ``P u = u - mean(u) - x^ mean(u x^)``, the
first is ``gamma r P g`` for an incoming gradient ``g``. P is self-adjoint; the second derivative
follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["batch_norm_twice"]


@contextmanager
def batch_norm_twice() -> Iterator[None]:
    """Use this second derivative for BatchNorm in train mode; results do not change."""
    with _Replaced():
        yield


class _Replaced(TorchFunctionMode):
    """Sends each call of ``F.batch_norm`` in train mode to :class:`_BatchNorm`."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        return (_batch_norm if function is F.batch_norm else function)(*args, **given)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    is_single = input.numel() == input.shape[1]  # one value per channel: PyTorch raises its error
    if not training or weight is None or bias is None or is_single:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    statistics = (running_mean, running_var, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, statistics)  # type: ignore[no-any-return]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Any) -> Tensor:
        mean, var, momentum, eps = statistics
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        return *_Backward.apply(gradient, x, weight, mean, inverse, ctx.eps), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = _laid_out_like(x, g)
        ctx.save_for_backward(g, x, weight, mean, inverse)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, inverse, True, eps, [True, True, True]
        )
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, for_weight: Tensor, for_bias: Tensor) -> Any:
        """Differentiate ``<a, gamma r P g> + <for_weight, sum g x^> + <for_bias, sum g>``.

        With ``S = mean(a g) - mean(a) mean(g) - mean(a x^) mean(g x^)`` the derivative with respect
        to g is ``gamma r P a + for_weight x^ + for_bias``; with respect to x it is
        ``r (for_weight - gamma r mean(a x^)) P g - gamma r^2 (mean(g x^) P a + S x^)``; and with
        respect to gamma ``N r S`` for N entries per channel.
        """
        g, x, weight, mean, r = ctx.saved_tensors
        a = _laid_out_like(x, a)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1]

        def broadcast(value: Tensor) -> Tensor:
            return value.view(1, -1, *(1,) * (x.ndim - 2))

        x_hat = (x - broadcast(mean)).mul_(broadcast(r))
        a_mean, g_mean = a.mean(axes), g.mean(axes)
        a_x, g_x = (a * x_hat).mean(axes), (g * x_hat).mean(axes)
        spread = (a * g).mean(axes) - a_mean * g_mean - a_x * g_x
        scale = weight * r
        to_g = _combined(
            broadcast,
            (a, scale),
            (x_hat, for_weight - scale * a_x),
            for_bias - scale * a_mean,
        )
        of_g, of_a = r * (for_weight - scale * a_x), -scale * r * g_x
        to_x = _combined(
            broadcast,
            (g, of_g),
            (a, of_a),
            -of_g * g_mean - of_a * a_mean,
            (x_hat, -of_g * g_x - of_a * a_x - scale * r * spread),
        )
        return to_g, to_x, count * r * spread, None, None, None


def _combined(
    broadcast: Callable[[Tensor], Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    shift: Tensor,
    third: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the sum of full tensors, each times a factor per channel, plus a shift per channel."""
    total = torch.addcmul(broadcast(shift), first[0], broadcast(first[1])).addcmul_(
        second[0], broadcast(second[1])
    )
    return total if third is None else total.addcmul_(third[0], broadcast(third[1]))


def _laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """Return ``other`` in the memory format of ``x``: mixed formats are slow, and propagate."""
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    order = orders.get(x.ndim, torch.contiguous_format)
    kept = order if x.is_contiguous(memory_format=order) else torch.contiguous_format
    return other.contiguous(memory_format=kept)
