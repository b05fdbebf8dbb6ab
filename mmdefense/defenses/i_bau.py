"""I-BAU: unlearning of the worst universal perturbation, by the implicit hypergradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.kernels.coordinates import Weights, trainable
from mmdefense.kernels.hooks import mode, second_derivatives
from mmdefense.kernels.loop import optimise
from mmdefense.kernels.perturbations import perturbed, worst_change
from mmdefense.protocol import InputAdapter
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import Count, NotNegative, Positive, Whole

__all__ = ["IBAU", "hypergradient"]


@dataclass(frozen=True, kw_only=True)
class IBAU(TrainingDefense):
    """Minimise the clean loss under its worst universal perturbation.

    That is ``min_theta H(delta*(theta), theta)``, where H is the mean ``CE(f(x + delta), y)`` and
    delta* maximises it within a radius. The gradient accounts for the dependence of delta* on the
    weights: see :func:`hypergradient`. The model is in eval mode, with its running statistics.

    Ours: delta is the worst perturbation of the current batch, so that texts, whose lengths differ
    between batches, are supported (the released code ascends over all clean data, five times in
    all, with the model's own predictions as labels, and adds delta to 1 % of each batch); and it is
    bounded by an L2 ball, where the code subtracts ``0.001 ||delta||^2``. The optimizer is SGD, as
    everywhere here, not Adam at 1e-4.

    Attributes:
        radius: Largest norm of delta, as a fraction of the mean norm of a sample.
        ascents: Ascent steps towards delta*.
        iterations: Terms K of the hypergradient; 0 treats delta as a constant.
        inner_rate: Step size rho of the ascent step that is differentiated.
        damping: Weight of ``||delta||^2`` in that ascent.

    References:
        Zeng, Chen, Park, Mao, Jin, Jia. *Adversarial Unlearning of Backdoors via Implicit
        Hypergradient*. ICLR 2022. arXiv:2110.03735
    """

    requires: ClassVar[type] = InputAdapter

    radius: Positive = 0.2
    ascents: Count = 5
    iterations: Whole = 5
    inner_rate: Positive = 0.1
    damping: NotNegative = 1e-3
    lr: NotNegative = 0.01
    steps: Whole = 100

    def _run(self, work: Purifying[Any]) -> None:
        adapter = cast("InputAdapter[Any]", work.adapter)
        space = Weights(trainable(adapter.model))

        def gradients(batch: Any, _: int) -> Tensor:
            norms = torch.linalg.vector_norm(adapter.inputs(batch).flatten(1), dim=1)
            radius = self.radius * float(norms.mean())
            with mode(adapter.model, train=False):
                change = worst_change(
                    adapter,
                    batch,
                    radius=radius,
                    steps=self.ascents,
                    step_size=2 * radius / self.ascents,
                    norm="l2",
                    universal=True,
                )
                loss, found = hypergradient(
                    adapter,
                    batch,
                    change,
                    space.parameters,
                    rate=self.inner_rate,
                    iterations=self.iterations,
                    damping=self.damping,
                )
            space.assign(found)
            return loss

        optimise(
            adapter.model,
            work.fit,
            replace(self.training(adapter), batch_norm="eval"),
            work.run,
            gradients=gradients,
            stage="unlearn",
        )


def hypergradient(
    adapter: InputAdapter[Any],
    batch: Any,
    change: Tensor,
    parameters: Sequence[Tensor],
    *,
    rate: float,
    iterations: int,
    damping: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss H under a change of the inputs, and its gradient through the change.

    The change is treated as a fixed point of ``Phi(d, theta) = d + rate grad_d (H - damping
    ||d||^2)``. By the implicit function theorem the gradient is ``grad_theta (H + rate <grad_d H,
    w>)`` with w constant and ``w = sum_{k < K} (dPhi/dd)^k grad_d H``: K products with the Hessian
    of H in d.

    Args:
        adapter: The model, in eval mode.
        batch: N samples.
        change: Shape ``(1, ...)``.
        parameters: The weights theta.
        rate: Step of the map.
        iterations: Terms K of the series.
        damping: Weight of the change's own norm.
    """
    moved = change.clone().requires_grad_()

    def derivative(wanted: Sequence[Tensor], vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return H, and the gradient of ``H + <grad_d H, vector>``."""

        def value(rows: slice) -> tuple[Tensor, Tensor]:
            loss = adapter.per_sample_loss(perturbed(adapter, batch.rows(rows), moved)).mean()
            (slope,) = torch.autograd.grad(loss, [moved], create_graph=True)
            return loss, loss + (slope * vector).sum()

        with second_derivatives():
            work = "the hypergradient"
            return gradient_in_parts(value, len(batch), wanted, work, adapter.model)

    vector = torch.zeros_like(change)
    for _ in range(iterations):
        _, (found,) = derivative([moved], rate * vector)
        vector = found + (1 - 2 * rate * damping) * vector
    return derivative(parameters, rate * vector)
