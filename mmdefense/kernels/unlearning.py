"""Gradient ascent on the clean loss, until the task is unlearnt."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmdefense.data.batch import Batch, Samples
from mmdefense.errors import DivergenceError
from mmdefense.kernels.loop import mean_loss_gradient, mean_score, optimise
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.training import Training

__all__ = ["chance_level", "mean_gradient", "unlearn"]

B = TypeVar("B", bound=Batch)


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

    If the loss becomes non-finite, everything has been unlearnt: the ascent ends in the last finite
    state.

    Args:
        adapter: The model.
        samples: Samples to unlearn.
        run: Seed, progress and store.
        stop: Score in ``[0, 1]`` at which the ascent ends; checked after each epoch.
        lr: Learning rate of SGD with momentum 0.9.
        batch_size: Samples per update.
        max_epochs: Largest number of epochs.
        stage: Name of the stage.

    Returns:
        The number of epochs that were run.

    Raises:
        DivergenceError: If the loss is not finite from the first epoch on.
    """
    per_epoch = max(1, -(-len(samples) // batch_size))

    trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]

    def ascend(batch: B, _: int) -> Tensor:
        loss, gradients = mean_loss_gradient(adapter, batch, trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = -gradient
        return loss

    def is_done(step: int) -> bool:
        if step % per_epoch:
            return False
        score = mean_score(adapter, samples)
        run.record(stage, step, plan.steps, score=score)  # the training loop checks the time
        return score <= stop

    plan = Training(
        steps=max_epochs * per_epoch,
        batch_size=min(batch_size, len(samples)),
        lr=lr,
        schedule="constant",
        check_every=per_epoch,
    )
    try:
        optimise(
            adapter.model,
            samples,
            plan,
            run,
            gradients=ascend,
            stage=stage,
            after_step=is_done,
        )
    except DivergenceError:
        if not any(entry["stage"] == stage and "loss" in entry for entry in run.history):
            raise
    # From the history, so that a run resumed after this stage has it as well.
    steps = [entry["step"] for entry in run.history if entry["stage"] == stage and "score" in entry]
    return steps[-1] // per_epoch if steps else 0


def chance_level(adapter: TaskAdapter[B], samples: Samples[B]) -> float:
    """Return the score of always predicting the most common label; at least ``adapter.chance``."""
    strata = samples.strata()
    most = 0 if strata is None else max(Counter(strata.tolist()).values())
    return max(adapter.chance, most / len(samples))


def mean_gradient(adapter: TaskAdapter[Any], batch: Any) -> dict[str, Tensor]:
    """Return the gradient of the mean loss by parameter name, zero for frozen parameters."""
    named = dict(adapter.model.named_parameters(remove_duplicate=False))
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    _, found = mean_loss_gradient(adapter, batch, [named[n] for n in trained])
    frozen = {n: torch.zeros_like(p) for n, p in named.items() if n not in trained}
    return dict(zip(trained, found, strict=True)) | frozen
