"""FST: feature shift tuning from a reinitialised classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mmdefense.defenses.base import Purifying
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.loop import mean_loss_gradient, optimise
from mmdefense.protocol import OutputAdapter
from mmdefense.settings import NotNegative

__all__ = ["FST", "classifier_weights"]


@dataclass(frozen=True, kw_only=True)
class FST(RateFindingDefense):
    """Reinitialise the classifier, and fine-tune all layers while penalising its return.

    Minimises ``CE + alpha <w, w_0>`` over all weights; w is the classifier's weight matrix and w_0
    the given one. w starts from U(-1/sqrt(d), 1/sqrt(d)), where d is the number of inputs, and is
    rescaled to the Frobenius norm of w_0 after each update, so that the penalty cannot be lowered
    by growing. A classifier with other directions makes the features shift, and the clean loss does
    not hold the backdoor's features in place.

    Ours: biases are not reinitialised, since a detector's encode how rare objects are; in a
    detector all layers that score classes are reinitialised, each with its own norm. A language
    model whose output layer is tied to its token embedding is rejected. Steps and batch size are
    those of plain fine-tuning here (the released code: 10 epochs of 128 at 0.01); the rate is found
    by a range test.

    Attributes:
        alpha: Weight of the inner product; 0.2 is the released code's default, its example has 0.1.
        redraw: Whether the classifier is reinitialised; without it, and with ``alpha=0``, this is
            plain fine-tuning with the classifier's norm held constant.

    References:
        Min, Qin, Shen, Cheng. *Towards Stable Backdoor Purification through Feature Shift Tuning*.
        NeurIPS 2023. arXiv:2310.01875
    """

    requires: ClassVar[type] = OutputAdapter

    alpha: NotNegative = 0.2
    redraw: bool = True

    def _run(self, work: Purifying[Any]) -> None:
        adapter = cast("OutputAdapter[Any]", work.adapter)
        weights = classifier_weights(adapter)
        if not self.steps:
            return
        student = self.student(adapter)
        given = [weight.detach().clone() for weight in weights]
        if self.redraw:
            generator = work.run.generator("classifier")
            for weight in weights:
                drawn = 2 * torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 1
                weight.data.copy_(drawn / math.sqrt(weight[0].numel()))
        trained = [p for p in adapter.model.parameters() if p.requires_grad]

        def gradients(batch: Any, _: int) -> Tensor:
            loss, found = mean_loss_gradient(student, batch, trained)
            for parameter, gradient in zip(trained, found, strict=True):
                parameter.grad = gradient
            for weight, start in zip(weights, given, strict=True):
                assert weight.grad is not None
                weight.grad = weight.grad + self.alpha * start
            return loss

        @torch.no_grad()
        def keep_norms(_: int) -> None:
            for weight, start in zip(weights, given, strict=True):
                weight.mul_(start.norm() / weight.norm().clamp(min=1e-12))

        optimise(
            adapter.model,
            work.fit,
            self.training(adapter),
            work.run,
            gradients=gradients,
            stage="shift",
            after_step=keep_norms,
        )


def classifier_weights(adapter: OutputAdapter[Any]) -> list[Tensor]:
    """Return the weights of the classifier, which must not be shared with another layer.

    Raises:
        UnsupportedError: If they do not require grad, or another layer shares them.
    """
    layers = set(adapter.class_layers())
    named = list(adapter.model.named_parameters(remove_duplicate=False))
    chosen = dict.fromkeys(p for name, p in named if name in {f"{n}.weight" for n in layers})
    for weight in chosen:
        names = [name for name, parameter in named if parameter is weight]
        shared = [name for name in names if name.rpartition(".")[0] not in layers]
        if shared or not weight.requires_grad:
            why = f"is shared with {shared[0]}" if shared else "is frozen"
            raise UnsupportedError(
                f"fst reinitialises the classifier, but its weight {names[-1]} {why}; use a "
                "defense that keeps the classifier, such as ft-sam"
            )
    return list(chosen)
