"""How a model is trained: a victim by an attacker, or a copy of it by a defense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmdefense.settings import (
    BatchSize,
    Count,
    NotNegative,
    Positive,
    Share,
    Whole,
    check_settings,
)

__all__ = ["Training"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Attributes:
        steps: Number of updates.
        batch_size: Samples per update; drawn from successive permutations of all samples.
        lr: Peak learning rate.
        momentum: Of SGD.
        weight_decay: L2 penalty of SGD.
        schedule: ``"cosine"`` to zero, ``"constant"``, or ``"one-cycle"`` (linear rise over the
            first fifth, then cosine).
        max_norm: Largest gradient norm; none does not clip.
        batch_norm: ``"train"`` normalises by batch, ``"eval"`` by the running statistics.
        augment: Whether the samples are augmented.
        optimizer: ``"sgd"``, or ``"adamw"`` for nets that SGD trains slowly.
        check_every: Steps between two looks at the loss (one host synchronisation each).
        resume_every: Steps between two states that a run can go on from; more than 1 where the
            gradients depend on what was measured some steps before.
    """

    steps: Whole
    batch_size: BatchSize = 128
    lr: NotNegative = 0.01
    momentum: Share = 0.9
    weight_decay: NotNegative = 0.0
    schedule: Literal["cosine", "constant", "one-cycle"] = "cosine"
    max_norm: Positive | None = None
    batch_norm: Literal["train", "eval"] = "train"
    augment: bool = True
    optimizer: Literal["sgd", "adamw"] = "sgd"
    check_every: Count = 20
    resume_every: Count = 1

    def __post_init__(self) -> None:
        check_settings(self)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.schedule == "constant":
            return self.lr
        rise = self.steps // 5 if self.schedule == "one-cycle" else 0
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise))) / 2
