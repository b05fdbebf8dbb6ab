"""Plain fine-tuning: the baseline that every defense stands beside."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.kernels.loop import train
from mmdefense.kernels.sharding import train_split
from mmdefense.runtime.processes import present
from mmdefense.settings import NotNegative, Whole

__all__ = ["FineTuning"]


@dataclass(frozen=True, kw_only=True)
class FineTuning(TrainingDefense):
    """Go on training on clean data, all weights, with nothing added.

    At a high learning rate it is a strong baseline.
    """

    can_split: ClassVar[bool] = True

    lr: NotNegative = 0.02
    steps: Whole = 150

    @classmethod
    def like(cls, defense: Any) -> Self:
        """Return plain fine-tuning with the steps, rate, batch and clipping of another defense."""
        shared = {field.name for field in fields(TrainingDefense)}
        return cls(**{name: getattr(defense, name) for name in shared})

    def _run(self, work: Purifying[Any]) -> None:
        fit = train_split if present().splits else train
        fit(work.adapter, work.fit, self.training(work.adapter), work.run, stage="fine-tune")
