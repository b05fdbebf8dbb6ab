"""Plain fine-tuning: the baseline for every other defense."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.loop import train
from mmdefense.kernels.sharding import train_split
from mmdefense.protocol import DistillingAdapter
from mmdefense.runtime.processes import present
from mmdefense.settings import Share

__all__ = ["Distillation", "FineTuning", "RandomInsertion"]


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
        training, splits = self.training(work.adapter), present().splits
        if splits and self.distillation:
            raise UnsupportedError(
                "distillation needs a whole copy of the model, which --shard splits; leave out "
                "--shard, or set distillation=0"
            )
        fit = train_split if splits else train
        fit(self.student(work.adapter), work.fit, training, work.run, stage="fine-tune")


@dataclass(frozen=True, kw_only=True)
class RandomInsertion(FineTuning):
    """Fine-tune on clean data with random insertions and true labels.

    The model learns to ignore whatever overwrites a part of its input. Ours, after random erasing
    (Zhong et al. 2020, arXiv:1708.04896): rectangles of noise in images and clips, noise on
    objects, clusters of points in clouds, random words in text. It works against local triggers
    such as patches, but not against warps or patterns over the whole input (docs/results.md).
    """

    views: Literal["insertions"] = "insertions"


@dataclass(frozen=True, kw_only=True)
class Distillation(FineTuning):
    """Fine-tune on clean data, and keep what the given model predicts for it.

    Half of the loss is the distance to the given model's predictions, see
    :class:`~mmdefense.defenses.rate_finding.RateFindingDefense`. They tell more of what it has
    learnt than a few labels do. Accuracy then survives a higher learning rate than in plain
    fine-tuning, and a higher rate removes more. Where a high rate costs nothing anyway, they hold
    the backdoor (docs/appendix.md).

    Ours, after Yoshida and Fujino, who distil a backdoored model into a fresh one by clean data
    alone; here the given weights are the start, and labels count as well.

    References:
        Yoshida, Fujino. *Disabling Backdoor and Identifying Poison Data by using Knowledge
        Distillation in Backdoor Attacks on Deep Neural Networks*. AISec 2020
    """

    requires: ClassVar[type] = DistillingAdapter
    can_split: ClassVar[bool] = False

    distillation: Share = 0.5
