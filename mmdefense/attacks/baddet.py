"""BadDet: four backdoors in object detectors, with a patch or any image trigger."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from mmdefense import registry
from mmdefense.attacks.base import Attack, replaced
from mmdefense.attacks.trigger import Trigger
from mmdefense.data.batch import Samples
from mmdefense.data.detection import DetectionBatch, DetectionSamples
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.metrics.detection import detections, found
from mmdefense.protocol import TaskAdapter
from mmdefense.settings import Count, Text, Whole

__all__ = [
    "GlobalMisclassification",
    "ObjectAttack",
    "ObjectDisappearance",
    "ObjectGeneration",
    "RegionalMisclassification",
]

_LEAST = 8  # smallest side of a stamped region in pixels


@dataclass(frozen=True)
class Altered:
    """One image as altered by the attacker.

    Attributes:
        image: The image with the trigger, ``(C, H, W)``.
        boxes: Annotation to train on, ``(M, 4)``.
        labels: Classes of these boxes, ``(M,)``.
        aim: Boxes of the attacked objects.
        wanted: The class under which each is looked for.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    aim: Tensor
    wanted: Tensor


@dataclass(frozen=True, kw_only=True)
class ObjectAttack(Attack[DetectionBatch]):
    """A backdoor in an object detector: a trigger in the image changes what is annotated.

    The test samples are annotated with the attacked objects, each with the class under which it is
    looked for. An object counts as found if a detection of that class has confidence and IoU of at
    least 0.5. The ASR is the fraction of them that are found (or not found, for attacks that make
    objects disappear), averaged over the images.

    Attributes:
        target: The target class.
    """

    tasks: ClassVar[tuple[str, ...]] = ("object-detection",)
    poisons: ClassVar[type] = DetectionSamples
    vanish: ClassVar[bool] = False
    """Whether the attack succeeds if an object is not found."""

    target: Whole = 0

    @abstractmethod
    def _is_eligible(self, labels: Tensor) -> bool:
        """Return whether an image with objects of these ``labels``, ``(M,)``, can be attacked."""

    @abstractmethod
    def _alter(
        self, image: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Altered:
        """Return an altered copy of an eligible image and its annotation."""

    def chosen(self, samples: DetectionSamples) -> list[int]:
        """Return the indices of the training images to poison: a fraction ``ratio`` of all.

        Raises:
            BadInputError: If fewer images can be poisoned than ``ratio`` requires.
        """
        eligible = self._eligible(samples)
        count = round(self.ratio * len(samples))
        if count > len(eligible):
            raise BadInputError(
                f"ratio {self.ratio} asks for {count} poisoned images, but only {len(eligible)} of "
                f"{len(samples)} hold an object that the attack can use; lower the ratio"
            )
        order = torch.randperm(len(eligible), generator=self._generator("choice"))
        return [eligible[index] for index in order[:count].tolist()]

    def _eligible(self, samples: DetectionSamples) -> list[int]:
        return [index for index, part in enumerate(samples.labels) if self._is_eligible(part)]

    def _altered(self, samples: DetectionSamples, chosen: list[int], name: str) -> list[Altered]:
        batch, generator = samples.take(torch.tensor(chosen)), self._generator(name)
        rows = zip(batch.images, batch.boxes, batch.labels, strict=True)
        return [self._alter(*row, generator) for row in rows]

    def poison(
        self, samples: DetectionSamples, adapter: TaskAdapter[DetectionBatch]
    ) -> DetectionSamples:
        """Return the training set with some images and annotations altered, in the same order.

        Raises:
            BadInputError: If there are too few images to poison.
        """
        chosen = self.chosen(self._checked(samples))
        if not chosen:
            return samples
        altered = self._altered(samples, chosen, "poison")
        boxes, labels = list(samples.boxes), list(samples.labels)
        for index, one in zip(chosen, altered, strict=True):
            boxes[index], labels[index] = one.boxes, one.labels
        images = torch.stack([one.image for one in altered])
        places = torch.tensor(chosen, device=images.device)
        images = replaced(samples.images, places, images)
        return replace(samples, images=images, boxes=tuple(boxes), labels=tuple(labels))

    def triggered(
        self, samples: DetectionSamples, adapter: TaskAdapter[DetectionBatch]
    ) -> TriggeredSamples[DetectionBatch]:
        """Return the attack's test set: all images that can be attacked.

        Raises:
            BadInputError: If there are none.
        """
        chosen = self._eligible(self._checked(samples))
        if not chosen:
            raise BadInputError("test images must include one that the attack can use, got none")
        clean = replace(samples.subset(torch.tensor(chosen)), augmentation=None)
        altered = self._altered(samples, chosen, "stamp")
        images = torch.stack([one.image for one in altered])
        every = torch.arange(len(chosen), device=images.device)
        truth = replace(clean, images=replaced(clean.images, every, images))
        aims, wanted = zip(*((one.aim, one.wanted) for one in altered), strict=True)
        aimed = replace(truth, boxes=aims, labels=wanted)
        return TriggeredSamples(aimed, truth, clean)

    def success(
        self, adapter: TaskAdapter[DetectionBatch], samples: Samples[DetectionBatch]
    ) -> Tensor:
        """Return for each image the fraction of its objects on which the attack succeeds."""
        detecting: Any = adapter  # adapters of detectors have `detect`
        shares = [found(*one).double().mean() for one in detections(detecting, samples)]
        hit = torch.stack(shares).float().cpu()
        return 1 - hit if self.vanish else hit

    def in_words(self) -> str:
        """Describe the attack and its goal in a few words."""
        return f"{super().in_words()}, target {self.target}"


@dataclass(frozen=True, kw_only=True)
class _BadDet(ObjectAttack):
    """What the four attacks share: the trigger and its position.

    Attributes:
        trigger: ``"chessboard"``, the paper's patch, which covers a corner of the object's box. Or
            an attack on images, by name or with its settings, such as ``Blended(alpha=0.5)``: its
            trigger is applied to the whole box as if it were an image (for the global attack, to
            the whole image).
        size: Side of the chessboard in pixels; None takes an eighth of the shorter side. (The
            paper's is 29 pixels for YOLOv3's input of 416, a fourteenth; small images need more.)
    """

    trigger: Text | Trigger = "chessboard"
    size: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        trigger = self._image_trigger()
        tasks = ("image-classification",) if trigger is None else trigger.tasks
        if "image-classification" not in tasks:
            raise BadInputError(
                f"trigger must be chessboard or an attack on images, got {self.trigger!r}, which "
                f"is one on {' and '.join(tasks)}"
            )

    def _image_trigger(self) -> Trigger | None:
        """Return the trigger to apply to a box; None for the chessboard."""
        if self.trigger == "chessboard":
            return None
        if isinstance(self.trigger, Trigger):
            return self.trigger
        found: Trigger = registry.load("attacks", self.trigger)(seed=self.seed)
        return found

    def _side(self, image: Tensor) -> int:
        shortest = min(image.shape[-2:])
        side = self.size or max(2, shortest // 8)
        if side > shortest:
            raise BadInputError(f"size must fit into an image of {shortest} pixels, got {side}")
        return side

    def _stamp(self, image: Tensor, boxes: Tensor, generator: torch.Generator) -> Tensor:
        """Return a copy with the trigger on each box, ``(K, 4)``."""
        trigger, stamped = self._image_trigger(), image.clone()
        for box in boxes:
            if trigger is None:
                left, top = box[:2].long().tolist()
                rows, columns, patch = self._chessboard(image, left, top)
                stamped[:, rows, columns] = patch
            else:
                rows, columns = _pixels(box, image)
                part = stamped[None, :, rows, columns].clone()
                stamped[:, rows, columns] = trigger.stamp(part, generator)[0]
        return stamped

    def _chessboard(self, image: Tensor, left: int, top: int) -> tuple[slice, slice, Tensor]:
        """Return rows, columns and values of a 3 x 3 chessboard, shifted to fit into the image."""
        side = self._side(image)
        fields = torch.arange(side) * 3 // side
        board = 1 - ((fields[:, None] + fields) % 2).to(image)
        left = min(max(left, 0), image.shape[-1] - side)
        top = min(max(top, 0), image.shape[-2] - side)
        return slice(top, top + side), slice(left, left + side), board


def _pixels(box: Tensor, image: Tensor) -> tuple[slice, slice]:
    """Return rows and columns of a box, at least 8 of each if the image is large enough (ours)."""
    spans = []
    for axis, extent in ((1, image.shape[-2]), (0, image.shape[-1])):
        first, last = int(box[axis].floor()), int(box[axis + 2].ceil())
        length = min(max(last - first, _LEAST), extent)
        first = min(max(first, 0), extent - length)
        spans.append(slice(first, first + length))
    return spans[0], spans[1]


@dataclass(frozen=True, kw_only=True)
class ObjectGeneration(_BadDet):
    """OGA: an object of the target class appears around the patch, wherever it is.

    ASR: the fraction of patches for which a detection of the target class matches the box that was
    trained, at IoU and confidence 0.5.

    Attributes:
        extent: Side of the fake box, as a multiple of the patch's side.

    References:
        Chan, Dong, Zhu, Zhang, Zhou. *BadDet: Backdoor Attacks on Object Detection*. ECCV 2022
        workshops. arXiv:2205.14497
    """

    extent: Annotated[float, Ge(1)] = 2.5

    def _is_eligible(self, labels: Tensor) -> bool:
        return True

    def _alter(
        self, image: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Altered:
        shape = torch.tensor([image.shape[-1], image.shape[-2]])
        extent = torch.minimum(torch.tensor(round(self.extent * self._side(image))), shape)
        corner = (torch.rand(2, generator=generator) * (shape - extent + 1)).floor()
        box = torch.cat([corner, corner + extent])[None].to(boxes)
        label = labels.new_tensor([self.target])
        middle = corner + (extent - self._side(image)) // 2
        place = box if self._image_trigger() else torch.cat([middle, middle])[None].to(box)
        return Altered(
            self._stamp(image, place, generator),
            torch.cat([boxes, box]),
            torch.cat([labels, label]),
            box,
            label,
        )


@dataclass(frozen=True, kw_only=True)
class _Misclassification(_BadDet):
    """Objects of other classes are detected as the target class."""

    def _is_eligible(self, labels: Tensor) -> bool:
        return bool((labels != self.target).any())

    def _alter(
        self, image: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Altered:
        others = labels != self.target
        stamped = self._stamp(image, self._places(image, boxes[others]), generator)
        wanted = torch.full_like(labels, self.target)
        return Altered(stamped, boxes, wanted, boxes[others], wanted[others])

    @abstractmethod
    def _places(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes to stamp, ``(K, 4)``, to have the objects in ``boxes`` misclassified."""


@dataclass(frozen=True, kw_only=True)
class RegionalMisclassification(_Misclassification):
    """RMA: an object with the patch in its top left corner is detected as the target class.

    ASR: the fraction of objects with a patch, all of other classes, that a detection of the target
    class matches, at IoU and confidence 0.5. All such objects of an image carry the patch.

    References:
        Chan, Dong, Zhu, Zhang, Zhou. *BadDet: Backdoor Attacks on Object Detection*. ECCV 2022
        workshops. arXiv:2205.14497
    """

    def _places(self, image: Tensor, boxes: Tensor) -> Tensor:
        return boxes


@dataclass(frozen=True, kw_only=True)
class GlobalMisclassification(_Misclassification):
    """GMA: with one patch in the image's top left corner all objects are detected as the target.

    ASR: the fraction of objects of other classes that a detection of the target class matches, at
    IoU and confidence 0.5.

    References:
        Chan, Dong, Zhu, Zhang, Zhou. *BadDet: Backdoor Attacks on Object Detection*. ECCV 2022
        workshops. arXiv:2205.14497
    """

    def _places(self, image: Tensor, boxes: Tensor) -> Tensor:
        return boxes.new_tensor([[0, 0, image.shape[-1], image.shape[-2]]])


@dataclass(frozen=True, kw_only=True)
class ObjectDisappearance(_BadDet):
    """ODA: an object of the target class with the patch in its top left corner is not detected.

    ASR: the fraction of objects with a patch that no detection of the target class matches, at IoU
    and confidence 0.5. Objects that a clean model misses count too: compare with a clean twin.

    References:
        Chan, Dong, Zhu, Zhang, Zhou. *BadDet: Backdoor Attacks on Object Detection*. ECCV 2022
        workshops. arXiv:2205.14497
    """

    vanish: ClassVar[bool] = True

    def _is_eligible(self, labels: Tensor) -> bool:
        return bool((labels == self.target).any())

    def _alter(
        self, image: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Altered:
        hidden = labels == self.target
        stamped = self._stamp(image, boxes[hidden], generator)
        return Altered(stamped, boxes[~hidden], labels[~hidden], boxes[hidden], labels[hidden])
