"""Plain fine-tuning: the baseline that every defense stands beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.kernels.loop import Training, train

__all__ = ["FineTuning"]


@dataclass(frozen=True, kw_only=True)
class FineTuning(TrainingDefense):
    """Go on training on clean data, all weights, with nothing added.

    At a high learning rate it is a strong baseline.
    """

    lr: float = 0.02
    steps: int = 150

    @classmethod
    def like(cls, defense: Any) -> Self:
        """Return plain fine-tuning with the steps, rate, batch and clipping of another defense."""
        training: Training = defense.training
        return cls(
            lr=training.lr,
            optimizer=training.optimizer,
            momentum=training.momentum,
            steps=training.steps,
            batch_size=training.batch_size,
            max_norm=training.max_norm,
            seed=defense.seed,
            max_utility_drop=defense.max_utility_drop,
            holdout=defense.holdout,
        )

    def _run(self, work: Purifying[Any]) -> None:
        train(work.adapter, work.fit, self.training, work.run, stage="fine-tune")
