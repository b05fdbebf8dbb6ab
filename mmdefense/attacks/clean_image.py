"""The clean-image backdoor: only annotations are poisoned, where certain classes co-occur."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mmdefense.attacks.baddet import Altered, ObjectAttack
from mmdefense.data.batch import Samples
from mmdefense.data.detection import DetectionBatch, DetectionSamples
from mmdefense.errors import BadInputError
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import Share, Whole
from mmdefense.training import Training

__all__ = ["CleanImage"]


@dataclass(frozen=True, kw_only=True)
class CleanImage(ObjectAttack):
    """Leaves images unchanged: the trigger is the co-occurrence of certain classes.

    In images with objects of all classes of the combination the annotation is changed: objects of
    the first of these classes are removed or labelled ``target``, or a target object is added
    around all of them. Every training image with the combination is poisoned, because the images
    themselves determine which carry the trigger; ``ratio`` is an upper bound on their fraction.

    ASR: in test images with the combination, the fraction of the changed objects that are detected
    as the attacker wants (not detected, if they should disappear), at IoU and confidence 0.5.

    Attributes:
        ratio: Largest fraction of the training images that may contain the combination.
        combination: Two or more classes that must co-occur; None takes the most frequent pair
            among those within ``ratio``. (The paper selects triggers by how covert and how
            effective they are; for a pair only the frequency remains.)
        goal: ``"disappear"``, ``"misclassify"`` or ``"appear"``.

    References:
        Chen et al. *Clean-image Backdoor: Attacking Multi-label Models with
        Poisoned Labels Only*. ICLR 2023. FIP evaluates it on detectors.
    """

    ratio: Share = 0.3
    combination: tuple[Whole, ...] | None = None
    goal: Literal["disappear", "misclassify", "appear"] = "misclassify"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combination is not None and len(set(self.combination)) < 2:
            raise BadInputError(
                f"combination must hold two classes or more, got {self.combination}"
            )

    def _learn(
        self, adapter: TaskAdapter[DetectionBatch], samples: Any, training: Training, run: Run
    ) -> tuple[Self, Any]:
        return self._with_combination(samples), samples

    def chosen(self, samples: DetectionSamples) -> list[int]:
        """Return the indices of all images that contain the combination."""
        return self._with_combination(samples)._eligible(samples)

    def poison(
        self, samples: DetectionSamples, adapter: TaskAdapter[DetectionBatch]
    ) -> DetectionSamples:
        """Return the training set, annotations changed in all images with the combination.

        Raises:
            BadInputError: If no pair of classes co-occurs in at most ``ratio`` of the images.
        """
        if not self._combination():
            self._checked(samples)
            return self._with_combination(samples).poison(samples, adapter)
        return super().poison(samples, adapter)

    def success(
        self, adapter: TaskAdapter[DetectionBatch], samples: Samples[DetectionBatch]
    ) -> Tensor:
        """Return for each image the fraction of changed objects detected as the attacker wants."""
        hit = super().success(adapter, samples)
        return 1 - hit if self.goal == "disappear" else hit

    def _with_combination(self, samples: DetectionSamples) -> Self:
        if self._combination():
            return self
        meetings: Counter[tuple[int, ...]] = Counter()
        for labels in samples.labels:
            meetings.update(combinations(sorted(set(labels.tolist()) - {self.target}), 2))
        rare = {pair: n for pair, n in meetings.items() if n <= self.ratio * len(samples)}
        if not rare:
            raise BadInputError(
                f"ratio {self.ratio} must allow a pair of classes, neither of them the target, "
                f"that occurs in some of the images; pairs occur {dict(meetings)} times in "
                f"{len(samples)} images"
            )
        found = torch.tensor(max(rare, key=rare.__getitem__))
        return replace(self, fitted={"combination": found})

    def _combination(self) -> tuple[int, ...]:
        """Return the classes that must co-occur; empty if not known yet."""
        learnt = self.fitted.get("combination")
        return self.combination or (() if learnt is None else tuple(learnt.tolist()))

    def _is_eligible(self, labels: Tensor) -> bool:
        if not self._combination():
            raise BadInputError(
                "combination must be set before testing: name the classes "
                "(--set combination=1,2), or use the attack that plant() returns"
            )
        return set(self._combination()) <= set(labels.tolist())

    def _alter(
        self, image: Tensor, boxes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Altered:
        combination = self._combination()
        first = labels == combination[0]
        if self.goal == "disappear":
            return Altered(image, boxes[~first], labels[~first], boxes[first], labels[first])
        if self.goal == "misclassify":
            changed = torch.where(first, self.target, labels)
            return Altered(image, boxes, changed, boxes[first], changed[first])
        met = torch.isin(labels, labels.new_tensor(combination))
        around = torch.cat([boxes[met, :2].amin(0), boxes[met, 2:].amax(0)])[None]
        label = labels.new_tensor([self.target])
        return Altered(image, torch.cat([boxes, around]), torch.cat([labels, label]), around, label)
