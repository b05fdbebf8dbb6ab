"""What counts as finding an object, and how well a detector finds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from mmdefense.data.batch import Samples, batches
from mmdefense.data.detection import DetectionBatch, Detections
from mmdefense.kernels.hooks import mode
from mmdefense.libraries import needed
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import in_parts

__all__ = [
    "Detecting",
    "average_precisions",
    "box_iou",
    "detections",
    "found",
    "mean_average_precision",
]


class Detecting(TaskAdapter[DetectionBatch], Protocol):
    """An adapter whose model finds objects."""

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Return what the model finds in each image, no grad."""
        ...


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of boxes ``(A, 4)`` and ``(B, 4)``, shape ``(A, B)``."""
    corner = torch.maximum(first[:, None, :2], second[:, :2])
    sides = (torch.minimum(first[:, None, 2:], second[:, 2:]) - corner).clamp(min=0)
    shared = sides.prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-9)


def found(
    detected: Detections,
    boxes: Tensor,
    labels: Tensor,
    *,
    iou: float = 0.5,
    confidence: float = 0.5,
) -> Tensor:
    """Return for each object whether a detection of its class lies on it, bool ``(M,)``.

    Args:
        detected: What was found in the image.
        boxes: Of the objects, ``(M, 4)``.
        labels: Of the objects, ``(M,)``.
        iou: Least overlap of detection and object.
        confidence: Least confidence of a detection that counts.
    """
    hits = box_iou(boxes, detected.boxes) >= iou
    hits &= labels[:, None] == detected.labels
    return (hits & (detected.scores >= confidence)).any(1)


def average_precisions(results: Iterable[tuple[Detections, Tensor, Tensor]]) -> list[float]:
    """Return each image's share of the average precision at IoU 0.5 over all of them.

    As in mAP the detections of a class are ranked by confidence over all images, and each object
    counts the first of its class that lies on it: with the precision of the ranking up to there. An
    image's share is the mean over its objects, so that a model which is as right as before and less
    sure keeps its score, unless some images are ranked wrongly against others. An image without
    objects scores one less its most confident detection.

    Args:
        results: What was found in each image, and boxes ``(M, 4)`` and labels ``(M,)`` of its
            objects.
    """
    images = list(results)
    hits = torch.cat([_hits(*image) for image in images])
    scores, labels = (
        torch.cat([getattr(found, name) for found, _, _ in images]) for name in ("scores", "labels")
    )
    precision = torch.zeros(len(scores), dtype=torch.float64)
    for label in torch.unique(labels):
        mine = (labels == label).nonzero()[:, 0]
        mine = mine[scores[mine].argsort(descending=True, stable=True)].cpu()
        precision[mine] = hits[mine].double().cumsum(0) / torch.arange(1, len(mine) + 1)
    counted = torch.split(precision * hits, [len(found.scores) for found, _, _ in images])
    return [
        float(own.sum() / len(boxes)) if len(boxes) else 1 - _surest(found)
        for (found, boxes, _), own in zip(images, counted, strict=True)
    ]


def _hits(detected: Detections, boxes: Tensor, labels: Tensor) -> Tensor:
    """Return which detections of an image are the first of their class on an object, ``(D,)``."""
    hits, free = torch.zeros(len(detected.scores), dtype=torch.bool), set(range(len(boxes)))
    order = detected.scores.argsort(descending=True)
    overlap = box_iou(detected.boxes[order], boxes)
    overlap = torch.where(detected.labels[order][:, None] == labels, overlap, 0.0)
    for place, row in zip(order.tolist(), overlap.tolist(), strict=True):
        if not free:
            break
        best = max(free, key=row.__getitem__)
        if row[best] >= 0.5:
            free.remove(best)
            hits[place] = True
    return hits


def _surest(detected: Detections) -> float:
    return float(detected.scores.max()) if len(detected.scores) else 0.0


def detections(
    adapter: Detecting, samples: Samples[DetectionBatch], batch_size: int = 64
) -> Iterator[tuple[Detections, Tensor, Tensor]]:
    """Yield for each image what is found in eval mode, and the boxes and labels of its objects."""
    with mode(adapter.model, train=False), torch.no_grad():
        for batch in batches(samples, batch_size):
            parts = in_parts(adapter.detect, batch, "scoring", adapter.model)
            yield from zip(chain(*parts), batch.boxes, batch.labels, strict=True)


def mean_average_precision(
    adapter: Detecting, samples: Samples[DetectionBatch]
) -> dict[str, float]:
    """Return the mAP over ``samples``, in ``[0, 1]``: ``map50`` at IoU 0.5, ``map`` over 0.5:0.95.

    Raises:
        UnsupportedError: If pycocotools or torchvision is not installed.
    """
    with needed("mean average precision", "pycocotools", "torchvision"):
        from torchmetrics.detection import MeanAveragePrecision

        metric: Any = MeanAveragePrecision()
    for detected, boxes, labels in detections(adapter, samples):
        one = {"boxes": detected.boxes, "labels": detected.labels, "scores": detected.scores}
        metric.update(
            [{name: value.cpu() for name, value in one.items()}],
            [{"boxes": boxes.cpu(), "labels": labels.cpu()}],
        )
    result = metric.compute()
    return {"map50": float(result["map_50"]), "map": float(result["map"])}
