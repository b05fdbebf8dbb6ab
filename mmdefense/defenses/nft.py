"""NFT: fine-tuning of unit masks with MixUp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.kernels.coordinates import UnitMasks
from mmdefense.kernels.hooks import frozen_statistics
from mmdefense.kernels.loop import optimise
from mmdefense.protocol import InputAdapter, TaskAdapter, missing_members, traits
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import NotNegative, Share, Whole

__all__ = ["NFT", "mask_floors", "mixup_loss"]


@dataclass(frozen=True, kw_only=True)
class NFT(TrainingDefense):
    """Train one mask per unit on clean samples with MixUp, and fold the masks into the weights.

    Minimises ``CE(MixUp) + drift / N_c * sum |m - 1|`` over masks m that start at one; N_c is the
    number of clean samples per class. After each update the masks of the l-th layer, counted from
    1, are clamped to ``[floor exp(-decay l), 1]``, so units near the input are restricted most. A
    mask multiplies the weight of a filter's BatchNorm, or of the layer itself if there is none, but
    no bias; units of the classifier have no mask.

    Inputs that cannot be mixed (text, point clouds, images with boxes) are used unmixed.

    Ours: the rate decays to zero over 150 updates of 64 (the released code: from 0.05 to 0.02, over
    1,000 updates of 128). On this project's digits it removes nothing with either budget
    (docs/papers.md).

    Attributes:
        mixup: Both parameters of the Beta distribution that the mixing weights are drawn from; 0
            disables MixUp.
        drift: Weight of the penalty on the masks' distance from one.
        floor: The paper's alpha.
        decay: The paper's beta.

    References:
        Karim, Al Arafat, Khalid, Guo, Rahnavard. *Augmented Neural Fine-Tuning for Efficient
        Backdoor Purification*. ECCV 2024. arXiv:2407.10052
    """

    mixup: NotNegative = 1.0
    drift: NotNegative = 1e-3
    floor: Share = 0.8
    decay: NotNegative = 0.5
    lr: NotNegative = 0.05
    momentum: Share = 0.95
    steps: Whole = 150

    def _run(self, work: Purifying[Any]) -> None:
        adapter = work.adapter
        groups = adapter.unit_groups()
        space = UnitMasks(adapter.model, groups, biases="none", bounds=None)
        floors = mask_floors(len(groups), self.floor, self.decay)
        weight = self.drift / max(1.0, len(work.fit) * adapter.chance)

        def gradients(batch: Any, step: int) -> Tensor:
            loss, found = gradient_in_parts(
                self._loss(work, batch, step), len(batch), space.weights, "mixing", adapter.model
            )
            space.assign(space.pull_back(found))
            for mask in space.masks:
                assert mask.grad is not None
                mask.grad.add_((mask.detach() - 1).sign(), alpha=weight)
            return loss

        @torch.no_grad()
        def clamp(_: int) -> None:
            for mask, smallest in zip(space.masks, floors, strict=True):
                mask.clamp_(smallest, 1.0)
            space.write()

        optimise(
            adapter.model,
            work.fit,
            self.training(adapter),
            work.run,
            gradients=gradients,
            stage="mask",
            parameters=space.parameters,
            after_step=clamp,
        )

    def _loss(
        self, work: Purifying[Any], batch: Any, step: int
    ) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """Return a function that maps rows of a batch to their loss, as both loss and objective."""
        adapter = work.adapter
        mixes = traits(adapter).mixable and not missing_members(adapter, InputAdapter)
        if not (mixes and self.mixup):

            def plain(rows: slice) -> tuple[Tensor, Tensor]:
                loss = adapter.per_sample_loss(batch.rows(rows)).mean()
                return loss, loss

            return plain
        share = np.random.default_rng(work.run.seed_for(f"share {step}")).beta(*(self.mixup,) * 2)
        order = torch.randperm(len(batch), generator=work.run.generator(f"partners {step}"))
        return mixup_loss(cast("InputAdapter[Any]", adapter), batch, float(share), order)

    def trains(self, adapter: TaskAdapter[Any]) -> str:
        """Return the number of unit masks."""
        return f"{self.trained(adapter):,} unit masks"

    def trained(self, adapter: TaskAdapter[Any]) -> int:
        """Return the number of unit masks."""
        return sum(group.size for group in adapter.unit_groups())


def mask_floors(layers: int, floor: float, decay: float) -> list[float]:
    """Return the smallest allowed mask of each layer, ``floor exp(-decay l)``, l from 1."""
    return [floor * math.exp(-decay * layer) for layer in range(1, layers + 1)]


def mixup_loss(
    adapter: InputAdapter[Any], batch: Any, share: float, partners: Tensor
) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """Return a function that computes the loss of mixed samples for some rows of a batch.

    Sample n becomes ``share x_n + (1 - share) x_p(n)``; its loss weights both labels in the same
    way. To leave labels in place, the term for the partner's label is computed in the partner's
    row, as the loss of sample p(n) on the mixed input n.

    Args:
        adapter: The model.
        batch: N samples.
        share: Weight of a sample's own input.
        partners: A permutation p, shape ``(N,)``.
    """
    inputs = adapter.inputs(batch)
    partners = partners.to(inputs.device)
    mixed = share * inputs + (1 - share) * inputs[partners]
    returned = mixed[partners.argsort()]

    def loss(rows: slice) -> tuple[Tensor, Tensor]:
        part = batch.rows(rows)
        own = adapter.per_sample_loss(adapter.with_inputs(part, mixed[rows])).mean()
        with frozen_statistics(adapter.model):
            other = adapter.per_sample_loss(adapter.with_inputs(part, returned[rows])).mean()
        total = share * own + (1 - share) * other
        return total, total

    return loss
