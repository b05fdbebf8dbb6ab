"""Worst-case perturbations of the weights (SAM, ANP) and of the inputs (PGD).

References:
    [SAM] Foret, Kleiner, Mobahi, Neyshabur. *Sharpness-Aware Minimization for Efficiently Improving
    Generalization*. ICLR 2021. arXiv:2010.01412
    [ASAM] Kwon, Kim, Park, Choi. *ASAM: Adaptive Sharpness-Aware Minimization*. ICML 2021.
    arXiv:2102.11600
    [ANP] Wu, Wang. *Adversarial Neuron Pruning Purifies Backdoored Deep Models*. NeurIPS 2021.
    arXiv:2110.14430
    [PGD] Madry, Makelov, Schmidt, Tsipras, Vladu. *Towards Deep Learning Models Resistant to
    Adversarial Attacks*. ICLR 2018. arXiv:1706.06083
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor

from mmdefense.data.batch import Batch
from mmdefense.kernels.coordinates import Coordinates
from mmdefense.kernels.hooks import frozen, frozen_statistics
from mmdefense.kernels.loop import mean_loss_gradient
from mmdefense.protocol import InputAdapter, TaskAdapter
from mmdefense.runtime.memory import gradient_in_parts

__all__ = [
    "ASAM_ETA",
    "adversarial_noise",
    "moved",
    "perturbed",
    "sharpness_aware_gradient",
    "sharpness_step",
    "worst_change",
]

B = TypeVar("B", bound=Batch)

ASAM_ETA = 0.01
"""Added to each absolute weight, so that small ones are perturbed too; the value of [ASAM]."""


@contextmanager
def moved(space: Coordinates, change: Sequence[Tensor], length: float = 1.0) -> Iterator[None]:
    """Add ``length`` times ``change`` to the coordinates, and restore them bit for bit on exit.

    The bounds of the coordinates are ignored.
    """
    held = [*space.parameters, *space.weights]
    kept = [tensor.detach().clone() for tensor in held]
    try:
        with torch.no_grad():
            torch._foreach_add_(space.parameters, list(change), alpha=length)
        space.write()
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(held, kept)


def sharpness_step(
    gradients: Sequence[Tensor], radius: float, scales: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return the step within ``radius`` that maximises the linearised loss.

    That is ``radius g / ||g||`` over all parameters together [SAM]; or, if ``scales`` T are given,
    ``radius T^2 g / ||T g||``, within ``||T^-1 step|| <= radius``, so that a large weight moves
    further than a small one [ASAM].
    """
    with torch.no_grad():
        scaled, step = list(gradients), list(gradients)
        if scales is not None:
            scaled = [scale * g for scale, g in zip(scales, gradients, strict=True)]
            step = [scale * g for scale, g in zip(scales, scaled, strict=True)]
        norm = torch.stack(torch._foreach_norm(scaled)).norm()
        return list(torch._foreach_mul(step, radius / (norm + 1e-12)))


