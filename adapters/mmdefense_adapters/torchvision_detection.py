"""Detectors of torchvision: FCOS, RetinaNet, SSD and SSDlite, Faster R-CNN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmdefense.data.detection import DetectionBatch, Detections
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense_adapters.detector import Detector
from mmdefense_adapters.twice import twice_differentiable

__all__ = ["TorchvisionDetector"]

_FAMILIES = ("FCOS", "RetinaNet", "SSD", "FasterRCNN")
_WITH_BACKGROUND = ("SSD", "FasterRCNN")  # softmax with class 0 for "no object"

Target = dict[str, Tensor]


@dataclass(frozen=True)
class _Seen:
    """Intermediate results of a model for a batch, before the loss.

    Attributes:
        images: torchvision's list of images, as the model sees them.
        targets: Boxes and labels in those images, in the model's numbering.
        features: Feature maps by name, each ``(N, C, h, w)``.
    """

    images: Any
    targets: list[Target]
    features: dict[str, Tensor]


class TorchvisionDetector(Detector):
    """Wraps a detector of ``torchvision.models.detection``.

    The models return losses only in train mode and detections only in eval mode, and sum losses
    over the batch. So their parts are called one by one: transform, backbone and head for the whole
    batch, then the model's own loss for each image (FCOS: for all images at once, with the same
    values). The caller controls train mode, for example of BatchNorm. FrozenBatchNorm has no
    parameters, so a pruned filter before one still outputs its constant.

    Labels count from 0, without a background class. The models' own numbering starts at ``offset``:
    1 for SSD and Faster R-CNN, whose class 0 is the background, and 0 for the others. torchvision's
    own checkpoints have 91 outputs in every family, numbered by COCO category id: 1 to 90, with
    gaps. Label L is the model's number L + ``offset``, so their labels are category ids minus
    ``offset``, not the 80 categories numbered consecutively; COCO json is read accordingly, see
    ``labels`` of ``load_detection``.
    """

    priority: ClassVar[int] = 10
    predictors: ClassVar[str] = (
        r"cls_logits|bbox_reg|bbox_ctrness|rpn\.head\.bbox_pred|box_predictor"
        r"|_head\.module_list\.\d+(\.1)?$"
    )
    classifiers: ClassVar[str] = (
        r"classification_head\.(cls_logits|module_list\.\d+(\.1)?$)|box_predictor\.cls_score"
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        offset: int | None = None,
        example: Tensor | None = None,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: The detector; it is not copied.
            offset: The model's own number of the first class.
            example: One image batch, shape ``(1, C, H, W)``; by default the first one seen.
        """
        super().__init__(model, example=example)
        family = _family(model)
        if family is None:
            raise UnsupportedError(
                f"a detector of torchvision must be one of {', '.join(_FAMILIES)}, got "
                f"{type(model).__name__}"
            )
        self.family = family
        self.offset = int(self.family in _WITH_BACKGROUND) if offset is None else offset
        self._proposals: list[int] = []

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether ``model`` is one of torchvision, without importing it."""
        return _family(model) is not None

    @property
    def classes(self) -> int:
        """Number of classes K, without the background and outputs below ``offset``."""
        return self._outputs - self.offset

    @property
    def numbers(self) -> range:
        """The model's own numbers of its classes, in order."""
        return range(self.offset, self._outputs)

    @property
    def _parts(self) -> Any:
        """The model, untyped."""
        return self.model

    @property
    def _outputs(self) -> int:
        if self.family == "FasterRCNN":
            return int(self._parts.roi_heads.box_predictor.cls_score.out_features)
        head = self._parts.head.classification_head
        return int(getattr(head, "num_classes", None) or head.num_columns)

    def _see(self, batch: DetectionBatch) -> _Seen:
        """Run transform and backbone."""
        given = self._typed(batch.images)
        targets = [
            {"boxes": boxes.to(given), "labels": labels + self.offset}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
        images, targets = self._transformed(given, targets)
        features = self._parts.backbone(images.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        return _Seen(images, targets, features)

    def _transformed(self, images: Tensor, targets: list[Target]) -> tuple[Any, list[Target]]:
        """Normalise and resize, in one batch if the images already have the model's size."""
        from torchvision.models.detection.image_list import ImageList

        transform, sides = self._parts.transform, tuple(images.shape[-2:])
        fixed = transform.fixed_size
        fits = fixed == sides[::-1] if fixed else (
            tuple(transform.min_size) == (min(sides),) and max(sides) <= transform.max_size
        )  # fmt: skip
        if fits and all(side % transform.size_divisible == 0 for side in sides):
            return ImageList(transform.normalize(images), [sides] * len(images)), targets
        return transform(list(images), targets)  # type: ignore[no-any-return]

    def _head(self, seen: _Seen) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return a one-stage head's outputs, ``(N, locations, ...)``, and the anchors per image."""
        maps = list(seen.features.values())
        return self._parts.head(maps), self._parts.anchor_generator(seen.images, maps)

    def per_sample_loss(self, batch: DetectionBatch) -> Tensor:
        """Return the sum of the library's loss terms for each image alone, shape ``(N,)``."""
        with twice_differentiable():
            seen = self._see(batch)
            if self.family == "FasterRCNN":
                return torch.stack([self._two_stage_loss(part) for part in _alone(seen)])
            outputs, anchors = self._head(seen)
        # The losses already have a second derivative, and calls are slower inside that context.
        if self.family == "FCOS":
            return self._fcos_loss(seen, outputs, anchors)
        return torch.stack([
            self._one_stage_loss(target, {k: v[n : n + 1] for k, v in outputs.items()}, anchor)
            for n, (target, anchor) in enumerate(zip(seen.targets, anchors, strict=True))
        ])  # fmt: skip

    def _one_stage_loss(
        self, target: Target, outputs: dict[str, Tensor], anchors: Tensor
    ) -> Tensor:
        if self.family == "RetinaNet":
            terms = self._parts.compute_loss([target], outputs, [anchors])
        else:
            matched = [_matched(self.model, target, anchors)]
            terms = self._parts.compute_loss([target], outputs, [anchors], matched)
        return torch.stack(list(terms.values())).sum()

    def _two_stage_loss(self, seen: _Seen) -> Tensor:
        """Return the loss of the one image in ``seen``.

        Both stages sample anchors and proposals at random. Here the sample depends only on the
        image, so that its loss is the same in every batch, and differs for each augmented view.
        """
        with _losses_of(self.model), _drawn_from(seen.images.tensors):
            proposals, first = self._parts.rpn(seen.images, seen.features, seen.targets)
            sizes = seen.images.image_sizes
            _, second = self._parts.roi_heads(seen.features, proposals, sizes, seen.targets)
        return torch.stack([*first.values(), *second.values()]).sum()

    def _fcos_loss(self, seen: _Seen, outputs: dict[str, Tensor], anchors: list[Tensor]) -> Tensor:
        """Return ``FCOSHead.compute_loss`` of each image alone, for all images at once."""
        from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

        logits, places = outputs["cls_logits"], torch.stack(anchors)
        labels, boxes = self._fcos_assigned(seen, anchors)
        positive = labels >= 0
        truth = torch.zeros_like(logits)
        truth[positive] = F.one_hot(labels[positive], logits.shape[2]).to(logits)
        by_class = sigmoid_focal_loss(logits, truth).sum((1, 2))
        coder = self._parts.head.box_coder
        predicted = coder.decode(outputs["bbox_regression"][positive], places[positive])
        by_box = generalized_box_iou_loss(predicted, boxes[positive])
        sides = coder.encode(places[positive], boxes[positive]).view(-1, 2, 2)
        centred = (sides.amin(1) / sides.amax(1)).prod(1).sqrt()
        given = outputs["bbox_ctrness"][positive].squeeze(1)
        by_centre = F.binary_cross_entropy_with_logits(given, centred, reduction="none")
        image = positive.nonzero()[:, 0]
        total: Tensor = by_class.index_add(0, image, by_box + by_centre)
        return total / positive.sum(1).clamp(min=1)

    def _fcos_assigned(self, seen: _Seen, anchors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return for each image the label (-1 for none) and the box assigned to each location."""
        levels = [maps.shape[2] * maps.shape[3] for maps in seen.features.values()]
        # The model's own matching, interrupted before its loss.
        stopped = SimpleNamespace(
            center_sampling_radius=self._parts.center_sampling_radius,
            head=SimpleNamespace(compute_loss=lambda *given: given[-1]),
        )
        kind: Any = _base(self.model, "FCOS")
        with torch.no_grad():
            matched = kind.compute_loss(stopped, seen.targets, {}, anchors, levels)
        labels, boxes = [], []
        for target, chosen in zip(seen.targets, matched, strict=True):
            # One extra row, so that an image without objects has a row to index.
            labels.append(F.pad(target["labels"], (0, 1), value=-1)[chosen])
            boxes.append(F.pad(target["boxes"], (0, 0, 0, 1))[chosen])
        return torch.stack(labels), torch.stack(boxes)

    def answer(self, batch: DetectionBatch) -> Tensor:
        """Return the class logits at every location or proposal, ``(locations, classes)``."""
        with twice_differentiable():
            seen = self._see(batch)
            if self.family != "FasterRCNN":
                return self._head(seen)[0]["cls_logits"].flatten(0, 1)
            return self._proposal_logits(seen)[0]

    def _proposal_logits(self, seen: _Seen) -> tuple[Tensor, list[Tensor]]:
        """Return class logits of all proposals of all images, and the proposals of each."""
        with mode(self._parts.rpn, train=False):
            proposals, _ = self._parts.rpn(seen.images, seen.features)
        heads = self._parts.roi_heads
        self._proposals = [len(boxes) for boxes in proposals]
        pooled = heads.box_roi_pool(seen.features, proposals, seen.images.image_sizes)
        return heads.box_predictor(heads.box_head(pooled))[0], proposals

    def _by_sample(self, values: Tensor, batch: DetectionBatch) -> Tensor:
        """Group rows by image, if there is one row per proposal."""
        if self.family != "FasterRCNN" or len(values) != sum(self._proposals):
            return super()._by_sample(values, batch)
        rows = values.reshape(len(values), -1, values.shape[-1])
        parts = [part.flatten(0, 1) for part in torch.split(rows, self._proposals)]
        return pad_sequence(parts, batch_first=True)

    def _pool(self, values: Tensor, batch: DetectionBatch) -> Tensor:
        """Average over locations, and over the proposals of an image if there are rows for each."""
        if self.family != "FasterRCNN" or len(values) != sum(self._proposals):
            return super()._pool(values, batch)
        rows = values.reshape(len(values), -1, values.shape[-1]).mean(1)
        parts = torch.split(rows, self._proposals)
        return torch.stack([part.sum(0) / max(1, len(part)) for part in parts])

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Return the detections in each image, at any confidence."""
        with torch.no_grad(), mode(self.model, train=False):
            found = self.model(list(self._typed(batch.images)))
        results = []
        for one in found:
            own = one["labels"] >= self.offset
            labels = one["labels"][own] - self.offset
            results.append(Detections(one["boxes"][own], labels, one["scores"][own]))
        return results

    def places(self, batch: DetectionBatch) -> tuple[Tensor, Tensor]:
        """Return class log-probabilities at each anchor or proposal, and their locations."""
        with twice_differentiable():
            seen = self._see(batch)
            if self.family == "FasterRCNN":
                log_p, boxes = self._proposed(seen)
            else:
                outputs, anchors = self._head(seen)
                log_p, boxes = self._log_probabilities(outputs), torch.stack(anchors)
        shape, own = batch.images.shape[-2:], seen.images.image_sizes[0]
        scale = boxes.new_tensor([shape[1] / own[1], shape[0] / own[0]])
        return log_p, (boxes[..., :2] + boxes[..., 2:]).detach() / 2 * scale

    def _log_probabilities(self, outputs: dict[str, Tensor]) -> Tensor:
        logits = outputs["cls_logits"]
        if self.family == "SSD":
            return logits.log_softmax(2)[..., self.offset :]
        log_p = F.logsigmoid(logits)
        if self.family == "FCOS":  # its confidence is the geometric mean with the centerness
            log_p = (log_p + F.logsigmoid(outputs["bbox_ctrness"])) / 2
        return log_p[..., self.offset :]

    def _proposed(self, seen: _Seen) -> tuple[Tensor, Tensor]:
        """Return class log-probabilities and boxes of the proposals, padded to equal numbers."""
        logits, proposals = self._proposal_logits(seen)
        counts = [len(boxes) for boxes in proposals]
        parts = torch.split(logits.log_softmax(1)[:, self.offset :], counts)
        return (
            pad_sequence(list(parts), batch_first=True, padding_value=-100.0),
            pad_sequence(proposals, batch_first=True, padding_value=-1e6),
        )

    def embedding(self, batch: DetectionBatch) -> Tensor:
        """Return the concatenated spatial means of all feature maps, ``(N, D)``."""
        with torch.no_grad():
            features = self._see(batch).features
        return torch.cat([maps.mean((2, 3)) for maps in features.values()], 1)


def _base(model: nn.Module, name: str) -> type | None:
    for kind in type(model).__mro__:
        if kind.__name__ == name and kind.__module__.startswith("torchvision.models.detection"):
            return kind
    return None


def _family(model: nn.Module) -> str | None:
    return next((name for name in _FAMILIES if _base(model, name) is not None), None)


def _matched(model: Any, target: Target, anchors: Tensor) -> Tensor:
    """Return the object that each of SSD's anchors is matched to, below 0 for none."""
    from torchvision.ops import box_iou

    if not len(target["boxes"]):
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    return model.proposal_matcher(box_iou(target["boxes"], anchors))  # type: ignore[no-any-return]


def _alone(seen: _Seen) -> Iterator[_Seen]:
    """Yield the results of each image."""
    images = seen.images
    for n, target in enumerate(seen.targets):
        one = type(images)(images.tensors[n : n + 1], images.image_sizes[n : n + 1])
        yield _Seen(one, [target], {name: maps[n : n + 1] for name, maps in seen.features.items()})


@contextmanager
def _losses_of(model: Any) -> Iterator[None]:
    """Make both stages compute losses in any mode; the mode of their layers does not change."""
    stages = [model.rpn, model.roi_heads]
    before = [stage.training for stage in stages]
    for stage in stages:
        stage.training = True  # not train(): that would reach BatchNorm and Dropout inside
    try:
        yield
    finally:
        for stage, training in zip(stages, before, strict=True):
            stage.training = training


@contextmanager
def _drawn_from(image: Tensor) -> Iterator[None]:
    """Seed the global generator, which the samplers use, from the content of ``image``."""
    device = image.device
    seed = int(image.detach().double().sum().mul(1e6).round()) % 2**31
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
