"""RNP: reconstructive neuron pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmdefense.data.batch import Views
from mmdefense.defenses.base import Defense, Purifying
from mmdefense.defenses.unit_pruning import note_units_without_batch_norm, prune_by_mask
from mmdefense.kernels.coordinates import UnitMasks
from mmdefense.kernels.loop import mean_loss_gradient, optimise
from mmdefense.kernels.unlearning import chance_level, unlearn
from mmdefense.protocol import TaskAdapter, UnitGroup
from mmdefense.settings import BatchSize, NotNegative, Share, Whole
from mmdefense.training import Training

__all__ = ["RNP"]


@dataclass(frozen=True, kw_only=True)
class RNP(Defense):
    """Unlearn clean data, train masks that recover it, and prune the units with the smallest masks.

    Gradient ascent on the clean loss is applied to all weights of a copy, until it has forgotten
    the task. With these weights fixed, masks of its units in ``[0, 1]`` are trained to minimise
    ``alpha CE``: masking the units that the ascent turned against the task restores the task. Then
    the units of the given model with the smallest masks are pruned.

    Ours: as many units are pruned as the utility guard allows (the released code sweeps
    thresholds up to 0.9, and BackdoorBench takes 0.7); and for units without BatchNorm their own
    weights are masked, after a note to the user.

    Attributes:
        views: How the clean samples are augmented; see :data:`~mmdefense.data.batch.Views`.
        unlearn_lr: Learning rate of the ascent.
        unlearn_stop: Score at which the ascent ends. None means twice chance (the released code's
            0.2 for ten classes), or halfway from chance to 1 if that is less.
        unlearn_epochs: Largest number of epochs of the ascent.
        alpha: Weight of the loss that the masks minimise.
        lr: Learning rate of SGD on the masks.
        momentum: Momentum of SGD.
        epochs: Epochs of mask training.
        batch_size: Samples per update, in both phases.
        threshold: Only units with a mask of at most this are pruned.
        max_share: Largest fraction of the units to prune.

    References:
        Li, Lyu, Ma, Koren, Lyu, Li, Jiang. *Reconstructive Neuron Pruning for Backdoor Defense*.
        ICML 2023. arXiv:2305.14876
    """

    views: Views = "standard"
    unlearn_lr: NotNegative = 0.01
    unlearn_stop: NotNegative | None = None
    unlearn_epochs: Whole = 20
    alpha: NotNegative = 0.2
    lr: NotNegative = 0.2
    momentum: Share = 0.9
    epochs: Whole = 20
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
        fork = work.adapter.fork()
        chance = chance_level(fork, work.fit)
        forgotten = min(2 * chance, (1 + chance) / 2)
        unlearn(
            fork,
            work.fit,
            work.run,
            stop=forgotten if self.unlearn_stop is None else self.unlearn_stop,
            lr=self.unlearn_lr,
            batch_size=self.batch_size,
            max_epochs=self.unlearn_epochs,
        )
        space = UnitMasks(fork.model, groups, biases="none")

        def gradients(batch: Any, _: int) -> Tensor:
            loss, found = mean_loss_gradient(fork, batch, space.weights)
            space.assign([self.alpha * gradient for gradient in space.pull_back(found)])
            return loss

        size = min(self.batch_size, len(work.fit))
        training = Training(
            steps=self.epochs * -(-len(work.fit) // size),
            batch_size=size,
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
            stage="recover",
            parameters=space.parameters,
            after_step=space.settle,
        )
        return list(space.masks)
