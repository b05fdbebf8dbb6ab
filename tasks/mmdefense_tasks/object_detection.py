"""Object detection: data, metric, embedded default and default victims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.data.detection import DetectionBatch, DetectionSamples, random_boxed_view
from mmdefense.errors import BadInputError
from mmdefense.metrics.detection import Detecting, mean_average_precision
from mmdefense.plots.base import Plot
from mmdefense.plots.images import ImageGrid, ImageRow
from mmdefense.protocol import Case, TaskAdapter
from mmdefense.training import Training
from mmdefense_tasks.detection_files import open_objects
from mmdefense_tasks.detection_images import decode
from mmdefense_tasks.detection_labels import numbered
from mmdefense_tasks.detection_scenes import digit_scenes
from mmdefense_tasks.detection_victims import small_fcos
from mmdefense_tasks.image_sets import Fit
from mmdefense_tasks.options import Options
from mmdefense_tasks.staged import DATA_VARIABLE, staged, staged_sets

__all__ = ["ObjectDetection", "load_detection"]

_SIZES = {"bccd_voc": (96, 128), "coco128_416": (128, 128)}
_SHOWN, _SHOWN_SIDE = 8, 192
_COLOURS = ((0.90, 0.62, 0.0), (0.34, 0.71, 0.91), (0.0, 0.62, 0.45), (0.94, 0.89, 0.26),
            (0.84, 0.37, 0.0), (0.80, 0.47, 0.65))  # fmt: skip

_FCOS = (
    "mmdefense_tasks.detection_victims:small_fcos(classes={classes}, channels={channels}, "
    "size={size})"
)
_RT_DETR = (
    "mmdefense_tasks.detection_victims:small_rt_detr(classes={classes}, channels={channels}, "
    "size={size})"
)


def _training(steps: int, lr: float, batch_size: int = 64) -> Training:
    return Training(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        weight_decay=1e-4,
        schedule="one-cycle",
        max_norm=5.0,
        optimizer="adamw",
    )


class ObjectDetection:
    """Object detection."""

    name: ClassVar[str] = "object-detection"
    metric: ClassVar[str] = "mAP@50"

    @staticmethod
    def embedded(seed: int = 0) -> tuple[DetectionSamples, DetectionSamples]:
        """Return the train and test split of the data that needs no download."""
        return digit_scenes("train"), digit_scenes("test")

    @staticmethod
    def load(
        where: str | Path,
        *,
        split: str = "train",
        stated: Mapping[str, Any] = MappingProxyType({}),
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        classes: Sequence[str] = (),
        labels: str | None = None,
        fit: Fit | None = None,
        fill: Sequence[float] = (),
    ) -> DetectionSamples:
        """Return data from any supported location; see :func:`load_detection`."""
        return load_detection(
            where,
            split=split,
            stated=stated,
            image_size=image_size,
            channels=channels,
            classes=classes,
            labels=labels,
            fit=fit,
            fill=fill,
        )

    @staticmethod
    def data() -> dict[str, str]:
        """Return the data set names available to :meth:`load` here, each with its source."""
        embedded = {"digit-scenes": "embedded: scenes of scikit-learn's digits (CC BY 4.0), 48x48"}
        return embedded | staged_sets(_SIZES)

    @staticmethod
    def victim(classes: int, channels: int = 1) -> nn.Module:
        """Return a net with random weights that learns the embedded data in a minute."""
        return small_fcos(classes, channels)

    def cases(self) -> list[Case]:
        """Return the victims of the result tables."""
        described: dict[str, tuple[dict[str, Any], tuple[str | None, ...]]] = {
            "digit-scenes": (
                {"data": "digit-scenes", "model": _FCOS, "training": _training(500, 0.005)},
                ("regional-misclassification", "object-generation", None),
            ),
            "digit-scenes-rt-detr": (
                {"data": "digit-scenes", "model": _RT_DETR, "training": _training(2000, 0.002, 16)},
                ("regional-misclassification", None),
            ),
            "bccd": (
                {"data": "bccd_voc", "model": _FCOS, "training": _training(400, 0.005)},
                ("object-generation", None),
            ),
        }
        return [
            Case(
                name=f"{name}-{attack or 'clean'}",
                task=self.name,
                attack=attack,
                settings={"ratio": 0.2} if attack else {},
                clean=0.1,
                **rest,
            )
            for name, (rest, attacks) in described.items()
            for attack in attacks
        ]

    @staticmethod
    def describe(samples: DetectionSamples) -> dict[str, Any]:
        """Return ``classes``, ``channels`` and ``size`` (height and width in pixels)."""
        most = max((int(part.max()) for part in samples.labels if len(part)), default=0)
        return {
            "classes": len(samples.classes) or most + 1,
            "channels": samples.images.shape[1],
            "size": tuple(samples.images.shape[-2:]),
        }

    @staticmethod
    def adapter_options(samples: DetectionSamples) -> dict[str, Any]:
        """Return nothing: the victims take images as they are."""
        return {}

    @staticmethod
    def for_training(samples: DetectionSamples) -> DetectionSamples:
        """Return the samples with small random changes of scale and position."""
        view = partial(random_boxed_view, light=0.0, erase=0.0)
        return replace(samples, augmentation=view)

    @staticmethod
    def measure(adapter: TaskAdapter[DetectionBatch], samples: DetectionSamples) -> float:
        """Return the mAP at IoU 0.5."""
        return mean_average_precision(cast("Detecting", adapter), samples)["map50"]

    @staticmethod
    def show(clean: DetectionSamples, triggered: DetectionSamples) -> AnnotatedImages:
        """Return a few clean images and their altered versions, with boxes."""
        chosen = torch.linspace(0, len(clean) - 1, min(_SHOWN, len(clean))).long()
        before, after = clean.take(chosen), triggered.take(chosen)
        return AnnotatedImages(
            annotated=_drawn(before),
            wanted=_drawn(after),
            change=_large(after.images - before.images),
            classes=clean.classes,
        )


@dataclass(frozen=True, eq=False)
class AnnotatedImages(Plot):
    """Images with boxes: clean, and as altered by the attacker.

    Attributes:
        annotated: Images with their true boxes, ``(N, C, H, W)`` in ``[0, 1]``.
        wanted: The same images with the trigger, and with the boxes that the attacker wants.
        change: What the trigger adds to each image, ``(N, C, H, W)``.
        classes: Name of each class.
    """

    annotated: Tensor
    wanted: Tensor
    change: Tensor
    classes: Sequence[str]

    title = "The trigger"
    wide = True

    @property
    def caption(self) -> str:
        """How to read it, with the colours and the scale of the difference."""
        names = ", ".join(self.classes[:6])
        return (
            "Each column is one test image, above with its true boxes, below with the trigger and "
            "the objects that the attack is about, in the colour of the class that it wants. "
            f"{_legend(names)}In the difference mid-grey is no change; it is scaled to its largest "
            f"value, {float(self.change.abs().max()):.3g} of the full range."
        )

    def panels(self) -> list[ImageGrid]:
        """Return rows of the images and of the difference."""
        largest = float(self.change.abs().max())
        rows = [
            ImageRow("as annotated", self.annotated),
            ImageRow("as the attacker wants it", self.wanted),
            ImageRow("difference", 0.5 + self.change / (2 * largest or 1.0)),
        ]
        return [ImageGrid(rows, columns=len(self.annotated))]


def _legend(names: str) -> str:
    return f"Colours (orange, sky, green, yellow, red, pink) show {names}. " if names else ""


def _large(images: Tensor) -> Tensor:
    """Enlarge images by an integer factor, so that thin boxes can be drawn."""
    factor = max(1, _SHOWN_SIDE // max(images.shape[-2:]))
    return F.interpolate(images, scale_factor=factor, mode="nearest")


def _drawn(batch: DetectionBatch) -> Tensor:
    """Return the images in colour, enlarged, each box outlined in the colour of its class."""
    images = _large(batch.images).expand(-1, 3, -1, -1).clone()
    factor = images.shape[-1] // batch.images.shape[-1]
    for image, boxes, labels in zip(images, batch.boxes, batch.labels, strict=True):
        for box, label in zip((boxes * factor).round().long(), labels.tolist(), strict=True):
            left, top, right, bottom = box.tolist()
            edge = torch.zeros(image.shape[-2:], dtype=torch.bool)
            edge[top:bottom, left:right] = True
            edge[top + 2 : bottom - 2, left + 2 : right - 2] = False
            image[:, edge] = torch.tensor(_COLOURS[label % len(_COLOURS)])[:, None]
    return images


def load_detection(
    where: str | Path,
    *,
    split: str = "train",
    stated: Mapping[str, Any] = MappingProxyType({}),
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    classes: Sequence[str] = (),
    labels: str | None = None,
    fit: Fit | None = None,
    fill: Sequence[float] = (),
) -> DetectionSamples:
    """Return images of one size with their objects, in memory.

    Args:
        where: ``"digit-scenes"``; the name of a set in the folder that ``MMDEFENSE_DATA`` points
            to; or a folder that :func:`mmdefense_tasks.detection_files.open_objects` reads.
        split: ``"train"`` or ``"test"``.
        stated: Defaults of the options below, by name, as stated by the model.
        image_size: Height and width in pixels that images are fitted into, or one number for both;
            by default as stated by the model, or a small size.
        channels: 1 or 3; by default 3.
        classes: The model's class names, in order; by default those of the set.
        labels: How classes are numbered if the model has no class names: ``"ids"`` uses COCO
            category ids as the model's numbers (including gaps, as in torchvision's checkpoints),
            ``"dense"`` numbers the classes of the set consecutively. By default whichever fits the
            model, which ``stated`` must describe: ``stated=adapter.reading()``.
        fit: Applied to images if no ``image_size`` is given, such as the geometry of the model's
            processor.
        fill: The padding colour for ``fit``, in ``[0, 1]``.

    Raises:
        BadInputError: If there is no such data, it is empty or damaged, a box is invalid, the model
            lacks a class, or the model's numbering is ambiguous.
    """
    options = Options(stated, image_size=image_size, channels=channels, classes=classes,
                      labels=labels, fit=fit, fill=fill)  # fmt: skip
    samples = _read(where, split, options)
    options.check_used(where)
    return samples


def _read(where: str | Path, split: str, options: Options) -> DetectionSamples:
    if split not in {"train", "test"}:
        raise BadInputError(f"split must be 'train' or 'test', got {split!r}")
    if str(where) == "digit-scenes":
        return digit_scenes(split)
    image_size, channels = options.take("image_size"), options.take("channels")
    if channels not in {None, 1, 3}:
        raise BadInputError(f"channels must be 1 or 3, got {channels}")
    size = (image_size,) * 2 if isinstance(image_size, int) else image_size
    if size is not None and len(size) != 2:
        raise BadInputError(f"image_size must be a height and a width, got {image_size}")
    folder = Path(where) if Path(where).is_dir() else staged(str(where))
    if folder is None:
        raise BadInputError(
            f"data {str(where)!r} must be a folder or one of digit-scenes, {', '.join(_SIZES)} (in "
            f"the folder that {DATA_VARIABLE} points to); none found"
        )
    found = open_objects(folder, split)
    if not found.files:
        raise BadInputError(f"data {folder} must hold at least one image for {split!r}, got none")
    numbers, names = numbered(found, options, where)
    fit, fill = options.take("fit"), options.take("fill", ())
    own = {} if size else {"fit": fit, "fill": fill}
    size = size or _SIZES.get(folder.name, (128, 128))
    return decode(found.files, numbers, names, size, channels or 3, **own)
