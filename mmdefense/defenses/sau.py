"""SAU: unlearning of adversarial examples that the given and the purified model share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.kernels.coordinates import Weights, trainable
from mmdefense.kernels.hooks import frozen, mode
from mmdefense.kernels.loop import optimise
from mmdefense.kernels.perturbations import perturbed, worst_change
from mmdefense.protocol import LogitsAdapter
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import Count, NotNegative, Positive, Whole

__all__ = ["SAU", "divergence", "unshared_loss"]


@dataclass(frozen=True, kw_only=True)
class SAU(TrainingDefense):
    """Find inputs that mislead both the given model and the purified one, and unlearn them.

    For each sample of a batch, gradient ascent searches for a perturbation within ``radius`` that
    maximises ``adversarial * (CE(g) + CE(f)) / 2 - agreement * JS(g, f)``, where g is the given
    model and f the one being trained. Then f minimises ``CE(x) + sharing * L``: L is ``-log(1 -
    p_f(c))`` for the class c that g predicts for the perturbed input, and zero if c is correct.
    Both models are in eval mode, with their running statistics.

    Ours: every sample keeps all terms of the ascent (the released code drops terms that have
    reached their goal); L is averaged over the batch, correct predictions included; the optimizer
    is SGD, as everywhere here, not Adam at 1e-4. The code's weights of clean, adversarial and
    shared loss are 1, 0 and 1.

    Attributes:
        radius: Largest absolute perturbation of an input value.
        ascents: Number of ascent steps.
        step_size: Size of an ascent step.
        adversarial: Weight of the two losses in the ascent objective.
        agreement: Weight of the Jensen-Shannon divergence in the ascent objective.
        sharing: Weight of L in the training loss; 0 is plain fine-tuning in eval mode.

    References:
        Wei, Zhang, Zha, Wu. *Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning
        Shared Adversarial Examples*. NeurIPS 2023. arXiv:2307.10562
    """

    requires: ClassVar[type] = LogitsAdapter

    radius: Positive = 0.2
    ascents: Count = 5
    step_size: Positive = 0.2
    adversarial: NotNegative = 0.01
    agreement: NotNegative = 1.0
    sharing: NotNegative = 1.0
    lr: NotNegative = 0.01
    steps: Whole = 100

    def _run(self, work: Purifying[Any]) -> None:
        adapter = cast("LogitsAdapter[Any]", work.adapter)
        given = adapter.fork()
        given.model.eval()
        space = Weights(trainable(adapter.model))

        def gradients(batch: Any, step: int) -> Tensor:
            noise = work.run.generator(f"start {step}", space.weights[0].device)
            with mode(adapter.model, train=False), frozen(given.model):
                change = worst_change(
                    adapter,
                    batch,
                    radius=self.radius,
                    steps=self.ascents,
                    step_size=self.step_size,
                    loss=self._shared_risk(adapter, given),
                    generator=noise,
                )

                def value(rows: slice) -> tuple[Tensor, Tensor]:
                    part = batch.rows(rows)
                    loss = adapter.per_sample_loss(part).mean()
                    changed = perturbed(adapter, part, change[rows])
                    with torch.no_grad():
                        predicted = given.class_logits(changed).argmax(1)
                        misled = given.score(changed) < 1
                    shared = unshared_loss(adapter.class_logits(changed), predicted)
                    return loss, loss + self.sharing * (shared * misled).mean()

                loss, found = gradient_in_parts(
                    value, len(batch), space.weights, "unlearning", adapter.model
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

    def _shared_risk(
        self, adapter: LogitsAdapter[Any], given: LogitsAdapter[Any]
    ) -> Callable[[Any], Tensor]:
        """Return the objective of the ascent, one value per sample."""

        def risk(batch: Any) -> Tensor:
            losses = (adapter.per_sample_loss(batch) + given.per_sample_loss(batch)) / 2
            distance = divergence(adapter.class_logits(batch), given.class_logits(batch))
            return self.adversarial * losses - self.agreement * distance

        return risk


def unshared_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return ``-log(1 - p(c))`` for each row of logits ``(N, K)`` and its class c, ``(N,)``."""
    log_p = logits.log_softmax(1)
    return -log_p.scatter(1, classes[:, None], -math.inf).logsumexp(1)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two softmax outputs, given the logits, ``(N,)``."""
    logs = [first.log_softmax(1), second.log_softmax(1)]
    mean = torch.logaddexp(*logs) - math.log(2)
    return torch.stack([(log.exp() * (log - mean)).sum(1) for log in logs]).mean(0)
