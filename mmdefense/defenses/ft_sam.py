"""FT-SAM: fine-tuning with sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmdefense.defenses.base import Purifying
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.kernels.coordinates import Weights, trainable
from mmdefense.kernels.loop import optimise
from mmdefense.kernels.perturbations import ASAM_ETA, sharpness_aware_gradient
from mmdefense.settings import NotNegative

__all__ = ["FTSAM"]


@dataclass(frozen=True, kw_only=True)
class FTSAM(RateFindingDefense):
    """Fine-tune on clean data at the worst weights within a radius that scales with each weight.

    Minimises ``max CE(theta + e)`` over ``||T^-1 e|| <= radius``, ``T = |theta| + eta``, by the
    gradient at the maximum of the linearised loss. Large weights are perturbed most, and backdoor
    units have large weights. An update takes two forward and two backward passes.

    Steps, rate and batch size are those of plain fine-tuning here (the released code: 100 epochs of
    256 at 0.01, weight decay 5e-4, label smoothing 0.1).

    Attributes:
        radius: The paper's rho, 2 on CIFAR-10 in the released code; 0 is plain fine-tuning.
        eta: Added to each absolute weight, so that small ones are perturbed too; ASAM's 0.01.

    References:
        Zhu, Wei, Shen, Fan, Wu. *Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
        Minimization*. ICCV 2023. arXiv:2304.11823
    """

    radius: NotNegative = 2.0
    eta: NotNegative = ASAM_ETA

    def _run(self, work: Purifying[Any]) -> None:
        adapter = self.student(work.adapter)
        space = Weights(trainable(adapter.model))

        def gradients(batch: Any, _: int) -> Tensor:
            loss, found = sharpness_aware_gradient(
                adapter, batch, space, radius=self.radius, eta=self.eta
            )
            space.assign(found)
            return loss

        optimise(
            adapter.model,
            work.fit,
            self.training(adapter),
            work.run,
            gradients=gradients,
            stage="fine-tune",
        )
