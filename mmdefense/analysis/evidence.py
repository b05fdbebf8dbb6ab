"""What a purification did to a model, measured afterwards on a few hundred clean samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Samples, batches, few
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.curvature import Smoothness, smoothness
from mmdefense.kernels.fisher import check_second_derivative
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.units import relative_change, unit_rows
from mmdefense.plots.embedding_map import EmbeddingMap
from mmdefense.plots.loss_smoothness import LossSmoothness
from mmdefense.protocol import TaskAdapter, UnitGroup
from mmdefense.report.record import LayerChange
from mmdefense.runtime.memory import in_parts, is_out_of_memory, saved_bytes

__all__ = [
    "CURVED",
    "EMBEDDED",
    "curvature_batch",
    "curvature_steps",
    "embedding_map",
    "embeddings",
    "layer_changes",
    "measured_sharpness",
    "sharpness",
    "smoothness_plot",
]

CURVED = (128, 64, 32)
"""Ours: samples that the curvature is measured on, and fewer where there is no time for them."""

EMBEDDED = 300
"""Ours: samples of the map of the penultimate layer, which stays readable."""

_STEPS, _FEWEST, _KEPT = 16, 4, 2**29  # ours: Lanczos vectors, and entries of all: 2 GiB in float32
_GRAPH = 2**30  # ours: bytes that the graph of a product with the Hessian may take
_TWICE = 6  # ours: how many times as much as that of a forward pass it takes


def sharpness(adapter: TaskAdapter[Any], samples: Samples[Any], seed: int = 0) -> Smoothness | None:
    """Return the curvature of the clean loss at a model's weights, or none where it cannot be had.

    With one probe: enough to compare a model with its purified self, which get the same samples
    and the same probe.
    """
    try:
        return measured_sharpness(adapter, samples, seed)
    except UnsupportedError:
        return None
    except (RuntimeError, MemoryError) as error:  # a figure is no reason to lose a model over
        if is_out_of_memory(error):
            return None
        raise


def measured_sharpness(
    adapter: TaskAdapter[Any],
    samples: Samples[Any],
    seed: int = 0,
    probes: int = 1,
    *,
    steps: int | None = None,
    trace_error: float | None = None,
    watch: Callable[[int], object] | None = None,
) -> Smoothness:
    """Return the curvature of the clean loss at a model's weights.

    The cost is bounded: at most 128 samples, at most 16 products with the Hessian a probe, and
    fewer where the model is so large that the vectors to keep would exceed 2 GiB in float32; and
    as many samples at once as keep the graph of a product within about 1 GiB.

    Args:
        adapter: The model.
        samples: Clean samples, as the adapter reads them.
        seed: Of the probes.
        probes: Number of random vectors.
        steps: Products with the Hessian a probe; by default as many as are allowed.
        trace_error: Standard error of the trace to reach, as a share of it, by more products; see
            :func:`~mmdefense.kernels.curvature.smoothness`.
        watch: Called before each pass with the number of products that are done; may raise.

    Raises:
        UnsupportedError: If the model has no Hessian, or is too large even for four products.
    """
    part = few(samples, CURVED[0])  # fewer than the classes may be left
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    most = curvature_steps(adapter)
    check_second_derivative(adapter, part, parameters)
    return smoothness(
        adapter,
        part,
        generator,
        probes=probes,
        steps=most if steps is None else min(steps, most),
        trace_error=trace_error,
        batch_size=curvature_batch(adapter, part),
        watch=watch,
    )


def curvature_steps(adapter: TaskAdapter[Any]) -> int:
    """Return how many products with the Hessian there is memory for; each leaves a vector to keep.

    Raises:
        UnsupportedError: If the model is too large even for four.
    """
    size = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
    steps = min(_STEPS, _KEPT // max(1, size))
    if steps < _FEWEST:
        raise UnsupportedError(
            f"the curvature of {type(adapter.model).__name__} was not measured: with {size:,} "
            f"weights, {_FEWEST} vectors of its size exceed {_KEPT:,} entries"
        )
    return steps


def curvature_batch(adapter: TaskAdapter[Any], samples: Samples[Any]) -> int:
    """Return how many samples at once, at most 32, a product with the Hessian has memory for.

    Told by what the graph of one sample's loss keeps.

    Raises:
        UnsupportedError: If one sample is too much.
    """
    one = samples.take(torch.zeros(1, dtype=torch.int64))
    with mode(adapter.model, train=False):
        needed = _TWICE * saved_bytes(lambda: adapter.per_sample_loss(one), adapter.model)
    if needed > 2 * _GRAPH:
        raise UnsupportedError(
            f"a product of the Hessian of {type(adapter.model).__name__} with a vector takes about "
            f"{needed / 2**30:.1f} GiB for one sample"
        )
    return max(1, min(32, _GRAPH // max(1, needed)))


def embeddings(
    before: TaskAdapter[Any],
    after: TaskAdapter[Any],
    samples: Samples[Any],
    count: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return the penultimate layer of both models, each ``(N, D)``; none where there is none.

    Of all samples, as the adapters read them, or of at most ``count``, evenly from the whole set.
    """
    try:
        return _embedded(before, samples, count), _embedded(after, samples, count)
    except UnsupportedError:
        return None


