"""FIP: Fisher Information guided Purification, and Fast FIP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdefense.defenses.base import Defense, Purifying
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.errors import BadInputError
from mmdefense.kernels.coordinates import Coordinates, SingularValues, Weights, trainable
from mmdefense.kernels.fisher import (
    Form,
    check_second_derivative,
    fisher_diagonal,
    penalised_gradient,
)
from mmdefense.kernels.hooks import second_derivatives
from mmdefense.kernels.loop import Gradients, mean_loss_gradient, optimise
from mmdefense.kernels.perturbations import ASAM_ETA, sharpness_aware_gradient
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import BatchSize, Count, NotNegative, Positive, Share, Whole
from mmdefense.training import Training

__all__ = ["FIP", "FastFIP"]

_PAPER_ETA_F = 0.5
_PAPER: dict[str, Any] = {
    "trace": "true",
    "eta_f": _PAPER_ETA_F,
    "eta_r": 5.0,
    "fade": 0.0,
    "trace_every": 5,
    "steps": 2000,
    "batch_size": 128,
    "lr": 0.005,
}

Trace = Literal["perturbation", "true", "empirical", "released", "none"]


@dataclass(frozen=True, kw_only=True)
class _FisherPurification(RateFindingDefense):
    """The objective shared by FIP and Fast FIP, which differ in the coordinates they train.

    Attributes:
        strength: Target value of the penalty ``eta_F Tr(F)`` at the given model, in nats; it
            determines ``eta_F`` if that is not set. Ours: Tr(F) differs by orders of magnitude
            between networks, so a fixed ``eta_F`` would mean very different defenses. If the rate
            is scaled up by ``layer_norm_factor``, ``eta_F`` is scaled down by the same factor, so
            that steps along the penalty keep their length. Never above the code's 0.5.
        eta_f: The paper's weight of Tr(F); overrides ``strength``.
        anchor: ``eta_r Tr(Fbar)``, which determines ``eta_r`` if that is not set. It ramps up
            linearly from zero, so that the model is free to move early in training. Ours, for the
            same reason as ``strength``.
        eta_r: The paper's weight of the anchor, constant; overrides ``anchor``.
        trace: ``"perturbation"`` descends the loss at the worst weights within ``radius``, as SAM
            does; ``"true"`` is Tr(F) with labels sampled from the model, ``"empirical"`` with the
            given labels, ``"released"`` the released code's term (see :meth:`_released`),
            ``"none"`` no penalty.
        radius: Radius of that perturbation, relative to the weights (ASAM). With a larger radius
            the model tolerates only a smaller learning rate.
        fade: Fraction of the steps over which ``eta_F`` decays linearly to zero, so that the
            remaining steps recover accuracy; 0 keeps it constant, as the paper does (ours).
        trace_every: Compute Tr(F) only in every n-th step, with n times its weight.
        batch_norm: ``"train"`` normalises with batch statistics, as the released code does.
        importance_batch: Samples that share one random draw for the anchor's diagonal F; 1 draws
            for each sample, which is less noisy but slower (ours).
    """

    strength: NotNegative = 0.05
    eta_f: NotNegative | None = None
    anchor: NotNegative = 1.0
    eta_r: NotNegative | None = None
    trace: Trace = "perturbation"
    radius: NotNegative = 0.5
    fade: Share = 0.5
    trace_every: Count = 1
    batch_norm: Literal["train", "eval"] = "train"
    importance_batch: BatchSize = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trace == "perturbation":
            for name in ("strength", "eta_f", "fade", "trace_every"):
                if getattr(self, name) != _default(self, name):
                    raise BadInputError(
                        f"{name}={getattr(self, name)} of {type(self).__name__} has no effect with "
                        "trace='perturbation'; set trace='true', or radius in its place"
                    )
        elif self.distillation and self.trace != "none":
            raise BadInputError(
                f"distillation={self.distillation:g} of {type(self).__name__} has no effect with "
                f"trace={self.trace!r}; set trace='perturbation', or distillation=0"
            )

    def training(self, adapter: TaskAdapter[Any]) -> Training:
        """Return the settings of the training loop for the adapter's model."""
        training = super().training(adapter)
        return replace(training, batch_norm=self.batch_norm)

    def trained(self, adapter: TaskAdapter[Any]) -> int:
        """Return how many values are trained."""
        return sum(tensor.numel() for tensor in self._coordinates(adapter.model).parameters)

    @abstractmethod
    def _coordinates(self, model: nn.Module) -> Coordinates:
        """Return what is trained."""

    def _run(self, work: Purifying[Any]) -> None:
        adapter, run = work.adapter, work.run
        space = self._coordinates(adapter.model)
        if self.trace in ("true", "empirical"):
            check_second_derivative(adapter, work.fit, space.weights)
        start = [tensor.detach().clone() for tensor in space.parameters]
        importance = run.once("fisher", lambda: self._importance(work, space), at_any_rate=True)[
            "diagonal"
        ]
        importance = [
            value.to(tensor.device) for value, tensor in zip(importance, start, strict=True)
        ]
        trace = float(torch.stack([value.sum() for value in importance]).sum())
        eta = self._eta(trace, self.factor(adapter))
        eta_r = self.eta_r
        if eta_r is None:
            eta_r = self.anchor / trace if trace > 0 else 0.0
        training = self.training(adapter)
        run.report("fisher", 1, 1, fisher_trace=trace, eta_f=eta, eta_r=eta_r, lr=training.lr)

        def after_step(step: int) -> None:
            space.write()
            if step % max(1, self.steps // 4) == 0 and step < self.steps:
                run.snapshot(f"step {step}", adapter.model)

        optimise(
            adapter.model,
            work.fit,
            training,
            run,
            stage="purify",
            gradients=self._gradients(work, space, start, importance, eta, eta_r),
            parameters=space.parameters,
            after_step=after_step,
        )

    def _importance(self, work: Purifying[Any], space: Coordinates) -> dict[str, Any]:
        generator = work.run.generator("fisher", space.weights[0].device)
        diagonal = fisher_diagonal(
            work.adapter,
            work.fit,
            space.weights,
            generator,
            batch_size=self.importance_batch,
            pull_back=space.pull_back,
            each=partial(work.run.report, "fisher pass"),
        )
        return {"diagonal": diagonal}

    def _eta(self, trace: float, factor: float) -> float:
        if self.trace in ("none", "perturbation"):
            return 0.0
        if self.eta_f is not None:
            return self.eta_f
        return min(_PAPER_ETA_F, self.strength / factor / trace) if trace > 0 else _PAPER_ETA_F

    def _gradients(
        self,
        work: Purifying[Any],
        space: Coordinates,
        start: Sequence[Tensor],
        importance: Sequence[Tensor],
        eta: float,
        eta_r: float,
    ) -> Gradients:
        adapter, run = self.student(work.adapter), work.run
        generator = torch.Generator(space.weights[0].device)

        def compute(batch: Any, step: int) -> Tensor:
            generator.manual_seed(run.seed_for(f"purify/labels{step}"))
            now = eta * self.trace_every * self._share(step)
            weights = space.weights
            held = eta_r if self.eta_r is not None else eta_r * step / self.steps
            if self.trace == "perturbation":
                loss, pulled = sharpness_aware_gradient(
                    adapter, batch, space, radius=self.radius, eta=ASAM_ETA
                )
                self._assign(space, pulled, start, importance, held)
                return loss
            if not now or step % self.trace_every:
                loss, gradients = mean_loss_gradient(adapter, batch, weights)
            elif self.trace == "released":
                loss, gradients = self._released_gradient(adapter, batch, space, generator, now)
            else:
                form: Form = "empirical" if self.trace == "empirical" else "true"
                with second_derivatives():
                    loss, gradients = penalised_gradient(
                        adapter, batch, weights, generator, now, form, space.pull_back
                    )
            self._assign(space, space.pull_back(gradients), start, importance, held)
            return loss

        return compute

    def _share(self, step: int) -> float:
        """Return the fraction of ``eta_F`` that applies at a step."""
        return max(0.0, 1 - step / (self.fade * self.steps)) if self.fade else 1.0

    def _released_gradient(
        self, adapter: Any, batch: Any, space: Coordinates, generator: torch.Generator, now: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, and the gradient of loss plus ``now`` times the released penalty."""
        start = generator.get_state()

        def value(rows: slice) -> tuple[Tensor, Tensor]:
            generator.set_state(start)  # every micro-batch uses the same directions
            loss, penalty = self._released(adapter, batch.rows(rows), space, generator)
            return loss, loss + now * penalty

        work = "training with Tr(F)"
        with second_derivatives():
            return gradient_in_parts(
                value, len(batch), space.weights, work, adapter.model, generator
            )

    def _assign(
        self,
        space: Coordinates,
        gradients: Sequence[Tensor],
        start: Sequence[Tensor],
        importance: Sequence[Tensor],
        eta_r: float,
    ) -> None:
        """Set ``.grad``, with the anchor's ``eta_r Fbar (theta - thetabar)`` added directly."""
        with torch.no_grad():
            total = [g.clone() for g in gradients]
            if eta_r:
                drift = torch._foreach_sub(space.parameters, list(start))
                torch._foreach_mul_(drift, list(importance))
                torch._foreach_add_(total, drift, alpha=eta_r)
            for tensor, gradient in zip(space.parameters, total, strict=True):
                tensor.grad = gradient

    @staticmethod
    def _released(
        adapter: Any, batch: Any, space: Coordinates, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the term that the released code calls the trace.

        That is the mean of <v, grad> over 20 Gaussian vectors v. It also includes the partial sums
        over layers, so early layers count repeatedly. It is random with mean zero: its gradient is
        noise shaped by the Hessian, not a step to a flatter minimum. (The code also mixes labels
        within the batch; that is left out.)
        """
        loss = adapter.per_sample_loss(batch).mean()
        gradient = torch.autograd.grad(
            -loss, space.weights, create_graph=True, materialize_grads=True
        )
        sums = []
        for _ in range(20):
            products = [
                (g * torch.randn(g.shape, generator=generator, device=g.device)).sum()
                for g in space.pull_back(gradient)
            ]
            sums.append(torch.stack(products).cumsum(0))
        return loss, torch.stack(sums).mean()


def _default(defense: Defense, name: str) -> Any:
    return next(field.default for field in fields(defense) if field.name == name)


@dataclass(frozen=True, kw_only=True)
class FIP(_FisherPurification):
    """Move to a flatter minimum of the clean loss, close to the given model where it matters.

    Minimises ``CE + eta_F Tr(F) + (eta_r / 2) sum_i Fbar_i (theta_i - thetabar_i)^2`` over all
    weights, F the Fisher information of the moving model on clean data, Fbar the diagonal of that
    of the given model thetabar.

    By default Tr(F) is reduced by perturbing the weights, as in SAM: each step follows the gradient
    at the worst weights within ``radius``. To first order that adds the norm of the batch gradient
    to the loss; Tr(F) is a mean of squared gradient norms. It takes two forward and two backward
    passes and no second derivative, so it works for every model. With ``trace="true"`` Tr(F) is the
    paper's: computed in one backward pass without per-sample gradients, and differentiated exactly
    by a second one.

    Ours (docs/papers.md): that perturbation; ``strength`` in place of a fixed ``eta_F`` (the code's
    0.5), fading over the first half; ``anchor`` in place of a fixed ``eta_r`` (the code's 5,
    commented out there); 300 steps of batch size 64 with cosine decay (the code: 2000 of 128 at
    0.005, constant); Tr(F) in every step (the code: every fifth). ``preset="paper"`` takes the
    paper's objective and the code's schedule.

    Attributes:
        preset: ``"paper"`` changes settings that were left at their defaults to the paper's exact
            Tr(F), ``eta_f`` 0.5, ``eta_r`` 5 and no fading, and to the released code's schedule:
            2000 steps of 128 at a constant 0.005, with the trace in every fifth.

    References:
        Karim, Arafat, Rakin, Guo, Rahnavard. *Fisher Information guided Purification against
        Backdoor Attacks*. CCS 2024. arXiv:2409.00863
    """

    preset: Literal["ours", "paper"] = "ours"

    def __post_init__(self) -> None:
        if self.preset == "paper":
            for name, value in _PAPER.items():
                if getattr(self, name) == _default(self, name):
                    object.__setattr__(self, name, value)
        super().__post_init__()

    def training(self, adapter: TaskAdapter[Any]) -> Training:
        """Return the settings of the training loop for the adapter's model."""
        training = super().training(adapter)
        return replace(training, schedule="constant") if self.preset == "paper" else training

    def _coordinates(self, model: nn.Module) -> Coordinates:
        return Weights(trainable(model))


@dataclass(frozen=True, kw_only=True)
class FastFIP(_FisherPurification):
    """FIP over singular values alone: ``W = U diag(relu(sigma + delta)) V^T``, delta trained.

    Covers convolution, linear and embedding layers, and fused attention projections. The model
    keeps ordinary weights throughout, so keys, shapes and dtypes of its state dict do not change.

    The perturbation applies to singular values, relative to their size. Few values are trained, at
    a rate far above FIP's, with a third of its updates. It removes less than FIP on most victims.

    Attributes:
        layer_norm_factor: 1 by default: the rate of singular values does not depend on whether the
            model uses LayerNorm.
        scale: How far a shift of one moves a singular value; the code's s, there 1. It sets the
            step size of singular values relative to norms and biases (ours).
        norms_and_biases: Whether norms and biases are trained too, as in FIP. The paper does not
            say which of them are.

    References:
        See :class:`FIP`; the paper calls this variant f-FIP.
    """

    steps: Whole = 100
    layer_norm_factor: Positive = 1.0
    norms_and_biases: bool = True
    scale: Positive = 3.0

    def _coordinates(self, model: nn.Module) -> Coordinates:
        return SingularValues(model, others=self.norms_and_biases, scale=self.scale)
