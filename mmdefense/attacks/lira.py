"""LIRA: a bounded trigger network that is trained jointly with the classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Interval
from torch import Tensor, nn

from mmdefense.attacks.label_attack import LabelAttack, class_count
from mmdefense.attacks.painter import Painter, from_seed
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.kernels.hooks import frozen
from mmdefense.kernels.loop import Gradients, autocast, optimise
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run, copy_state
from mmdefense.settings import Count, Share
from mmdefense.training import Training

__all__ = ["LIRA"]


@dataclass(frozen=True, kw_only=True)
class LIRA(LabelAttack):
    """Applies ``T(x) = x + epsilon g(x)``, with a network g in ``[-1, 1]``.

    In the first stage g and the classifier f are trained jointly, with ``joint_epsilon``; in the
    second stage only f is trained, with g fixed and ``epsilon``. The loss in both is
    ``(1 - ratio) CE(f(x), y) + ratio CE(f(T(x)), target)`` over all samples of a batch.

    Deviations: the paper alternates between f and g, with separate learning rates, and trains f
    against the g of the previous epoch; here AdamW updates both at once. g is a small network with
    GroupNorm, so that a trigger does not depend on its batch. With a small network and short
    training it costs much clean accuracy (docs/results.md).

    Attributes:
        ratio: Weight of the poisoned loss, the paper's ``1 - alpha``, in ``[0, 1]``.
        epsilon: Largest change of a pixel, relative to full brightness; in ``(0, 1]``.
        joint_epsilon: The same in the first stage.
        joint_steps: Updates of the first stage; BackdoorBench takes 50 epochs.

    References:
        Doan, Lao, Zhao, Li. *LIRA: Learnable, Imperceptible and Robust Backdoor Attacks*. ICCV
        2021.
    """

    own_loss: ClassVar[bool] = True

    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    ratio: Share = 0.5
    epsilon: Annotated[float, Interval(gt=0, le=1)] = 0.01
    joint_epsilon: Annotated[float, Interval(gt=0, le=1)] = 0.1
    joint_steps: Count = 300

    def _train(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> Self:
        """Train trigger and classifier jointly, then only the classifier."""
        painter = self._painter(samples.inputs.shape[1]).to(samples.labels.device)
        nets = nn.ModuleDict({"victim": adapter.model, "trigger": painter})
        first = self._gradients(adapter, painter, self.joint_epsilon)
        second = self._gradients(adapter, painter, self.epsilon)
        joint = Training(
            steps=self.joint_steps,
            batch_size=training.batch_size,
            lr=2e-3,
            optimizer="adamw",
            augment=training.augment,
        )
        clean = adapter.samples(samples)
        optimise(nets, clean, joint, run, stage="trigger", gradients=first)
        with frozen(painter):
            optimise(nets, clean, training, run, stage="victim", gradients=second)
        return replace(self, fitted=copy_state(painter))

    def _gradients(
        self, adapter: TaskAdapter[LabelledBatch], painter: Painter, epsilon: float
    ) -> Gradients:
        classes = class_count(adapter)

        def compute(batch: LabelledBatch, _: int) -> Tensor:
            stamped = _painted(batch.inputs, painter, epsilon).clamp(0, 1)
            wanted = self.targets(batch.labels, classes)
            both = LabelledBatch(
                torch.cat([batch.inputs, stamped]), torch.cat([batch.labels, wanted])
            )
            with autocast(stamped.device):
                clean, poisoned = adapter.per_sample_loss(both).chunk(2)
            loss = (1 - self.ratio) * clean.mean() + self.ratio * poisoned.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return compute

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        painter = self._painter(images.shape[1])
        painter.load_state_dict({name: self._learnt(name) for name in painter.state_dict()})
        return _painted(images, painter.to(images), self.epsilon)

    def _painter(self, channels: int) -> Painter:
        return from_seed(self.seed, lambda: Painter(channels, channels))


def _painted(images: Tensor, painter: Painter, epsilon: float) -> Tensor:
    painted: Tensor = painter(images)
    return images + epsilon * (2 * painted - 1)