def _embedded(adapter: TaskAdapter[Any], samples: Samples[Any], count: int | None) -> Tensor:
    with mode(adapter.model, train=False):
        read = samples if count is None else few(samples, count)
        found = [
            each.cpu()
            for batch in batches(read, 64)
            for each in in_parts(adapter.embedding, batch, "reading", adapter.model)
        ]
    return torch.cat(found)


def embedding_map(
    before: TaskAdapter[Any], after: TaskAdapter[Any], samples: Samples[Any]
) -> EmbeddingMap | None:
    """Return the map of at most 300 samples before and after, coloured by label.

    None is returned where the samples have no labels or the model no such layer.
    """
    part = few(samples, EMBEDDED)
    labels = part.strata()
    if labels is None or len(part) < 3:
        return None
    pair = embeddings(before, after, samples, EMBEDDED)
    if pair is None or not all(points.isfinite().all() for points in pair):
        return None
    names = getattr(samples, "classes", ())
    return EmbeddingMap.by_tsne(*pair, labels, names=names if len(names) <= 10 else ())


def layer_changes(before: TaskAdapter[Any], after: TaskAdapter[Any]) -> tuple[LayerChange, ...]:
    """Return how far each layer with a weight matrix moved, input side first."""
    old, new = _matrices(before.model), _matrices(after.model)
    change = relative_change(old, new)
    moved: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, value in old.items():
        norm = float(value.double().norm())
        moved[name.rpartition(".")[0]].append((change[name] * norm, norm))
    groups = {group.layer: group for group in before.unit_groups()}
    return tuple(
        LayerChange(
            layer=layer,
            change=_ratio(parts),
            units=groups[layer].size if layer in groups else 0,
            pruned=_pruned(groups[layer], old, new) if layer in groups else 0,
        )
        for layer, parts in moved.items()
    )


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.ndim > 1}


def _ratio(parts: list[tuple[float, float]]) -> float:
    """Return the relative change of several tensors together from each one's change and norm."""
    moved, norms = zip(*parts, strict=True)
    norm = sum(value**2 for value in norms) ** 0.5
    return float(sum(value**2 for value in moved) ** 0.5 / norm) if norm else 0.0


def _pruned(group: UnitGroup, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> int:
    """Return how many units of a group have only zero weights now, and had others before."""
    axes = {name: axis for name, axis in group.axes.items() if name in old}
    dead = [
        torch.stack([(unit_rows(state[n], a, group) == 0).all(1) for n, a in axes.items()]).all(0)
        for state in (old, new)
    ]
    return int((dead[1] & ~dead[0]).sum())


def smoothness_plot(before: Smoothness, after: Smoothness, parts: Sequence[str]) -> LossSmoothness:
    """Return the plot of the curvature before and after.

    Args:
        before: Of the given model.
        after: Of the purified one.
        parts: Which of ``"trace"``, ``"lambda_max"`` and ``"spectrum"`` are shown.
    """
    spectra = {"before": before.spectrum, "after": after.spectrum}
    return LossSmoothness(
        ["before", "after"],
        [before.trace, after.trace],
        [before.lambda_max, after.lambda_max] if "lambda_max" in parts else None,
        {name: (held.nodes, held.weights) for name, held in spectra.items()}
        if "spectrum" in parts
        else None,
        [before.spread, after.spread],
    )
