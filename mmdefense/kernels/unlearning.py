"""Gradient ascent on the loss of clean data, stopped when nothing is left to unlearn."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from mmdefense.batches import Samples
from mmdefense.kernels.loop import Training, mean_score, train
from mmdefense.kernels.run import Run
from mmdefense.protocol import TaskAdapter

__all__ = ["unlearn"]

B = TypeVar("B")


def unlearn(
    adapter: TaskAdapter[B],
    samples: Samples[B],
    run: Run,
    *,
    stop: float,
    lr: float,
    batch_size: int,
    max_epochs: int,
    stage: str = "unlearn",
) -> int:
    """Ascend the mean loss in place, until the score on ``samples`` is at most ``stop``.

    Args:
        adapter: The model to make forget.
        samples: What it forgets.
        run: Seed, progress and store.
        stop: Score in ``[0, 1]`` at which it ends; looked at after each epoch.
        lr: Learning rate of SGD with momentum 0.9.
        batch_size: Samples per update.
        max_epochs: Where it ends in any case.
        stage: Name of the stage.

    Returns:
        The number of epochs that were run.
    """
    per_epoch = max(1, -(-len(samples) // batch_size))
    epochs = 0

    def ascend(batch: B, _: int) -> Tensor:
        loss = adapter.per_sample_loss(batch).mean()
        (-loss).backward()  # type: ignore[no-untyped-call]
        return loss

    def is_done(step: int) -> bool:
        nonlocal epochs
        if step % per_epoch:
            return False
        epochs = step // per_epoch
        score = mean_score(adapter, samples)
        run.report(stage, epochs, max_epochs, score=score)
        return score <= stop

    plan = Training(
        steps=max_epochs * per_epoch,
        batch_size=min(batch_size, len(samples)),
        lr=lr,
        schedule="constant",
        check_every=per_epoch,
    )
    train(adapter, samples, plan, run, stage=stage, gradients=ascend, after_step=is_done)
    return epochs


def mean_gradient(adapter: TaskAdapter[Any], batch: Any) -> dict[str, Tensor]:
    """Return the gradient of the mean loss by parameter name."""
    named = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    loss = adapter.per_sample_loss(batch).mean()
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))
