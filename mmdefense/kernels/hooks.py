"""Temporary changes to a model, each undone when its ``with`` block exits, even on errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdefense.errors import UnsupportedError, one_line
from mmdefense.kernels.batch_norm import batch_norm_twice

__all__ = [
    "capture",
    "channels_last",
    "frozen",
    "frozen_statistics",
    "mode",
    "recomputed",
    "second_derivatives",
    "watch_modules",
]

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


@contextmanager
def mode(model: nn.Module, *, train: bool, batch_norm: bool | None = None) -> Iterator[None]:
    """Put ``model`` in train or eval mode, and its BatchNorm layers in ``batch_norm`` if given."""
    before = [(module, module.training) for module in model.modules()]
    model.train(train)
    if batch_norm is not None:
        for module in model.modules():
            if isinstance(module, _BATCH_NORMS):
                module.train(batch_norm)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable the gradients of all parameters, so that a backward pass does not compute them."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm layers from updating their running statistics; they normalise as before."""
    layers = [m for m in model.modules() if isinstance(m, _BATCH_NORMS) and m.training]
    before = [(layer, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracks in before:
            layer.track_running_stats = tracks


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Keep the weights of convolutions in channels-last order, in which they run faster.

    This applies to convolutions over images and clips, but not to a clip's patch embedding: its
    patches do not overlap, so it is a matrix product in any memory format. Strided 1x1 convolutions
    get a contiguous input: on the CPU, in channels-last order, their weight gradient writes out of
    bounds (oneDNN of torch 2.15: 8 channels, 48x64).
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, nn.Conv2d) or (isinstance(m, nn.Conv3d) and m.kernel_size != m.stride)
    ]
    before = [layer.weight.is_contiguous() for layer in layers]
    for layer in layers:
        order = torch.channels_last if layer.weight.ndim == 4 else torch.channels_last_3d
        layer.weight.data = layer.weight.data.contiguous(memory_format=order)
    strided = [layer for layer in layers if _skips_pixels(layer)]
    handles = [layer.register_forward_pre_hook(_contiguous_input) for layer in strided]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, plain in zip(layers, before, strict=True):
            if plain:
                layer.weight.data = layer.weight.data.contiguous()


def _skips_pixels(layer: nn.Conv2d | nn.Conv3d) -> bool:
    return max(layer.kernel_size) == 1 and max(layer.stride) > 1


def _contiguous_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:]) if inputs[0].device.type == "cpu" else inputs


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Recompute the activations of each block in the backward pass (gradient checkpointing).

    It takes less memory and more time, and has an effect in train mode only. It uses the model's
    own switch, as in Transformers, in the variant that can be differentiated twice.

    Raises:
        UnsupportedError: If the model has no such switch.
    """
    kinds = ("activation_checkpointing", "gradient_checkpointing")  # the second is the old name
    kind = next((kind for kind in kinds if hasattr(model, f"{kind}_enable")), None)
    if kind is None:
        raise UnsupportedError(
            "gradient_checkpointing needs a model that supports it, such as those of Transformers; "
            f"{type(model).__name__} does not: leave it out"
        )
    was = getattr(model, f"is_{kind}", False)
    try:
        getattr(model, f"{kind}_enable")({"use_reentrant": False})
    except ValueError as error:  # a model class that does not support it
        raise UnsupportedError(f"gradient_checkpointing is not possible: {one_line(error)}") from (
            error
        )
    try:
        yield
    finally:
        if not was:
            getattr(model, f"{kind}_disable")()


@contextmanager
def watch_modules(
    modules: Sequence[nn.Module], hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]
) -> Iterator[None]:
    """Call ``hook(module, inputs, output)`` after each forward pass of ``modules``."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(
    model: nn.Module, layers: Sequence[str], *, inputs: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect the latest output of each named layer, with its graph.

    Args:
        model: The model that contains the layers.
        layers: Names as in ``model.named_modules()``.
        inputs: Whether the first input is collected instead of the output.

    Yields:
        A dict that each forward pass fills, by name.

    Example:
        >>> with capture(model, ["conv"]) as outputs:
        ...     _ = model(images)
        >>> outputs["conv"].shape
        torch.Size([30, 4, 8, 8])
    """
    names = {model.get_submodule(name): name for name in layers}
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        value = given[0] if inputs else output
        # A copy, because the model may later add a residual to this tensor in place.
        kept[names[module]] = (value[0] if isinstance(value, tuple) else value).clone()

    with watch_modules(list(names), keep):
        yield kept


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Use attention that can be differentiated twice, and BatchNorm that does so cheaply.

    Results do not change.
    """
    with sdpa_kernel(SDPBackend.MATH), batch_norm_twice():
        yield
