"""Plain fine-tuning: the baseline that every defense stands beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from mmdefense.defenses.base import Defense, Purifying
from mmdefense.kernels.loop import Training, train

__all__ = ["FineTuning"]


@dataclass(frozen=True, kw_only=True)
class FineTuning(Defense):
    """Go on training on clean data, all weights, with nothing added.

    At a high learning rate it is a strong baseline.

    Attributes:
        lr: Peak learning rate of SGD, falling to zero on a cosine.
        momentum: Of SGD.
        steps: Number of updates.
        batch_size: Samples per update.
        max_norm: Largest gradient norm; none does not clip.
    """

    lr: float = 0.02
    momentum: float = 0.9
    steps: int = 150
    batch_size: int = 64
    max_norm: float | None = 5.0

    @classmethod
    def like(cls, defense: Any) -> Self:
        """Return plain fine-tuning with the steps, rate, batch and clipping of another defense."""
        training: Training = defense.training
        return cls(
            lr=training.lr,
            momentum=training.momentum,
            steps=training.steps,
            batch_size=training.batch_size,
            max_norm=training.max_norm,
            seed=defense.seed,
            max_utility_drop=defense.max_utility_drop,
            holdout=defense.holdout,
        )

    @property
    def training(self) -> Training:
        """The updates, as the loop takes them."""
        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            max_norm=self.max_norm,
        )

    def _run(self, work: Purifying[Any]) -> None:
        train(work.adapter, work.fit, self.training, work.run, stage="fine-tune")
