"""Where triggered samples lie in the penultimate layer, before and after a purification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdefense.analysis.evidence import embeddings
from mmdefense.data.batch import few
from mmdefense.errors import UnsupportedError
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.plots.embedding_map import EmbeddingMap
from mmdefense.protocol import TaskAdapter

__all__ = ["Clusters", "clusters"]

_NEIGHBOURS = 5  # ours


@dataclass(frozen=True)
class Clusters:
    """The penultimate layer of two models on clean samples and triggered ones.

    Attributes:
        before: Embedding of the given model, ``(N, D)``: clean samples, then triggered ones.
        after: Of the purified model, ``(N, D)``.
        labels: True class of each, ``(N,)``.
        triggered: Which carry the trigger, bool ``(N,)``.
        target: The attacker's class.
    """

    before: Tensor
    after: Tensor
    labels: Tensor
    triggered: Tensor
    target: int

    def among(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return where triggered samples lie, before and after.

        Each is the share of the 5 nearest clean samples of a triggered one that are of the target,
        and of its true class, in ``[0, 1]``.
        """
        return self._among(self.before), self._among(self.after)

    def _among(self, points: Tensor) -> tuple[float, float]:
        clean = ~self.triggered
        distance = torch.cdist(points[self.triggered].double(), points[clean].double())
        nearest = distance.topk(min(_NEIGHBOURS, int(clean.sum())), largest=False).indices
        labels = self.labels[clean][nearest]
        own = labels == self.labels[self.triggered][:, None]
        return float((labels == self.target).double().mean()), float(own.double().mean())

    def plot(self, seed: int = 0) -> EmbeddingMap:
        """Return the t-SNE maps of at most 500 samples."""
        return EmbeddingMap.by_tsne(
            self.before, self.after, self.labels, triggered=self.triggered, seed=seed
        )


def clusters(
    before: TaskAdapter[Any],
    after: TaskAdapter[Any],
    test: Any,
    triggered: TriggeredSamples[Any],
    target: int,
    *,
    count: int = 300,
    triggered_count: int = 60,
) -> Clusters:
    """Read the penultimate layer of a model before and after its purification.

    Args:
        before: The given model.
        after: The purified one.
        test: Clean test samples with labels.
        triggered: Triggered test samples.
        target: The attacker's class.
        count: Clean samples, evenly from all of them.
        triggered_count: Triggered samples, likewise.

    Raises:
        UnsupportedError: If the model has no such layer, or the samples no labels.
    """
    clean, attacked = few(test, count), few(triggered.clean, triggered_count)
    labels, true = clean.strata(), attacked.strata()
    plain = embeddings(before, after, clean)
    stamped = embeddings(before, after, few(triggered.samples, triggered_count))
    if labels is None or true is None or plain is None or stamped is None:
        raise UnsupportedError("clusters need samples with labels, and a model with an embedding")
    return Clusters(
        torch.cat([plain[0], stamped[0]]),
        torch.cat([plain[1], stamped[1]]),
        torch.cat([labels, true]).cpu(),
        torch.arange(len(labels) + len(true)) >= len(labels),
        target,
    )
