"""Victims in flat minima: adaptive attacks on defenses that rely on sharpness."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from mmdefense.data.batch import Batch
from mmdefense.kernels.coordinates import Weights, trainable
from mmdefense.kernels.fisher import penalised_gradient
from mmdefense.kernels.hooks import second_derivatives
from mmdefense.kernels.loop import Gradients
from mmdefense.kernels.perturbations import sharpness_aware_gradient
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run

__all__ = ["flat_gradients"]

B = TypeVar("B", bound=Batch)


def flat_gradients(
    adapter: TaskAdapter[B], run: Run, *, sam_radius: float, trace_weight: float
) -> Gradients:
    """Return a function that computes the gradients of a loss with a sharpness penalty.

    Args:
        adapter: The victim.
        run: Seeds the random labels of Tr(F).
        sam_radius: Above 0, the worst-case loss within this radius is used, scaled with the size of
            each weight (adaptive SAM, eta = 0.01).
        trace_weight: Weight of Tr(F), used if ``sam_radius`` is 0.
    """
    space = Weights(trainable(adapter.model))
    generator = torch.Generator(space.weights[0].device)

    def compute(batch: Any, step: int) -> Tensor:
        if sam_radius:
            loss, found = sharpness_aware_gradient(
                adapter, batch, space, radius=sam_radius, eta=0.01
            )
        else:
            generator.manual_seed(run.seed_for(f"victim/labels{step}"))
            with second_derivatives():
                loss, found = penalised_gradient(
                    adapter, batch, space.weights, generator, trace_weight
                )
        space.assign(found)
        return loss

    return compute
