"""FIP: Fisher Information guided Purification, and Fast FIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmdefense.defenses.base import Defense, Purifying
from mmdefense.errors import BadInputError
from mmdefense.kernels.fisher import (
    check_second_derivative,
    fisher_diagonal,
    loss_and_trace,
    squared_norm,
)
from mmdefense.kernels.hooks import second_derivatives
from mmdefense.kernels.loop import Gradients, Training, train
from mmdefense.kernels.spectral import Spectrum, spectral_weights

__all__ = ["FIP", "FastFIP"]


@dataclass(frozen=True, kw_only=True)
class FIP(Defense):
    """proto."""

    eta_f: float = 0.01
    eta_r: float = 5.0
    trace_every: int = 1
    fisher: Literal["true", "empirical"] = "true"
    lr: float = 0.05
    steps: int = 300
    batch_size: int = 128
    max_norm: float | None = 5.0
    relative: bool = False
    anneal: str = 'no'
    trainable = staticmethod(lambda model: list(model.parameters()))

    def _run(self, work: Purifying[Any]) -> None:
        ad = work.adapter
        params = [p for p in ad.model.parameters() if p.requires_grad]
        check_second_derivative(ad, work.fit, params)
        dev = params[0].device
        gen = work.run.generator("fisher", dev)
        anchor = [p.detach().clone() for p in params]
        weights = fisher_diagonal(ad, work.fit, params, gen)
        tr0 = float(sum(w.sum() for w in weights))
        eta = self.eta_f / tr0 if self.relative else self.eta_f
        noise = torch.Generator(dev)
        self_log = []

        def compute(batch, step):
            noise.manual_seed(work.run.seed_for(f"noise{step}"))
            with second_derivatives():
                if step % self.trace_every == 0 and eta:
                    loss, _, trace = loss_and_trace(ad, batch, params, noise, self.fisher)
                    f = step/self.steps; a = {'no':1,'lin':max(0,1-f),'half':max(0,1-2*f),'cos':(1+__import__('math').cos(3.14159*f))/2,'two3':max(0,1-1.5*f)}[self.anneal]; (loss + eta * a * trace).backward()
                    self_log.append(trace.detach())
                else:
                    loss = ad.per_sample_loss(batch).mean()
                    loss.backward()
            drift = torch._foreach_sub([p.detach() for p in params], anchor)
            torch._foreach_mul_(drift, weights)
            torch._foreach_add_([p.grad for p in params], drift, alpha=self.eta_r)
            return loss

        train(ad, work.fit, Training(steps=self.steps, lr=self.lr, batch_size=self.batch_size, max_norm=self.max_norm), work.run, gradients=compute, stage="fip")
        work.figures["trace"] = self_log
        work.figures["trace0"] = tr0
