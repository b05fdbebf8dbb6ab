"""The training loop used for victims and by every defense.

Samples stay on the device and are drawn and augmented there in whole batches. A step never waits
for the host: losses are summed on the device and read once every ``check_every`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Batch, Samples, batches
from mmdefense.errors import BadInputError, DivergenceError, one_line
from mmdefense.kernels.hooks import channels_last, mode
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import gradient_in_parts, in_parts, shared
from mmdefense.runtime.processes import Processes, present, sharing
from mmdefense.runtime.run import Event, OutOfTime, Run, copy_state, put_state, whole
from mmdefense.training import Training

__all__ = [
    "Gradients",
    "autocast",
    "loss_gradients",
    "mean_loss_gradient",
    "mean_score",
    "optimise",
    "scores",
    "train",
]

B = TypeVar("B", bound=Batch)

Gradients = Callable[[Any, int], Tensor]
"""Sets ``.grad`` to the gradients of one batch and returns the loss; called with batch and step.

A batch that may be too large for memory is split into micro-batches, as in
:func:`mean_loss_gradient` and :func:`~mmdefense.runtime.memory.gradient_in_parts`.
"""


def autocast(device: torch.device) -> Any:
    """Return bf16 autocast on CUDA, where it is faster and safe for a loss; no change elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def train(
    adapter: TaskAdapter[B],
    samples: Samples[B],
    training: Training,
    run: Run,
    *,
    stage: str = "train",
    parameters: Sequence[Tensor] | None = None,
    after_step: Callable[[int], bool | None] | None = None,
) -> float:
    """Minimise the mean loss of an adapter, in place; see :func:`optimise` for the arguments.

    Example:
        >>> from mmdefense.runtime.run import Run
        >>> train(adapter, samples, Training(steps=20, batch_size=10), Run(seed=0)) < 0.1
        True
    """
    return optimise(
        adapter.model,
        samples,
        training,
        run,
        stage=stage,
        gradients=loss_gradients(adapter),
        parameters=parameters,
        after_step=after_step,
    )


def optimise(
    model: nn.Module,
    samples: Samples[Any],
    training: Training,
    run: Run,
    *,
    gradients: Gradients,
    stage: str = "train",
    parameters: Sequence[Tensor] | None = None,
    after_step: Callable[[int], bool | None] | None = None,
) -> float:
    """Train ``model`` in place; resume an interrupted run from ``run.store``.

    Args:
        model: The model to train.
        samples: Samples to train on.
        training: Number of steps, learning rates and modes.
        run: Seed, progress and store.
        gradients: Computes the gradients of one batch.
        stage: A name that is unique in the run; it identifies progress, random streams and
            checkpoints.
        parameters: Tensors to update; all parameters that require grad by default.
        after_step: Called after each update with the number of updates done; return True to end
            the stage.

    Returns:
        The mean loss of the last ``check_every`` steps.

    Raises:
        DivergenceError: If the loss or a weight is not finite; the last good state is restored.
        OutOfTime: If the run's deadline has passed after an update; at least one update is made.
            The model keeps its current state, and the store has what is needed to resume from it
            (or from the last multiple of ``resume_every`` at which the time was checked).

    Example:
        >>> from mmdefense.kernels.loop import mean_loss_gradient, optimise
        >>> from mmdefense.runtime.run import Run
        >>> from mmdefense.training import Training
        >>> weights = list(model.parameters())
        >>> def gradients(batch, step):
        ...     loss, found = mean_loss_gradient(adapter, batch, weights)
        ...     for weight, gradient in zip(weights, found):
        ...         weight.grad = gradient
        ...     return loss
        >>> plan = Training(steps=2, batch_size=4)
        >>> optimise(model, samples, plan, Run(), gradients=gradients) >= 0
        True
    """
    chosen = _trainable(model) if parameters is None else list(parameters)
    if not chosen:
        raise BadInputError("the model must have a parameter that requires grad, got none")
    optimizer = _optimizer(chosen, training)
    device = chosen[0].device
    noise = torch.Generator(device)
    state = _TrainingState(model, chosen, optimizer, training, run, stage)
    start = state.resume()
    run.progress(Event(stage, start, training.steps))
    with (
        mode(model, train=True, batch_norm=training.batch_norm == "train"),
        channels_last(model),
        _restored_rng(device),
        _without_gradients(optimizer),
    ):
        for step in range(start, training.steps):
            seed = run.seed_for(f"{stage}/{step}")
            _seed_dropout(device, seed + present().index)  # each process draws its own masks
            for group in optimizer.param_groups:
                group["lr"] = training.lr_at(step)
            batch = samples.take(_indices(len(samples), training.batch_size, step, run, stage))
            if training.augment:
                batch = samples.augment(batch, noise.manual_seed(seed))
            optimizer.zero_grad(set_to_none=True)
            state.add(gradients(batch, step).detach())
            if training.max_norm is not None:
                nn.utils.clip_grad_norm_(chosen, training.max_norm, foreach=True)
            optimizer.step()
            last = bool(after_step and after_step(step + 1)) or step + 1 == training.steps
            state.after(step + 1, last=last)
            if last:
                break
    return state.mean


