"""Object detectors of the ``transformers`` library: DETR, YOLOS, RT-DETR and similar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.data.detection import DetectionBatch, Detections
from mmdefense_adapters.detector import Detector
from mmdefense_adapters.given import check_scaling
from mmdefense_adapters.huggingface_processor import is_of, preprocessing_of, stated_by
from mmdefense_adapters.peft_models import base_of

__all__ = ["HFDetector"]


class HFDetector(Detector):
    """Wraps a ``transformers`` model for object detection.

    Its loss matches queries to objects and sums cross-entropy or focal terms, L1 and GIoU of the
    boxes, with the weights in the model's config, including auxiliary losses if configured.
    RT-DETR's denoising queries are random and shared by the batch; they are left out.

    Images are in ``[0, 1]`` and already have the model's input size; ``mean`` and ``std`` are
    applied inside.
    """

    priority: ClassVar[int] = 10
    auto_class: ClassVar[str] = "AutoModelForObjectDetection"
    predictors: ClassVar[str] = (
        r"class_labels_classifier|bbox_predictor|class_embed|bbox_embed|enc_(score|bbox)_head"
    )
    classifiers: ClassVar[str] = r"class_labels_classifier|class_embed|enc_score_head"

    def __init__(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        example: Tensor | None = None,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: The detector; it is not copied.
            processor: Its processor, or the content of ``preprocessor_config.json``; by default the
                file in the folder that the model was loaded from. It defines how images are resized
                on loading, and how they are normalised.
            mean: Per-channel mean to subtract from images; None means 0.
            std: Per-channel standard deviation to divide images by; None means 1.
            example: One image batch, shape ``(1, C, H, W)``; by default the first one seen.
        """
        super().__init__(model, example=example)
        self.preprocessing = preprocessing_of(processor, model, quiet=mean is not None)
        if mean is None and std is None and self.preprocessing is not None:
            mean, std = self.preprocessing.mean, self.preprocessing.std
        check_scaling(mean, std)
        self.mean, self.std = mean, std

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether ``model`` is one of ``transformers``, without importing the library."""
        return is_of(model, "ForObjectDetection")

    def reading(self) -> dict[str, Any]:
        """Return names of classes, channels, and how images are fitted and padded to one size.

        Padding becomes 0 after normalisation, as from the processor, but without a mask.
        """
        stated, own = super().reading() | stated_by(self.model), self.preprocessing
        return stated | {"fit": own.fitted, "fill": own.mean} if own and own.resizes else stated

    @property
    def classes(self) -> int:
        """Number of classes K of the model's config."""
        config: Any = self.model.config
        return int(config.num_labels)

    def _run(self, images: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        images = self._typed(images)
        if self.mean is not None:
            images = images - images.new_tensor(self.mean)[:, None, None]
        if self.std is not None:
            images = images / images.new_tensor(self.std)[:, None, None]
        if self.preprocessing is not None:
            images = self.preprocessing.ordered(images)
        return self.model(pixel_values=images, labels=labels)

    def answer(self, batch: DetectionBatch) -> Tensor:
        """Return the class logits of every query, ``(N, Q, K)``, or K + 1 with "no object"."""
        return self._run(batch.images).logits  # type: ignore[no-any-return]

    def per_sample_loss(self, batch: DetectionBatch) -> Tensor:
        """Return the library's loss of each image alone, shape ``(N,)``, from one forward pass."""
        height, width = batch.images.shape[-2:]
        sides = batch.images.new_tensor([width, height, width, height])
        targets = [
            {"class_labels": labels, "boxes": _centred(boxes.to(sides) / sides)}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
        with _loss_by_image(base_of(self.model)):
            return self._run(batch.images, targets).loss  # type: ignore[no-any-return]

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Return the best class of each query (DETR), or the best pairs of query and class."""
        height, width = batch.images.shape[-2:]
        with torch.no_grad():
            output = self._run(batch.images)
        boxes = _corners(output.pred_boxes) * output.pred_boxes.new_tensor([width, height] * 2)
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
        probabilities = self._log_probabilities(output.logits).exp()
        if self._has_no_object(output.logits):
            scores, labels = probabilities.max(2)
            return [Detections(*one) for one in zip(boxes, labels, scores, strict=True)]
        scores, places = probabilities.flatten(1).topk(probabilities.shape[1], dim=1)
        queries, labels = places // self.classes, places % self.classes
        rows = zip(boxes, queries, labels, scores, strict=True)
        return [Detections(box[query], label, score) for box, query, label, score in rows]

    def places(self, batch: DetectionBatch) -> tuple[Tensor, Tensor]:
        """Return the class log-probabilities and the box centre of each query."""
        output = self._run(batch.images)
        sides = output.pred_boxes.new_tensor(batch.images.shape[-2:]).flip(0)
        return self._log_probabilities(output.logits), output.pred_boxes[..., :2].detach() * sides

    def _has_no_object(self, logits: Tensor) -> bool:
        """Return whether classes share a softmax with "no object", as in DETR and YOLOS."""
        return logits.shape[2] == self.classes + 1

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        if self._has_no_object(logits):
            return logits.log_softmax(2)[..., :-1]
        return F.logsigmoid(logits)

    def embedding(self, batch: DetectionBatch) -> Tensor:
        """Return the mean over the queries of the last hidden state, ``(N, D)``."""
        with torch.no_grad():
            output = self._run(batch.images)
        return output.last_hidden_state[:, -output.logits.shape[1] :].mean(1)  # type: ignore[no-any-return]


def _centred(boxes: Tensor) -> Tensor:
    """Convert corners to centre, width and height."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def _corners(boxes: Tensor) -> Tensor:
    """Convert centre, width and height to corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


@contextmanager
def _loss_by_image(model: Any) -> Iterator[None]:
    """Make the model's loss function return one value per image, without denoising queries."""
    kept, config = model.loss_function, model.config
    denoising = getattr(config, "num_denoising", None)
    model.loss_function = _by_image(kept)
    if denoising:
        config.num_denoising = 0
    try:
        yield
    finally:
        model.loss_function = kept
        if denoising:
            config.num_denoising = denoising


def _by_image(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss function that calls ``compute`` with the part of each image."""
    layers_first = getattr(compute, "__name__", "") == "ForObjectDetectionLoss"  # DETR, YOLOS

    def part(value: Any, n: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[:, n : n + 1] if layers_first and value.ndim == 4 else value[n : n + 1]

    def by_image(logits: Tensor, labels: list[Any], *rest: Any, **named: Any) -> Any:
        losses = []
        for n in range(len(labels)):
            given = [part(value, n) for value in rest]
            more = {name: part(value, n) for name, value in named.items()}
            losses.append(compute(logits[n : n + 1], labels[n : n + 1], *given, **more)[0])
        return torch.stack(losses), None, None

    return by_image
