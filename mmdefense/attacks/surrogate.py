"""What clean-label attacks do with a surrogate: a clean model of the victim's architecture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmdefense.attacks.base import replaced
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.kernels.hooks import frozen, mode
from mmdefense.protocol import TaskAdapter

__all__ = ["harder", "loss_sign"]


def harder(
    surrogate: TaskAdapter[LabelledBatch],
    samples: LabelledSamples,
    chosen: Tensor,
    *,
    epsilon: float,
    steps: int,
    batch_size: int,
) -> LabelledSamples:
    """Perturb some samples so that a clean model misclassifies them.

    They are perturbed by projected gradient ascent on the surrogate's loss: a victim that cannot
    learn the class from these samples learns their trigger instead.

    Args:
        surrogate: A model that was trained on clean data.
        samples: The training set.
        chosen: Indices of the samples to perturb, ``(n,)``.
        epsilon: Largest change of a pixel, relative to full brightness.
        steps: Number of steps, each of a quarter of ``epsilon``.
        batch_size: Samples that are perturbed at once.
    """
    changed = []
    for part in torch.split(chosen, batch_size) if len(chosen) else ():
        batch = samples.take(part)
        change = torch.zeros_like(batch.inputs)
        for _ in range(steps):
            moved = (batch.inputs + change).clamp(0, 1)
            sign = loss_sign(surrogate, batch.with_inputs(moved), moved.requires_grad_())
            change = (change + epsilon / 4 * sign).clamp(-epsilon, epsilon)
        changed.append((batch.inputs + change).clamp(0, 1))
    if not changed:
        return samples
    return replace(samples, inputs=replaced(samples.inputs, chosen, torch.cat(changed)))


def loss_sign(surrogate: TaskAdapter[LabelledBatch], batch: LabelledBatch, leaf: Tensor) -> Tensor:
    """Return the sign of the gradient of the loss of ``batch`` with respect to its leaf tensor."""
    with mode(surrogate.model, train=False), frozen(surrogate.model):
        (gradient,) = torch.autograd.grad(surrogate.per_sample_loss(batch).sum(), leaf)
    return gradient.sign()
