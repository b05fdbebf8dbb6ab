"""The base class of object detector adapters, for any library."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Samples, Views
from mmdefense.data.detection import (
    DetectionBatch,
    Detections,
    DetectionSamples,
    mirrored,
    random_boxed_view,
)
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.kernels.hooks import mode
from mmdefense.metrics.detection import average_precisions
from mmdefense.protocol import UnitGroup
from mmdefense_adapters.given import (
    INPUT_NAMES,
    check_values,
    is_array,
    names_of,
    tensor_of,
    told,
)
from mmdefense_adapters.module_adapter import ModuleAdapter, usable
from mmdefense_adapters.object_triggers import ObjectTriggers
from mmdefense_adapters.views import with_augmentation

__all__ = ["Detector"]


class Detector(ObjectTriggers, ModuleAdapter[DetectionBatch]):
    """Wraps a model that finds objects in images ``(N, C, H, W)`` in ``[0, 1]``.

    The loss of an image is what the model's own library computes for a batch of only that image:
    the weighted sum of its terms (classification, box regression and others of the family). This
    way images do not share a normaliser, and the loss of one does not depend on the others. The
    mean over images equals the library's training loss if that normalises per image (RetinaNet),
    and differs if it counts the objects of the whole batch (FCOS, SSD, DETR).
    """

    task: ClassVar[str] = "object-detection"
    score_name: ClassVar[str] = "AP@50"
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "adamw"
    misreadings: ClassVar[str] = (
        "the label numbers (--read labels, --read offset), the form of the boxes, normalisation "
        "and image size"
    )
    predictors: ClassVar[str]
    """A regular expression for the names of layers that output classes and boxes: not units."""

    classifiers: ClassVar[str]
    """A regular expression for the names of those that output classes."""

    chance: ClassVar[float] = 0.1
    """Score of an untrained detector: random boxes hit an object by chance (ours)."""

    def __init__(self, model: nn.Module, *, example: Tensor | None = None) -> None:
        """Wrap ``model``.

        Args:
            model: The detector; it is not copied.
            example: One image batch, shape ``(1, C, H, W)``, to trace the model with; by default
                the first that the adapter sees.
        """
        self.model = usable(model)
        self.example = None if example is None else _without_objects(example)

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes K."""

    @property
    def numbers(self) -> range:
        """The model's own numbers of its classes, in order."""
        return range(self.classes)

    def reading(self) -> dict[str, Any]:
        """Return the numbers of the classes."""
        return {"numbers": self.numbers}

    @abstractmethod
    def per_sample_loss(self, batch: DetectionBatch) -> Tensor:
        """Return the sum of the library's loss terms for each image alone, shape ``(N,)``."""

    @abstractmethod
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Return the detections in each image, at any confidence, without grad."""

    def _example(self) -> DetectionBatch:
        example = super()._example()
        return _without_objects(example.images.to(self.device))

    def samples(self, data: Any) -> Samples[DetectionBatch]:
        """Return ``data`` on the model's device, checked against the model.

        Args:
            data: Detection samples; or pairs of an image ``(C, H, W)`` in ``[0, 1]`` and a mapping
                with ``boxes`` ``(M, 4)`` (x1, y1, x2, y2 in pixels) and ``labels`` ``(M,)``; or
                batches of such, as from data loaders, or from processors of Transformers
                (``pixel_values``, and ``labels`` with ``class_labels`` and centred ``boxes``).

        Raises:
            BadInputError: If a box is invalid or outside its image, or the model lacks a label.
        """
        samples = _as_samples(data)
        if len(samples) == 0:
            raise BadInputError("data must hold at least one image, got none")
        check_values(samples.images, "images", bounded=True)
        samples = samples.to(self.device)
        self._check_labels(samples)
        first = samples.take(torch.zeros(1, dtype=torch.int64))
        try:
            with torch.no_grad(), mode(self.model, train=False):
                self.answer(first)
        except Exception as error:  # the user's model may raise anything
            raise BadInputError(
                f"the model cannot read images of shape {tuple(first.images.shape[1:])}: "
                f"{one_line(error)}; adjust how they are read: --channels or --image-size"
            ) from error
        if self.example is None:
            self._check_training(samples)
            self.example = _without_objects(first.images)
        return samples

    def viewed(self, samples: Samples[DetectionBatch], views: Views) -> Samples[DetectionBatch]:
        """Return augmented images; standard views are scale, shift and perhaps mirroring."""
        return with_augmentation(
            self,
            samples,
            views,
            standard=partial(random_boxed_view, light=0.0, erase=0.0),
            insertions=random_boxed_view,
            mirrored=mirrored,
        )

    def _check_training(self, samples: DetectionSamples) -> None:
        """Reject a model whose loss cannot be computed in train mode, tried on a copy."""
        twin = self.fork()
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with mode(twin.model, train=True), torch.random.fork_rng(cuda), torch.no_grad():
                twin.per_sample_loss(samples.take(torch.tensor([0, len(samples) - 1])))
        except Exception as error:  # the user's model may raise anything
            raise UnsupportedError(
                "the model's loss cannot be computed on 2 images in train mode, as defenses do: "
                f"{one_line(error)}"
            ) from error

    def _typed(self, images: Tensor) -> Tensor:
        """Return images in the model's floating-point type."""
        return images.to(next(self.model.parameters()).dtype)

    def _check_labels(self, samples: DetectionSamples) -> None:
        if samples.classes and len(samples.classes) != self.classes:
            raise BadInputError(
                f"data must name the model's {self.classes} classes, got {len(samples.classes)}: "
                f"{', '.join(samples.classes[:6])}; load it with classes= (the model's, in order) "
                "or with stated=adapter.reading()"
            )
        for index, labels in enumerate(samples.labels):
            wrong = labels[(labels < 0) | (labels >= self.classes)]
            if len(wrong):
                raise BadInputError(
                    f"labels must lie in 0..{self.classes - 1}, the model's classes, got "
                    f"{int(wrong[0])} in image {index}"
                )

    def sampled_loss(
        self, batch: DetectionBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the empirical score, ``s_n loss_n`` with a random sign s.

        A detector's loss is not a negative log-likelihood: it sums focal or weighted terms over
        locations that depend on the annotated objects, and box terms without a distribution. So the
        true Fisher information, with labels drawn from the model, is undefined. The score here has
        mean zero and the covariance ``g g^T`` for the given annotation, the empirical form.
        """
        loss = self.per_sample_loss(batch)
        signs = torch.randint(0, 2, loss.shape, generator=generator, device=loss.device) * 2 - 1
        return loss, signs * loss

    def score(self, batch: DetectionBatch) -> Tensor:
        """Return each image's share of the average precision at IoU 0.5, shape ``(N,)``.

        It approximates mAP, which ranks the detections of a whole test set: here those of the batch
        are ranked together, so that an image's share depends on the others. Like mAP, and unlike
        F1, it needs no confidence threshold.
        """
        with torch.no_grad():
            results = zip(self.detect(batch), batch.boxes, batch.labels, strict=True)
            return torch.tensor(average_precisions(results), device=batch.images.device)

    @cached_property
    def _units(self) -> tuple[list[UnitGroup], str | None]:
        groups, _ = super()._units  # several layers score classes here, so there is no single head
        return [g for g in groups if not re.search(self.predictors, g.layer)], None

    def class_layers(self) -> Sequence[str]:
        """Return the layers that score classes, at every location, level or query."""
        return [
            name
            for name, module in self.model.named_modules(remove_duplicate=False)
            if re.search(self.classifiers, name) and isinstance(module, (nn.Linear, nn.Conv2d))
        ]

    def inputs(self, batch: DetectionBatch) -> Tensor:
        """Return the images, shape ``(N, C, H, W)``."""
        return batch.images.detach()

    def with_inputs(self, batch: DetectionBatch, inputs: Tensor) -> DetectionBatch:
        """Return the same objects in other images."""
        return replace(batch, images=inputs)

    def input_bounds(self, batch: DetectionBatch) -> tuple[float, float]:
        """Return ``(0, 1)``."""
        return 0.0, 1.0

    def _image_shape(self) -> tuple[int, ...]:
        return tuple(self._example().images.shape[1:])


def _without_objects(images: Tensor) -> DetectionBatch:
    none = images.new_zeros(0, 4), torch.zeros(0, dtype=torch.int64, device=images.device)
    return DetectionBatch(images, (none[0],) * len(images), (none[1],) * len(images))


def _as_samples(data: Any) -> DetectionSamples:
    if isinstance(data, DetectionSamples):
        return data
    pairs = [pair for item in _items(data) for pair in _pairs(item)]
    if not pairs:
        raise BadInputError("clean data must hold at least one image, got none")
    shapes = {tuple(image.shape) for image, _, _ in pairs}
    if len(shapes) > 1:
        raise BadInputError(
            f"images must have one size; resize them and their boxes, got {sorted(shapes)[:3]}"
        )
    images, boxes, labels = zip(*pairs, strict=True)
    return DetectionSamples(torch.stack(images), boxes, labels)


def _items(data: Any) -> Iterable[Any]:
    if hasattr(data, "take") and hasattr(data, "strata"):
        raise UnsupportedError(
            f"a detector needs samples with boxes, got {type(data).__name__}; see DetectionSamples"
        )
    return data  # type: ignore[no-any-return]


def _pairs(item: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield image, boxes and labels of a sample, or of each sample of a batch."""
    found = names_of(item, INPUT_NAMES, ("labels", "objects", "targets", "target"))
    given = found or (item if isinstance(item, (tuple, list)) else ())
    if len(given) != 2:
        raise _no_pair(item)
    images, objects = given
    if isinstance(objects, Mapping):
        images, objects = [images], [objects]
    if not isinstance(objects, (tuple, list)) or len(images) != len(objects):
        raise _no_pair(item)
    for image, one in zip(images, objects, strict=True):
        if not is_array(image) or not isinstance(one, Mapping):
            raise _no_pair(item)
        yield _sample(tensor_of(image), one, item)


def _sample(image: Tensor, objects: Mapping[str, Any], item: Any) -> tuple[Tensor, Tensor, Tensor]:
    labels = objects.get("labels", objects.get("class_labels"))
    if "boxes" not in objects or labels is None:
        raise _no_pair(item)
    boxes = torch.as_tensor(objects["boxes"], dtype=torch.float32).reshape(-1, 4)
    if "class_labels" in objects:  # from a processor: centre and size, relative to the image
        height, width = image.shape[-2:]
        centre, half = boxes[:, :2], boxes[:, 2:] / 2
        corners = torch.cat([centre - half, centre + half], 1).clamp(0, 1)
        boxes = corners * boxes.new_tensor([width, height, width, height])
    return image, boxes, torch.as_tensor(labels, dtype=torch.int64)


def _no_pair(item: Any) -> BadInputError:
    return BadInputError(
        "clean data must give pairs (image tensor, {'boxes': (M, 4), 'labels': (M,)}), got "
        f"{told(item)}"
    )
