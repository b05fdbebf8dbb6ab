"""The task metric after every prefix of a pruning order, from one pass over the data.

Pruning an input of the output layer removes one term of a sum. So the features are computed once,
and the logits after each prefix are the unpruned ones minus a running sum of matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from mmdefense.data.batch import Batch, Samples, batches
from mmdefense.kernels.hooks import mode
from mmdefense.protocol import HeadAdapter
from mmdefense.runtime.memory import in_parts

__all__ = ["head_activations", "pruning_curve"]

B = TypeVar("B", bound=Batch)


def head_activations(adapter: HeadAdapter[B], samples: Samples[B], batch_size: int = 256) -> Tensor:
    """Return the mean magnitude of each input of the output layer, shape ``(D,)``, in eval mode."""
    total: Tensor | None = None
    with mode(adapter.model, train=False):
        for batch in batches(samples, batch_size):
            for read in in_parts(adapter.head_inputs, batch, "reading", adapter.model):
                found = read.double().abs().sum(0)
                total = found if total is None else total + found
    assert total is not None
    return total / len(samples)


def pruning_curve(
    adapter: HeadAdapter[B],
    samples: Samples[B],
    order: Sequence[int],
    counts: Sequence[int],
    batch_size: int = 256,
) -> Tensor:
    """Return the task metric after pruning the first ``counts[s]`` units of ``order``.

    The result is the same as pruning them in the model and evaluating it at each point; sums are
    accumulated in float64.

    Args:
        adapter: A model whose output layer is linear.
        samples: N samples to evaluate on.
        order: Inputs of the output layer, in the order of pruning.
        counts: S ascending numbers of units.
        batch_size: Samples per pass.

    Returns:
        The metric in ``[0, 1]``, shape ``(S,)``, on the CPU.
    """
    weight, bias = adapter.head_weights()
    weight = weight.detach().double()
    picks = torch.as_tensor(list(order), device=weight.device)
    edges = [0, *counts]
    steps = [picks[start:stop] for start, stop in pairwise(edges)]
    total = torch.zeros(len(counts), dtype=torch.float64)

    def summed(batch: B) -> Tensor:
        """Return the curve, summed over the samples of a batch."""
        features = adapter.head_inputs(batch).double()
        outputs = features @ weight.T + (0 if bias is None else bias.double())
        curve = []
        for step in steps:
            outputs = outputs - features[:, step] @ weight[:, step].T
            curve.append(adapter.score_outputs(batch, outputs).double().sum().cpu())
        return torch.stack(curve)

    with mode(adapter.model, train=False), torch.no_grad():
        for batch in batches(samples, batch_size):
            for curve in in_parts(summed, batch, "scoring", adapter.model):
                total += curve
    return total / len(samples)
