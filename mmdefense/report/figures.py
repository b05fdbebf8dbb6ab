"""The figures of a page: pictures, a title, and a caption that says how to read them.

A :class:`Figure` is general. The functions below make the usual ones from arrays or tensors.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmdefense.errors import BadInputError
from mmdefense.kernels.curvature import Spectrum
from mmdefense.report.images import ImageGrid, ImageRow
from mmdefense.report.plots import (
    Bars,
    Curve,
    Curves,
    Histogram,
    Plot,
    Scatter,
    as_array,
)
from mmdefense.report.record import LayerChange
from mmdefense.report.svg import AFTER, ATTACK, BEFORE

__all__ = [
    "Figure",
    "activeness",
    "embedding",
    "inverted_samples",
    "layer_changes",
    "map_seconds",
    "pruning_curve",
    "recovered_triggers",
    "smoothness",
    "spectral_density",
    "training_curves",
    "triggered_samples",
    "weight_change",
]

_SPECTRUM = (
    "The density is how many of the eigenvalues lie where, by Lanczos quadrature (Ghorbani et al., "
    "arXiv:1901.10159): almost all are close to zero, and the few far to the right are the sharp "
    "directions; left of zero the loss curves down. Single humps are nodes of the quadrature."
)
_EMBEDDED, _LAYERS, _COLUMNS = 500, 24, 10  # ours: t-SNE takes seconds, and pages stay readable
_LOADING, _A_POINT, _TRIED = 3.0, 0.003, 40  # ours: seconds of scikit-learn and of a point; points


@dataclass(frozen=True, eq=False)
class Figure:
    """Pictures side by side under one title.

    Attributes:
        title: What is shown.
        caption: How to read it, and what it does not say.
        plots: The pictures.
        wide: Whether it takes the whole width of the page.
    """

    title: str
    caption: str
    plots: Sequence[Plot]
    wide: bool = False


def triggered_samples(
    clean: Any, triggered: Any, *, trigger: Any = None, names: Sequence[str] = ()
) -> Figure:
    """Show samples without and with the trigger, and what the trigger altered.

    Args:
        clean: Images ``(N, C, H, W)`` in ``[0, 1]``; the first ten are shown.
        triggered: The same images with the trigger.
        trigger: The trigger itself, ``(M, C, H, W)``, where it is an image.
        names: What stands below each sample, such as its class.
    """
    rows, largest = _with_and_without(clean, triggered, names)
    if trigger is not None:
        rows.insert(0, ImageRow("trigger", trigger))
    return Figure(
        "The trigger",
        "Each column is one test sample without and with the trigger. In the difference mid-grey "
        f"is no change; it is scaled to its largest value, {largest:.3g} of the full range. "
        "A model with a working backdoor gives every triggered sample the attacker's label.",
        [ImageGrid(rows, columns=_COLUMNS)],
        wide=True,
    )


def _with_and_without(
    clean: Any, triggered: Any, names: Sequence[str] = ()
) -> tuple[list[ImageRow], float]:
    """Return rows of samples without and with a trigger and of the change, and the largest one."""
    clean, triggered = as_array(clean[:_COLUMNS]), as_array(triggered[:_COLUMNS])
    change = triggered - clean
    largest = float(np.abs(change).max(initial=0))
    magnified = 0.5 + change / (2 * largest) if largest else np.full_like(change, 0.5)
    rows = [
        ImageRow("clean", clean, names),
        ImageRow("with trigger", triggered),
        ImageRow("difference", magnified),
    ]
    return rows, largest


def inverted_samples(clean: Any, triggered: Any, name: str, success: float) -> Figure:
    """Show clean samples without and with a trigger that a search recovered.

    Args:
        clean: Images ``(N, C, H, W)`` in ``[0, 1]``; the first ten are shown.
        triggered: The same images with the trigger.
        name: What the trigger is and where it leads.
        success: Share of clean samples that it led there before the purification.
    """
    rows, largest = _with_and_without(clean, triggered)
    return Figure(
        "Samples with a recovered trigger",
        f"The recovered trigger that worked best ({name}): the given model fell for it in "
        f"{100 * success:.0f}% of the clean samples. In the difference mid-grey is no change; it "
        f"is scaled to its largest value, {largest:.3g} of the full range. It need not look like "
        "an attacker's trigger.",
        [ImageGrid(rows, columns=_COLUMNS)],
        wide=True,
    )


_FATES = (
    "accepted",
    "works, not told apart from the triggers of clean models",
    "does not work",
)


def recovered_triggers(
    images: Any,
    names: Sequence[str],
    *,
    accepted: Sequence[bool] | None = None,
    works: Sequence[bool] | None = None,
) -> Figure:
    """Show the triggers that a search recovered.

    Args:
        images: One per trigger, ``(C, H, W)`` in ``[0, 1]``; families may differ in size.
        names: What stands below each, such as its target and success rate.
        accepted: Which of them were unlearnt; none means all.
        works: Which of the others work all the same, but were not told apart from the triggers
            that clean models have; none means none.
    """
    images, names = [as_array(image) for image in images], list(names)
    passed = np.ones(len(images), bool) if accepted is None else as_array(accepted) > 0
    if not len(images) == len(names) == len(passed):
        raise BadInputError(
            f"images, names and accepted must have one length, got {len(images)}, {len(names)} "
            f"and {len(passed)}"
        )
    working = np.zeros(len(images), bool) if works is None else as_array(works) > 0
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, image in enumerate(images):
        kind = 0 if passed[index] else 1 if working[index] else 2
        alike.setdefault((kind, image.shape), []).append(index)
    rows = [
        ImageRow(
            _FATES[kind],
            np.stack([images[n] for n in chosen]),
            [names[n] for n in chosen],
        )
        for (kind, _), chosen in sorted(alike.items())
    ]
    return Figure(
        "Recovered triggers",
        "Sampled from the trigger generators, with no knowledge of the true trigger or target. "
        "They need not look like the true trigger to undo its effect. A trigger that works and was "
        "not accepted may be a backdoor's: models that nobody tampered with have such triggers, "
        "too. That none was accepted is not proof that there is none.",
        [ImageGrid(rows)] if rows else [],
        wide=True,
    )


def pruning_curve(
    fractions: Any, accuracy: Any, *, asr: Any = None, chosen: float | None = None
) -> Figure:
    """Show what pruning costs and, where the attack is known, what it buys.

    Args:
        fractions: Share of the units pruned, ``(N,)`` in ``[0, 1]``.
        accuracy: Hold-out accuracy at each, ``(N,)`` in ``[0, 1]``.
        asr: Attack success rate at each; not seen by the defense.
        chosen: The fraction that the defense chose.
    """
    curves = [Curve("hold-out accuracy", fractions, accuracy, AFTER)]
    seen = ""
    if asr is not None:
        curves.append(Curve("ASR (lower is better)", fractions, asr, ATTACK))
        seen = " The ASR was added afterwards: the defense chose by accuracy alone."
    return Figure(
        "Pruning curve",
        "Units are pruned in the defense's order, from left to right. A backdoor is separable "
        f"where the ASR falls long before the accuracy does.{seen}",
        [
            Curves(
                curves,
                "units pruned",
                "rate",
                percent="xy",
                mark=chosen,
                mark_label="chosen",
            )
        ],
    )


def weight_change(change: Any, *, reset: int | None = None) -> Figure:
    """Show the neuron weight change (NWC) of every unit, largest first.

    Args:
        change: NWC of each unit during clean unlearning, any shape.
        reset: How many of the first units the defense reinitialised.
    """
    values = np.sort(as_array(change).ravel())[::-1]
    ranks = np.arange(1, len(values) + 1)
    return Figure(
        "Neuron weight change",
        "How far each unit moved while clean data was unlearned; units in descending order. "
        "Units at the left are suspects: a backdoor's neurons tend to change most. A flat curve "
        "singles out none.",
        [
            Curves(
                [Curve("NWC", ranks, values, AFTER)],
                "unit, by rank",
                "weight change (NWC)",
                mark=reset,
                mark_label="reinitialised up to here",
                filled=True,
            )
        ],
    )


def activeness(before: Any, after: Any = None) -> Figure:
    """Show the gradient norm of every unit on clean data, before and after.

    Args:
        before: Gradient norm of each unit of the given model, any shape.
        after: The same of the returned model.
    """
    series = {"before": before} | ({} if after is None else {"after": after})
    return Figure(
        "Neuron activeness",
        "Gradient norm of each unit on clean data, on a logarithmic scale; zeros stand in the "
        "first bin. A backdoored model has more units that are very active; purified, the tail at "
        "the right should be shorter.",
        [Histogram(series, "gradient norm per unit", log=True)],
    )


def smoothness(
    lambda_max: tuple[float, float] | None,
    trace: tuple[float, float],
    spectra: Mapping[str, Spectrum] | None = None,
) -> Figure:
    """Show the sharpness of the clean loss before and after.

    Args:
        lambda_max: Largest eigenvalue of the Hessian, before and after; none where it was not
            measured.
        trace: Trace of the Hessian, before and after.
        spectra: How all eigenvalues are spread, by name.
    """
    labels = ("before", "after")
    return Figure(
        "Loss smoothness",
        "Curvature of the clean loss at the model's weights; smaller is smoother. Backdoored "
        "models were found to sit in sharper minima than clean ones (FIP, arXiv:2409.00863). "
        "Compare before with after only: the scale depends on the model."
        + (f" {_SPECTRUM}" if spectra else ""),
        [
            *(
                [Bars(labels, lambda_max, "λmax: largest eigenvalue of the Hessian")]
                if lambda_max is not None
                else []
            ),
            Bars(labels, trace, "Tr(H): trace of the Hessian"),
            *([spectral_density(spectra)] if spectra else []),
        ],
        wide=bool(spectra),
    )


def spectral_density(spectra: Mapping[str, Spectrum]) -> Curves:
    """Draw the density of the eigenvalues of the Hessian, a line for each spectrum.

    The nodes are smoothed by Gaussians a hundredth as wide as all of them together.
    """
    nodes = np.concatenate([as_array(spectrum.nodes) for spectrum in spectra.values()])
    width = max(float(np.ptp(nodes)) / 100, 1e-9)
    grid = torch.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, 300).double()
    colors = {"before": BEFORE, "after": AFTER}
    return Curves(
        [
            Curve(name, grid, spectrum.density(grid, width), colors.get(name, ""))
            for name, spectrum in spectra.items()
        ],
        "eigenvalue of the Hessian",
        "density (log)",
        log=True,
    )


def embedding(
    before: Any,
    after: Any,
    labels: Any,
    *,
    triggered: Any = None,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Figure:
    """Show the penultimate layer before and after, in the plane, by t-SNE.

    Args:
        before: Embedding of the given model, ``(N, D)``.
        after: Embedding of the returned model for the same samples, ``(N, D)``.
        labels: True class of each sample, ``(N,)``.
        triggered: Which samples carry the trigger, bool ``(N,)``.
        names: Name of each class.
        seed: Of t-SNE.
    """
    total = len(as_array(labels))
    keep = np.unique(np.linspace(0, total - 1, min(total, _EMBEDDED)).round().astype(int))
    groups = as_array(labels)[keep]
    crossed = None if triggered is None else as_array(triggered)[keep]
    plots = [
        Scatter(_tsne(as_array(points)[keep], seed), groups, names, crossed, title=title)
        for title, points in (("before", before), ("after", after))
    ]
    return Figure(
        "Penultimate layer",
        "Each point is a sample, coloured by its true class; crosses carry the trigger. With a "
        "working backdoor the crosses gather in a cluster of their own; without one they lie among "
        "their true classes. In a t-SNE map neighbourhoods mean something, but distances between "
        f"clusters do not. {len(keep)} of {total} samples.",
        plots,
        wide=True,
    )


def map_seconds(count: int, slowness: float = 1.0) -> float:
    """Return about how many seconds the t-SNE of so many points takes, tried on a few.

    Where its library is not loaded yet, that is not done to find out, and counted in.

    Args:
        count: Number of points.
        slowness: Seconds by the clock for a second of computation.
    """
    if "sklearn.manifold" not in sys.modules:
        return slowness * (_LOADING + count * _A_POINT)
    begin = time.perf_counter()
    _tsne(np.random.default_rng(0).normal(size=(_TRIED, 2)), 0)
    return (time.perf_counter() - begin) / _TRIED * count


def _tsne(points: Any, seed: int) -> Any:
    """Return a map of ``points`` ``(N, D)`` in the plane, ``(N, 2)``."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(points) < 3 or not np.isfinite(points).all():
        raise BadInputError("an embedding needs at least 3 samples and finite values")
    if not np.ptp(points, axis=0).any():  # a collapsed model: one point, which t-SNE cannot scale
        return np.zeros((len(points), 2))
    if points.shape[1] > 50:
        size = min(50, len(points))
        points = PCA(size, random_state=seed).fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    init = "pca" if points.shape[1] > 1 else "random"
    # Ours: 600 iterations; maps of this size hardly move after them.
    embedder = TSNE(perplexity=perplexity, init=init, max_iter=600, random_state=seed)
    return embedder.fit_transform(points)


