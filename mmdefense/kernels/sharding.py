"""Training of a model whose weights are sharded over several processes (FSDP).

Each process keeps its shard of every weight, gradient and optimizer state, and gathers the weights
of a block when the block runs. This works for a loss with one ordinary backward pass:
``torch.autograd.grad`` with respect to sharded weights returns nothing, so a gradient cannot be
differentiated again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Batch, Samples
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.kernels.loop import Gradients, autocast, optimise
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import is_out_of_memory
from mmdefense.runtime.processes import present
from mmdefense.runtime.run import Run, copy_state
from mmdefense.training import Training

__all__ = ["train_split"]

B = TypeVar("B", bound=Batch)


def train_split(
    adapter: TaskAdapter[B],
    samples: Samples[B],
    training: Training,
    run: Run,
    *,
    stage: str,
) -> float:
    """Minimise the mean loss of an adapter, in place, with its weights sharded over the processes.

    Meanwhile the given model is kept in CPU memory. No checkpoint is saved during the stage.

    Raises:
        BadInputError: If a batch has fewer samples than there are processes.
        UnsupportedError: If memory runs out.
        DivergenceError: If the loss or a weight is not finite; the last good state is restored.
        OutOfTime: See :func:`~mmdefense.kernels.loop.optimise`.
    """
    if training.batch_size < present().count:
        raise BadInputError(
            f"batch_size must be at least the number of processes, {present().count}, with "
            f"--shard, got {training.batch_size}"
        )
    device = next(adapter.model.parameters()).device
    adapter.model.to("cpu")
    try:
        copy = adapter.fork()
        _split(copy.model, device)
        try:
            return optimise(
                copy.model,
                samples,
                training,
                replace(run, store=None),
                stage=stage,
                gradients=_gradients(copy, device),
            )
        finally:
            adapter.model.load_state_dict(copy_state(copy.model))
    finally:
        adapter.model.to(device)


def _split(model: nn.Module, device: torch.device) -> None:
    """Shard the weights of each block of a stack, such as a transformer's, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (present().count,))
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in [block for stack in reversed(stacks) for block in stack]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to(device)  # buffers


def _gradients(adapter: TaskAdapter[B], device: torch.device) -> Gradients:
    processes = present()

    def compute(batch: Any, _: int) -> Tensor:
        rows = processes.rows(len(batch))
        share = (rows.stop - rows.start) / len(batch)
        try:
            with autocast(device):
                loss = adapter.per_sample_loss(batch.rows(rows)).mean() * share
            (loss * processes.count).backward()  # FSDP takes the mean over processes
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UnsupportedError(
                f"memory ran out while training with sharded weights; use a smaller batch "
                f"(--set batch_size=8), or more devices ({one_line(error)})"
            ) from error
        processes.average([b for b in adapter.model.buffers() if b.is_floating_point()])
        (total,) = processes.sum([loss.detach()])
        return total

    return compute