def sharpness_aware_gradient(
    adapter: TaskAdapter[B],
    batch: B,
    space: Coordinates,
    *,
    radius: float,
    eta: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss, and the gradient of the parameters after :func:`sharpness_step`.

    Only the first of the two passes updates BatchNorm statistics.

    Args:
        adapter: The model.
        batch: N samples.
        space: The trained coordinates.
        radius: Length of the step.
        eta: Added to the sizes of the coordinates, which then scale the step; None disables
            scaling.

    Example:
        >>> from mmdefense.kernels.coordinates import Weights, trainable
        >>> from mmdefense.kernels.perturbations import sharpness_aware_gradient
        >>> space, batch = Weights(trainable(model)), samples.take(torch.arange(4))
        >>> loss, found = sharpness_aware_gradient(adapter, batch, space, radius=0.1)
        >>> len(found) == len(space.parameters)
        True
    """
    loss, gradients = mean_loss_gradient(adapter, batch, space.weights)
    scales = None if eta is None else [size + eta for size in space.sizes()]
    step = sharpness_step(space.pull_back(gradients), radius, scales)
    with moved(space, step), frozen_statistics(adapter.model):
        _, worst = mean_loss_gradient(adapter, batch, space.weights)
        return loss, space.pull_back(worst)


def adversarial_noise(
    adapter: TaskAdapter[B],
    batch: B,
    space: Coordinates,
    *,
    radius: float,
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return noise on the parameters, within ``+-radius``, that raises the mean loss [ANP].

    Each step adds ``radius / steps`` times the sign of the gradient. The model is not changed;
    apply the noise with :func:`moved`.

    Args:
        adapter: The model; its BatchNorm statistics are not updated.
        batch: N samples.
        space: The coordinates to perturb, such as unit masks.
        radius: Largest absolute value of the noise.
        steps: Number of ascent steps.
        generator: Draws a uniformly random start, on the device of the model; None starts at zero.
    """
    noise = [_start(parameter, radius, generator) for parameter in space.parameters]
    for _ in range(steps):
        with moved(space, noise), frozen_statistics(adapter.model):
            _, gradients = mean_loss_gradient(adapter, batch, space.weights)
            pulled = space.pull_back(gradients)
        for value, gradient in zip(noise, pulled, strict=True):
            value.add_(gradient.sign(), alpha=radius / steps).clamp_(-radius, radius)
    return noise


def _start(like: Tensor, radius: float, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.zeros_like(like, requires_grad=False)
    drawn = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return (2 * drawn - 1) * radius


def perturbed(adapter: InputAdapter[B], batch: B, change: Tensor) -> B:
    """Return ``batch`` with ``change`` added to its inputs, within their bounds, with grad.

    Args:
        adapter: Reads the batch.
        batch: N samples.
        change: Shape ``(N, ...)``, or ``(1, ...)`` for the same change to all samples.
    """
    inputs, bounds = adapter.inputs(batch) + change, adapter.input_bounds(batch)
    return adapter.with_inputs(batch, inputs if bounds is None else inputs.clamp(*bounds))


def worst_change(
    adapter: InputAdapter[B],
    batch: B,
    *,
    radius: float,
    steps: int,
    step_size: float,
    norm: Literal["linf", "l2", "l1"] = "linf",
    universal: bool = False,
    loss: Callable[[B], Tensor] | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a perturbation of the inputs that raises the loss, by projected gradient ascent [PGD].

    The model is used in its current mode; neither weights nor statistics are changed.

    Args:
        adapter: The model.
        batch: N samples.
        radius: Largest norm of the perturbation of a sample.
        steps: Number of steps.
        step_size: Length of a step, in the chosen norm.
        norm: ``"linf"`` steps along the sign of the gradient, the others along the gradient. A
            perturbation beyond the radius is clamped for ``"linf"`` and rescaled for the others.
        universal: Whether all samples share one perturbation, ``(1, ...)``, that raises the mean
            loss.
        loss: Loss of each sample of a perturbed batch, ``(N,)``; the training loss by default.
        start: Initial perturbation; zero by default.
        generator: Adds a uniformly random start in ``+-radius``, on the device of the inputs.

    Returns:
        Shape ``(N, ...)``, detached; apply it with :func:`perturbed`. Unless it is universal, the
        perturbed inputs stay within their bounds.
    """
    inputs, bounds = adapter.inputs(batch), adapter.input_bounds(batch)
    losses = adapter.per_sample_loss if loss is None else loss

    def projected(change: Tensor) -> Tensor:
        change = _in_ball(change, radius, norm)
        if universal or bounds is None:
            return change
        return (inputs + change).clamp(*bounds) - inputs

    change = torch.zeros_like(inputs[:1] if universal else inputs) if start is None else start
    if generator is not None:
        change = change + _start(change, radius, generator)
    change = projected(change)
    with frozen(adapter.model), frozen_statistics(adapter.model):
        for _ in range(steps):
            change = change.detach().requires_grad_()

            def value(rows: slice, change: Tensor = change) -> tuple[Tensor, Tensor]:
                part = batch.rows(rows)
                if universal:
                    mean = losses(perturbed(adapter, part, change)).mean()
                else:  # in bounds already; clamping again would cut the gradient there
                    moved_inputs = adapter.inputs(part) + change[rows]
                    mean = losses(adapter.with_inputs(part, moved_inputs)).mean()
                return mean, mean

            work = "perturbing inputs"
            _, (gradient,) = gradient_in_parts(value, len(batch), [change], work, adapter.model)
            change = projected(change.detach() + step_size * _direction(gradient, norm))
    return change.detach()


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the sign of the gradient, or the gradient scaled to length one, for each sample."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _lengths(gradient, norm).clamp(min=1e-12)


def _in_ball(change: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "linf":
        return change.clamp(-radius, radius)
    return change * (radius / _lengths(change, norm).clamp(min=1e-12)).clamp(max=1)


def _lengths(values: Tensor, norm: str) -> Tensor:
    """Return the norm of each sample, with axes to broadcast."""
    lengths: Tensor = torch.linalg.vector_norm(
        values, 1 if norm == "l1" else 2, dim=tuple(range(1, values.ndim)), keepdim=True
    )
    return lengths