class _TrainingState:
    """The losses of a training run, its last good state, and what is saved to resume it.

    Losses are summed on the device, and read every ``check_every`` steps.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        training: Training,
        run: Run,
        stage: str,
    ) -> None:
        self.model, self.parameters, self.optimizer = model, parameters, optimizer
        self.training, self.run, self.stage = training, run, stage
        self.total, self.seen = torch.zeros((), device=parameters[0].device), 0
        self.mean = math.nan
        self.saved, self.good = 0, (0, copy_state(model))

    def add(self, loss: Tensor) -> None:
        """Add the loss of one step."""
        self.total += loss
        self.seen += 1

    def after(self, done: int, *, last: bool) -> None:
        """Check the loss, save a checkpoint and check the time, each when due.

        Raises:
            DivergenceError: If the loss or a weight is not finite; the last good state is restored.
            OutOfTime: If time ran out before the last step.
        """
        if last or done % self.training.check_every == 0:
            self.mean = self._finite_mean()
            self.total, self.seen = torch.zeros_like(self.total), 0
            self.good = (done, copy_state(self.model))
            steps = self.training.steps
            self.run.record(self.stage, done, steps, ended=last, loss=self.mean)
            store = self.run.store
            if store and (last or done - self.saved >= store.every):
                self._save(steps if last else done)
        if not last:
            self._check_time(done)

    def _check_time(self, done: int) -> None:
        try:
            self.run.check_time(self.stage, done, self.training.steps)
        except OutOfTime:
            if self.seen:
                self._finite_mean()  # so that no non-finite state is saved
            if done != self.saved and done % self.training.resume_every == 0:
                self._save(done)
            raise

    def _finite_mean(self) -> float:
        """Return the mean loss, or restore the last good state and raise."""
        norms = torch._foreach_norm([p.detach() for p in self.parameters])
        norm_sum = torch.stack([whole(norm) for norm in norms]).sum()
        mean, norm = torch.stack([self.total / self.seen, norm_sum]).tolist()
        if math.isfinite(mean) and math.isfinite(norm):
            return float(mean)
        step, state = self.good
        put_state(self.model, state)
        raise DivergenceError(
            f"the loss of stage {self.stage!r} stopped being finite after step {step}; try a "
            "smaller learning rate",
            state,
        )

    def _save(self, step: int) -> None:
        self.saved = step
        state = {
            "step": step,
            "mean": self.mean,
            "losses": (self.total, self.seen),
            "model": self.model.state_dict(),
            # They may be other tensors; those of the model share its storage in the file too.
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
        }
        self.run.keep(f"{self.stage}.progress", state)

    def resume(self) -> int:
        """Restore the saved state of the stage, if there is one, and return its step.

        Raises:
            BadInputError: If it was saved with another model or other settings.
        """
        kept = self.run.recall(f"{self.stage}.progress")
        if kept is None:
            return 0
        try:
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept["parameters"], strict=True):
                    parameter.copy_(value)
            total, self.seen = kept["losses"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise BadInputError(
                f"the checkpoint of stage {self.stage!r} belongs to another model or other "
                "settings "
                f"({one_line(error)}); delete it to start again"
            ) from error
        self.total, self.mean = total.to(self.total), float(kept["mean"])
        self.saved = int(kept["step"])
        self.good = (self.saved, copy_state(self.model))
        return self.saved


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizer(parameters: list[Tensor], training: Training) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=training.lr, weight_decay=training.weight_decay, foreach=True
        )
    return torch.optim.SGD(
        parameters,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        foreach=True,
    )


def loss_gradients(adapter: TaskAdapter[B]) -> Gradients:
    """Return a function that computes the gradients of the mean loss, in bf16 on CUDA."""
    model = adapter.model
    device = next(model.parameters()).device

    def compute(batch: B, _: int) -> Tensor:
        count = len(batch)

        def attempt(rows: Sequence[slice]) -> list[Tensor]:
            total = torch.zeros((), device=device)
            for parameter in model.parameters():
                parameter.grad = None  # left by a failed attempt
            for row in rows:
                with autocast(device):
                    loss = adapter.per_sample_loss(batch.rows(row)).mean()
                share = (row.stop - row.start) / count
                (loss * share).backward()
                total = total + share * loss.detach()
            return [total]

        (loss,) = shared(attempt, count, "training", model)
        _add_up_gradients(sharing(count), list(model.parameters()))
        return loss

    return compute


def _add_up_gradients(processes: Processes, parameters: Sequence[Tensor]) -> None:
    """Sum ``.grad`` over processes; it stays None for parameters that no process used."""
    if processes.count == 1:
        return
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    (users,) = processes.sum([used.float()])
    chosen = [p for p, some in zip(parameters, users.tolist(), strict=True) if some]
    mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
    for parameter, total in zip(chosen, processes.sum(mine), strict=True):
        parameter.grad = total


def mean_loss_gradient(
    adapter: TaskAdapter[B], batch: B, parameters: Sequence[Tensor], what: str = "training"
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss of a batch and its gradient, in micro-batches if memory runs out.

    Args:
        adapter: The model, in any mode; see :mod:`mmdefense.runtime.memory` for BatchNorm.
        batch: N samples.
        parameters: What to differentiate with respect to.
        what: The kind of work; the micro-batch size is remembered for each kind.
    """

    def loss(rows: slice) -> tuple[Tensor, Tensor]:
        mean = adapter.per_sample_loss(batch.rows(rows)).mean()
        return mean, mean

    count = len(batch)
    return gradient_in_parts(loss, count, parameters, what, adapter.model)


