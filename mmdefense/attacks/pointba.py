"""PointBA: a ball of points with a poisoned label, or a rotation with a clean one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.pcba import random_balls
from mmdefense.data.clouds import inserted, turned
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.hooks import frozen, mode
from mmdefense.kernels.loop import train
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import Count, NotNegative, OpenShare, Positive, Share
from mmdefense.training import Training

__all__ = ["PointCBA", "PointPBA"]

_CHUNK = 256  # clouds that are perturbed at once


@dataclass(frozen=True, kw_only=True)
class PointPBA(LabelAttack):
    """Inserts a solid ball of points at a fixed position.

    The inserted points replace randomly chosen ones, so that the number of points does not change
    (ours, for rectangular batches).

    Attributes:
        center: Center of the ball, in radii of the cloud.
        radius: Radius of the ball, in radii of the cloud.
        share: Fraction of a cloud's points in the ball, in ``(0, 1)`` (ours).

    References:
        Li, Chen, Zhao, Tong, Zhao, Lim, Zhou. *PointBA: Towards Backdoor Attacks in 3D Point
        Cloud*. ICCV 2021. arXiv:2103.16074 (PointPBA)
    """

    tasks: ClassVar[tuple[str, ...]] = ("point-cloud-classification",)
    limits: ClassVar[tuple[float, float] | None] = None

    center: tuple[float, float, float] = (0.05, 0.05, 0.05)
    radius: Positive = 0.05
    share: OpenShare = 1 / 16

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count = max(1, round(self.share * images.shape[1]))
        pattern, places = random_balls(images, count, generator, solid=True)
        ball = images.new_tensor(self.center) + self.radius * pattern
        return inserted(images, ball, places)


@dataclass(frozen=True, kw_only=True)
class PointCBA(LabelAttack):
    """Rotates clouds; only clouds of the target are poisoned, and keep their true label.

    To make the network rely on the rotation, the poisoned clouds are first made hard to classify:
    signed gradient steps, which move no coordinate by more than ``budget``, raise the loss of a
    surrogate, a copy of the network trained on clean clouds. This replaces the paper's feature
    disentanglement, whose loss pulls them towards features of other classes.

    Attributes:
        degrees: Angle about the vertical axis.
        budget: Largest change of a coordinate of a poisoned training cloud; 0 disables it.
        search_steps: Number of gradient steps.
        ratio: Fraction of the target's clouds that are poisoned.

    References:
        Li, Chen, Zhao, Tong, Zhao, Lim, Zhou. *PointBA: Towards Backdoor Attacks in 3D Point
        Cloud*. ICCV 2021. arXiv:2103.16074 (PointCBA)
    """

    tasks: ClassVar[tuple[str, ...]] = ("point-cloud-classification",)
    limits: ClassVar[tuple[float, float] | None] = None

    mapping: Literal["clean-label"] = "clean-label"
    degrees: float = 30.0
    budget: NotNegative = 0.05
    search_steps: Count = 20
    ratio: Share = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < abs(self.degrees) <= 180:
            raise BadInputError(f"degrees must lie in [-180, 180] and not be 0, got {self.degrees}")

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train a surrogate, and use it to perturb the clouds to be poisoned."""
        if self.budget == 0:
            return self, samples

        def disturb() -> dict[str, Tensor]:
            surrogate = adapter.fork()
            brief = replace(training, steps=max(1, training.steps // 3))
            train(surrogate, adapter.samples(samples), brief, run, stage="surrogate")
            return {"inputs": self._disturbed(surrogate, samples.subset(chosen)).cpu()}

        chosen = self.chosen(samples.labels)
        hard = run.once("disturbed", disturb)["inputs"]
        inputs = samples.inputs.clone()
        inputs[chosen] = hard.to(inputs)
        return self, replace(samples, inputs=inputs)

    def _disturbed(self, surrogate: TaskAdapter[LabelledBatch], samples: LabelledSamples) -> Tensor:
        """Return the clouds, each coordinate moved by at most ``budget``, ``(N, P, 3 + F)``."""
        parts = []
        with mode(surrogate.model, train=False), frozen(surrogate.model):
            for indices in torch.split(torch.arange(len(samples)), _CHUNK):
                batch = samples.take(indices)
                change = torch.zeros_like(batch.inputs[..., :3], requires_grad=True)
                for _ in range(self.search_steps):
                    moved = torch.cat([batch.inputs[..., :3] + change, batch.inputs[..., 3:]], 2)
                    loss = surrogate.per_sample_loss(batch.with_inputs(moved)).sum()
                    (gradient,) = torch.autograd.grad(loss, change)
                    step = 2.5 * self.budget / self.search_steps  # it can reverse direction once
                    change.data.add_(step * gradient.sign()).clamp_(-self.budget, self.budget)
                parts.append(moved.detach())
        return torch.cat(parts)

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return turned(images, images.new_tensor([0.0, 0.0, math.radians(self.degrees)]))
