"""Second derivatives for operations of torchvision models that lack them; results do not change.

FIP differentiates a gradient. RoIAlign is linear in its features for fixed boxes, so its backward
pass is linear in the incoming gradient, and the derivative of that is RoIAlign again. Hardsigmoid
is ``relu6(x + 3) / 6``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["twice_differentiable"]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Make RoIAlign and hardsigmoid twice differentiable inside the ``with`` block."""
    with _Replaced():
        yield


class _Replaced(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.hardsigmoid:
            return _hardsigmoid(*args, **(kwargs or {}))
        if str(function) == "torchvision.roi_align":
            return _RoIAlign.apply(function, *args)
        return function(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3) / 6


class _RoIAlign(torch.autograd.Function):
    """RoIAlign of features, boxes, scale, height, width, samples and aligned."""

    @staticmethod
    def forward(ctx: Any, align: Any, features: Tensor, boxes: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(boxes)
        ctx.align, ctx.shape, ctx.how = align, features.shape, how
        return align(features, boxes, *how)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (boxes,) = ctx.saved_tensors
        back = _RoIAlignBackward.apply(ctx.align, gradient, boxes, ctx.shape, ctx.how)
        return (None, back, None, *(None for _ in ctx.how))


class _RoIAlignBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, align: Any, gradient: Tensor, boxes: Tensor, shape: torch.Size, how: Any
    ) -> Tensor:
        ctx.save_for_backward(boxes)
        ctx.align, ctx.how = align, how
        scale, height, width, samples, aligned = how
        return torch.ops.torchvision._roi_align_backward(  # type: ignore[no-any-return]
            gradient.contiguous(), boxes, scale, height, width, *shape, samples, aligned
        )

    @staticmethod
    def backward(ctx: Any, again: Tensor) -> tuple[Tensor | None, ...]:
        (boxes,) = ctx.saved_tensors
        # Through the first Function, so that it can be differentiated any number of times.
        return None, _RoIAlign.apply(ctx.align, again, boxes, *ctx.how), None, None, None