def _indices(total: int, size: int, step: int, run: Run, stage: str) -> Tensor:
    """Return the sample indices of a step, from an endless sequence of permutations.

    They depend only on seed, stage and step, so that a resumed run draws the same ones.
    """
    first, last = step * size // total, ((step + 1) * size - 1) // total
    sequence = torch.cat(
        [
            torch.randperm(total, generator=run.generator(f"{stage}/epoch{epoch}"))
            for epoch in range(first, last + 1)
        ]
    )
    start = step * size - first * total
    return sequence[start : start + size]


@contextmanager
def _restored_rng(device: torch.device) -> Iterator[None]:
    """Restore the global random state at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _without_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Clear the gradients at the end."""
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)


def _seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the global generators of the CPU and of ``device``, but not those of other devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def scores(adapter: TaskAdapter[B], samples: Samples[B], batch_size: int = 256) -> Tensor:
    """Return per-sample scores (their mean is the task metric) in eval mode, ``(N,)``, on CPU."""
    with mode(adapter.model, train=False), torch.no_grad():
        found = [
            each
            for batch in batches(samples, batch_size)
            for each in in_parts(adapter.score, batch, "scoring", adapter.model)
        ]
    return torch.cat(found).cpu()


def mean_score(adapter: TaskAdapter[B], samples: Samples[B], batch_size: int = 256) -> float:
    """Return the task metric over ``samples``, in ``[0, 1]``.

    Example:
        >>> mean_score(adapter, samples)
        1.0
    """
    return float(scores(adapter, samples, batch_size).mean())
