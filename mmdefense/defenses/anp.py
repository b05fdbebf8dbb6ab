"""ANP: adversarial neuron pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdefense.data.batch import Views
from mmdefense.defenses.base import Defense, Purifying
from mmdefense.defenses.unit_pruning import note_units_without_batch_norm, prune_by_mask
from mmdefense.kernels.coordinates import UnitMasks
from mmdefense.kernels.hooks import frozen_statistics
from mmdefense.kernels.loop import mean_loss_gradient, optimise
from mmdefense.kernels.perturbations import adversarial_noise, moved
from mmdefense.protocol import TaskAdapter, UnitGroup
from mmdefense.settings import BatchSize, NotNegative, Share, Whole
from mmdefense.training import Training

__all__ = ["ANP"]


@dataclass(frozen=True, kw_only=True)
class ANP(Defense):
    """Prune the units that matter least when units are adversarially perturbed.

    A mask m of the units, in ``[0, 1]``, is trained by
    ``alpha CE(m w, b) + (1 - alpha) max CE((m + d) w, (1 + x) b)`` over ``|d|, |x| <= eps``, with
    one signed gradient step from a random start. With BatchNorm, w and b are its weight and bias,
    as in the released code. Then w is zeroed for the units with the smallest masks.

    Ours: as many units are pruned as the utility guard allows (BackdoorBench: the number with the
    lowest ASR on test data, at a cost of up to a tenth of the accuracy); and for units without
    BatchNorm their own weights are masked, after a note to the user.

    Attributes:
        views: How the clean samples are augmented; see :data:`~mmdefense.data.batch.Views`.
        eps: Largest relative perturbation of a unit's weight and bias.
        alpha: Weight of the unperturbed loss.
        inner_steps: Gradient steps of the perturbation.
        lr: Learning rate of SGD on the masks: the released code's (BackdoorBench: 0.01).
        momentum: Momentum of SGD.
        steps: Updates of the masks; the released code takes 2,000 (ours, for time).
        batch_size: Clean samples per update.
        threshold: Only units with a mask of at most this are pruned.
        max_share: Largest fraction of the units to prune.

    References:
        Wu, Wang. *Adversarial Neuron Pruning Purifies Backdoored Deep Models*. NeurIPS 2021.
        arXiv:2110.14430
    """

    views: Views = "standard"
    eps: NotNegative = 0.4
    alpha: Share = 0.2
    inner_steps: Whole = 1
    lr: NotNegative = 0.2
    momentum: Share = 0.9
    steps: Whole = 500
    batch_size: BatchSize = 128
    threshold: Share = 0.9
    max_share: Share = 0.5

    def _run(self, work: Purifying[Any]) -> None:
        groups = list(work.adapter.unit_groups())
        masks = self.masks(work, groups)
        prune_by_mask(work, groups, masks, self.threshold, self.max_share, self.max_utility_drop)

    def trains(self, adapter: TaskAdapter[Any]) -> str:
        """Return the number of unit masks."""
        return f"{sum(group.size for group in adapter.unit_groups()):,} unit masks"

    def masks(self, work: Purifying[Any], groups: Sequence[UnitGroup]) -> list[Tensor]:
        """Train and return the masks of all units, G tensors ``(U,)``; the smallest go first."""
        note_units_without_batch_norm(work, groups)
        fork = work.adapter.fork()  # its BatchNorm statistics change
        space = UnitMasks(fork.model, groups, biases="own")
        device = space.masks[0].device

        def gradients(batch: Any, step: int) -> Tensor:
            generator = work.run.generator(f"noise/{step}", device)
            loss, found = self.gradient(fork, batch, space, generator)
            space.assign(found)
            return loss

        training = Training(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            schedule="constant",
        )
        optimise(
            fork.model,
            work.fit,
            training,
            work.run,
            gradients=gradients,
            stage="masks",
            parameters=space.masks,  # biases are perturbed but not masked
            after_step=space.settle,
        )
        return list(space.masks)

    def gradient(
        self, adapter: TaskAdapter[Any], batch: Any, space: UnitMasks, generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss of a batch, and the gradient of the objective.

        Args:
            adapter: The model; only the clean pass updates BatchNorm statistics.
            batch: N samples.
            space: The unit masks, with separate masks for biases.
            generator: Draws the random start of the perturbation.
        """
        loss, clean = mean_loss_gradient(adapter, batch, space.weights)
        plain = space.pull_back(clean)
        noise = adversarial_noise(
            adapter,
            batch,
            space,
            radius=self.eps,
            steps=self.inner_steps,
            generator=generator,
        )
        with moved(space, noise), frozen_statistics(adapter.model):
            _, found = mean_loss_gradient(adapter, batch, space.weights)
            worst = space.pull_back(found)
        mixed = [self.alpha * a + (1 - self.alpha) * b for a, b in zip(plain, worst, strict=True)]
        return loss, mixed
