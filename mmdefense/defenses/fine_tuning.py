"""Plain fine-tuning: the baseline for every other defense."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from mmdefense.defenses.base import Purifying, RateFindingDefense, TrainingDefense
from mmdefense.kernels.loop import train
from mmdefense.kernels.sharding import train_split
from mmdefense.runtime.processes import present

__all__ = ["FineTuning", "RandomInsertion"]


@dataclass(frozen=True, kw_only=True)
class FineTuning(RateFindingDefense):
    """Continue training all weights on clean data, with no additional loss term.

    At a high learning rate this is a strong baseline.
    """

    can_split: ClassVar[bool] = True

    @classmethod
    def like(cls, defense: Any) -> Self:
        """Return plain fine-tuning with another defense's steps, rate, batch size and clipping."""
        shared = {field.name for field in fields(TrainingDefense)}
        return cls(**{name: getattr(defense, name) for name in shared})

    def _run(self, work: Purifying[Any]) -> None:
        fit = train_split if present().splits else train
        fit(work.adapter, work.fit, self.training(work.adapter), work.run, stage="fine-tune")


@dataclass(frozen=True, kw_only=True)
class RandomInsertion(FineTuning):
    """Fine-tune on clean data with random insertions and true labels.

    The model learns to ignore whatever overwrites a part of its input. Ours, after random erasing
    (Zhong et al. 2020, arXiv:1708.04896): rectangles of noise in images and clips, noise on
    objects, clusters of points in clouds, random words in text. It works against local triggers
    such as patches, but not against warps or patterns over the whole input (docs/results.md).
    """

    views: Literal["insertions"] = "insertions"
