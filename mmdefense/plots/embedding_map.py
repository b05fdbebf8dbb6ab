"""A map of the penultimate layer."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdefense.errors import BadInputError
from mmdefense.plots.base import Array, Numbers, Plot, as_array
from mmdefense.plots.panels import Scatter

__all__ = ["EmbeddingMap", "map_seconds"]

_MOST = 500  # ours: t-SNE takes seconds
_LOADING, _A_POINT, _TRIED = 3.0, 0.003, 40  # ours: seconds of scikit-learn and of a point; points


@dataclass(frozen=True, eq=False)
class EmbeddingMap(Plot):
    """The penultimate layer before and after, in the plane.

    Attributes:
        before: Place of each sample in the given model's map, ``(N, 2)``.
        after: Place of the same samples in the returned model's, ``(N, 2)``.
        labels: True class of each sample, ``(N,)``.
        triggered: Which samples carry the trigger, bool ``(N,)``.
        names: Name of each class.
        total: Number of samples that these were taken from; by default as many as there are.
    """

    before: Numbers
    after: Numbers
    labels: Numbers
    triggered: Numbers | None = None
    names: Sequence[str] = ()
    total: int = 0

    title = "Penultimate layer"
    wide = True

    @classmethod
    def by_tsne(
        cls,
        before: Numbers,
        after: Numbers,
        labels: Numbers,
        *,
        triggered: Numbers | None = None,
        names: Sequence[str] = (),
        seed: int = 0,
    ) -> EmbeddingMap:
        """Return the map of at most 500 samples, made by t-SNE.

        Args:
            before: Embedding of the given model, ``(N, D)``.
            after: Embedding of the returned model for the same samples, ``(N, D)``.
            labels: True class of each sample, ``(N,)``.
            triggered: Which samples carry the trigger, bool ``(N,)``.
            names: Name of each class.
            seed: Of t-SNE.

        Raises:
            BadInputError: If there are fewer than three samples, or values that are not finite.
        """
        total = len(labels)
        keep = np.unique(np.linspace(0, total - 1, min(total, _MOST)).round().astype(int))
        crossed = None if triggered is None else as_array(triggered)[keep] > 0
        return cls(
            _tsne(as_array(before)[keep], seed),
            _tsne(as_array(after)[keep], seed),
            as_array(labels)[keep],
            crossed,
            names,
            total,
        )

    @property
    def caption(self) -> str:
        """How to read it, and how many samples it is of."""
        crosses = (
            " Crosses carry the trigger: with a working backdoor they gather in a cluster of their "
            "own; without one they lie among their true classes."
        )
        shown, total = len(self.labels), self.total or len(self.labels)
        return (
            f"Each point is a sample, coloured by its true class.{crosses * self._triggered} In a "
            "t-SNE map neighbourhoods mean something, but distances between clusters do not. "
            + (f"{shown} of {total} samples." if shown < total else f"{total} samples.")
        )

    @property
    def _triggered(self) -> bool:
        return self.triggered is not None and bool(as_array(self.triggered).any())

    def panels(self) -> list[Scatter]:
        """Return the maps before and after."""
        return [
            Scatter(points, self.labels, self.names, self.triggered, title=title)
            for title, points in (("before", self.before), ("after", self.after))
        ]


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


def _tsne(points: Array, seed: int) -> Array:
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
    places: Array = embedder.fit_transform(points)
    return places
