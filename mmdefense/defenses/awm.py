"""AWM: adversarial weight masking."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.kernels.coordinates import WeightMasks
from mmdefense.kernels.loop import Gradients, optimise
from mmdefense.kernels.perturbations import perturbed, worst_change
from mmdefense.kernels.spectral import spectral_weights
from mmdefense.protocol import InputAdapter, TaskAdapter
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import Count, NotNegative, Whole
from mmdefense.training import Training

__all__ = ["AWM"]


@dataclass(frozen=True, kw_only=True)
class AWM(TrainingDefense):
    """Mask each weight, so that no universal trigger changes the predictions.

    Minimises ``alpha CE(x) + beta max_d CE(x + d) + gamma sum |m|`` over a mask m in ``[0, 1]`` for
    each weight; d is one perturbation for all samples, with an L1 norm of at most ``trigger_size``
    times the number of input values. BatchNorm uses its running statistics.

    Ours: d is recomputed for each batch (the released code computes it once for several passes over
    the data); it raises the loss of the given labels (there, of the model's own predictions);
    linear layers are masked as well as convolutions, so that transformers are supported; and 150
    updates with the rate decaying to zero (there, 100 epochs, with a factor of 0.9 every five). The
    optional first phase of the released code, which shrinks the weights, is left out.

    Attributes:
        alpha: Weight of the clean loss.
        beta: Weight of the perturbed loss.
        gamma: Weight of the masks' L1 norm.
        trigger_size: Largest mean perturbation of an input value, as a fraction of the inputs'
            range, or of their standard deviation if they are unbounded: the released code's L1 norm
            of 1,000 over the 3,072 values of a CIFAR-10 image.
        inner_steps: Steps of gradient ascent on the perturbation.

    References:
        Chai, Chen. *One-shot Neural Backdoor Erasing via Adversarial Weight Masking*. NeurIPS 2022.
        arXiv:2207.04497
    """

    requires: ClassVar[type] = InputAdapter

    alpha: NotNegative = 0.9
    beta: NotNegative = 0.1
    gamma: NotNegative = 1e-8
    trigger_size: NotNegative = 0.33
    inner_steps: Count = 5
    optimizer: Literal["auto", "sgd", "adamw"] = "adamw"
    adamw_lr: NotNegative = 0.01
    steps: Whole = 150

    def training(self, adapter: TaskAdapter[Any]) -> Training:
        """Return the settings of the training loop for the masks."""
        return replace(super().training(adapter), batch_norm="eval")

    def trains(self, adapter: TaskAdapter[Any]) -> str:
        """Return the number of weight masks."""
        return f"{self.trained(adapter):,} weight masks"

    def trained(self, adapter: TaskAdapter[Any]) -> int:
        """Return how many weights are masked."""
        return sum(weight.numel() for weight in spectral_weights(adapter.model).values())

    def _run(self, work: Purifying[Any]) -> None:
        model = work.adapter.model
        space = WeightMasks(list(spectral_weights(model).values()))
        optimise(
            model,
            work.fit,
            self.training(work.adapter),
            work.run,
            gradients=self._gradients(work.adapter, space),
            stage="mask",
            parameters=space.parameters,
            after_step=space.settle,
        )

    def _gradients(self, adapter: Any, space: WeightMasks) -> Gradients:
        def gradients(batch: Any, _: int) -> Tensor:
            inputs, bounds = adapter.inputs(batch), adapter.input_bounds(batch)
            scale = float(inputs.std()) if bounds is None else bounds[1] - bounds[0]
            radius = self.trigger_size * scale * inputs[0].numel()
            change = worst_change(
                adapter,
                batch,
                radius=radius,
                steps=self.inner_steps,
                step_size=2 * radius / self.inner_steps,
                norm="l1",
                universal=True,
            )

            def value(rows: slice) -> tuple[Tensor, Tensor]:
                part = batch.rows(rows)
                loss = adapter.per_sample_loss(part).mean()
                worst = adapter.per_sample_loss(perturbed(adapter, part, change)).mean()
                return loss, self.alpha * loss + self.beta * worst

            what = "masking weights"
            loss, found = gradient_in_parts(value, len(batch), space.weights, what, adapter.model)
            pairs = zip(space.pull_back(found), space.parameters, strict=True)
            space.assign([gradient + self.gamma * mask.sign() for gradient, mask in pairs])
            return loss

        return gradients