def training_curves(history: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Show every figure that a run reported, one panel each, one line per stage.

    Args:
        history: Mappings of ``stage``, ``step`` and figures by name, in order of time.

    Returns:
        The figure, or none where nothing was reported twice.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for entry in history:
        for name, value in entry.items():
            if name not in {"stage", "step"} and _is_number(value):
                panels[name][str(entry.get("stage", ""))].append((entry.get("step", 0), value))
    plots = []
    for name, stages in panels.items():
        curves = [
            Curve(stage, *np.transpose(as_array(points)))
            for stage, points in stages.items()
            if len(points) > 1
        ]
        if curves:
            plots.append(Curves(curves, "step", name))
    if not plots:
        return None
    return Figure(
        "Training curves",
        "What each stage of the defense reported as it ran. A stage that is meant to unlearn "
        "raises its loss on purpose.",
        plots,
        wide=len(plots) > 2,
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def layer_changes(layers: Sequence[LayerChange]) -> Figure | None:
    """Show how far each layer moved, or the layers that moved most where there are many.

    Args:
        layers: The layers, input side first.

    Returns:
        The figure, or none where there are no layers.
    """
    if not layers:
        return None
    floor = sorted((layer.change for layer in layers), reverse=True)[:_LAYERS][-1]
    shown = [layer for layer in layers if layer.change >= floor][:_LAYERS]
    silenced, units = (sum(getattr(x, name) for x in layers) for name in ("silenced", "units"))
    cut = f", the {len(shown)} of {len(layers)} that moved most" if len(shown) < len(layers) else ""
    names, changes = [_layer_label(layer) for layer in shown], [layer.change for layer in shown]
    return Figure(
        "What was changed",
        "Distance between a layer's weights after and before, relative to the norm before: layers "
        f"in order, input side first{cut}. {silenced} of {units} units were silenced.",
        [Bars(names, changes, "relative weight change")],
    )


def _layer_label(layer: LayerChange) -> str:
    return f"{layer.layer} ({layer.silenced} silenced)" if layer.silenced else layer.layer
