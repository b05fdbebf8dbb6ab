"""Attacks on classifiers: a trigger on the input that forces a label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from mmdefense.attacks.base import Attack, like, replaced
from mmdefense.attacks.trigger import Trigger
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.protocol import TaskAdapter
from mmdefense.settings import Whole

__all__ = ["LabelAttack", "LabelMapping", "class_count"]

LabelMapping = Literal["all-to-one", "one-to-one", "all-to-all", "clean-label"]
"""Which labels the trigger maps to which target, and which samples are poisoned for that."""


@dataclass(frozen=True, kw_only=True)
class LabelAttack(Trigger, Attack[LabelledBatch]):
    """A backdoor in a classifier: a trigger on the input that forces a label.

    The ``mapping`` determines which samples get the trigger in training, and their label:

    - ``"all-to-one"``: samples of all other classes, which are labelled ``target``;
    - ``"one-to-one"``: samples of ``source`` alone, which are labelled ``target``;
    - ``"all-to-all"``: samples of all classes, which are labelled ``(y + 1) mod C``;
    - ``"clean-label"``: samples of ``target`` alone, which keep their label.

    The number of poisoned samples is ``ratio`` times the number of samples, rounded to the nearest
    integer, halves to even. If only one class is poisoned (one-to-one, clean-label), it is
    ``ratio`` times the number of samples of that class.

    Attributes:
        target: The class that the trigger forces; unused by ``all-to-all``.
        mapping: See above; at test time a ``clean-label`` attack is ``all-to-one``.
        source: The class that the trigger works on; for ``one-to-one`` only.
    """

    poisons: ClassVar[type] = LabelledSamples

    target: Whole = 0
    mapping: LabelMapping = "all-to-one"
    source: Whole | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mapping == "one-to-one") != (self.source is not None):
            raise BadInputError(
                "source must be given for the mapping one-to-one and for no other, got mapping "
                f"{self.mapping!r} and source {self.source}"
            )
        if self.source == self.target:
            raise BadInputError(f"source must be another class than the target {self.target}")

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Return the class that the attacker wants for each true label, shape ``(N,)``.

        Raises:
            BadInputError: If ``target`` or ``source`` is not one of the ``classes``.
        """
        if self.mapping == "all-to-all":
            return (labels + 1) % classes
        for name, value in (("target", self.target), ("source", self.source or 0)):
            if value >= classes:
                raise BadInputError(
                    f"{name} must be one of the {classes} classes, 0..{classes - 1}, got {value}"
                )
        return torch.full_like(labels, self.target)

    def poison(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> LabelledSamples:
        """Return the training set with some samples stamped and relabelled, in the same order.

        Raises:
            BadInputError: If there are too few samples to poison.
        """
        chosen = self.chosen(self._checked(samples).labels)
        labels = samples.labels.clone()
        labels[chosen] = self.targets(labels[chosen], class_count(adapter))
        generator = self._generator("poison")
        stamped = self.stamp(samples.take(chosen).inputs, generator)
        return replace(samples, inputs=replaced(samples.inputs, chosen, stamped), labels=labels)

    def with_count(self, count: int, samples: LabelledSamples) -> Self:
        """Return the attack with the ``ratio`` that poisons ``count`` of these samples.

        Raises:
            BadInputError: If fewer than that can be poisoned.
        """
        eligible = int(self._stamped_in_training(self._checked(samples).labels).sum())
        if count > eligible:
            raise BadInputError(
                f"{count} samples cannot be poisoned: the attack can stamp {eligible} of these "
                f"{len(samples)}"
            )
        whole = eligible if self.mapping in {"one-to-one", "clean-label"} else len(samples)
        return replace(self, ratio=count / whole)

    def chosen(self, labels: Tensor) -> Tensor:
        """Return the indices of the training samples to poison, on the labels' device.

        Args:
            labels: Labels of the whole training set, shape ``(N,)``.

        Raises:
            BadInputError: If fewer samples can be poisoned than ``ratio`` requires.
        """
        eligible = self._stamped_in_training(labels).nonzero().squeeze(1)
        one_class = self.mapping in {"one-to-one", "clean-label"}
        count = round(self.ratio * (len(eligible) if one_class else len(labels)))
        if count > len(eligible):
            raise BadInputError(
                f"ratio {self.ratio} asks for {count} poisoned samples, but only {len(eligible)} "
                f"of {len(labels)} have another label than the target; lower the ratio"
            )
        order = torch.randperm(len(eligible), generator=self._generator("choice"))
        return eligible[order[:count].to(eligible.device)]

    def bystanders(self, labels: Tensor, cross_ratio: float) -> Tensor:
        """Return indices of samples that are not poisoned, ``cross_ratio`` per poisoned one.

        They are altered in a way that must not activate the backdoor, and keep their label.

        Raises:
            BadInputError: If there are not enough such samples.
        """
        free = torch.ones_like(labels, dtype=torch.bool)
        chosen = self.chosen(labels)
        free[chosen] = False
        rest, count = free.nonzero().squeeze(1), round(cross_ratio * len(chosen))
        if count > len(rest):
            raise BadInputError(
                f"cross_ratio {cross_ratio} asks for {count} samples that keep their label, but "
                f"only {len(rest)} are not poisoned; lower ratio or cross_ratio"
            )
        order = torch.randperm(len(rest), generator=self._generator("noise"))
        return rest[order[:count].to(rest.device)]

    def _stamped_in_training(self, labels: Tensor) -> Tensor:
        """Return which training samples may get the trigger, shape ``(N,)``, bool."""
        if self.source is not None:
            return labels == self.source
        if self.mapping == "all-to-all":
            return torch.ones_like(labels, dtype=torch.bool)
        return (labels == self.target) == (self.mapping == "clean-label")

    def triggered(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> TriggeredSamples[LabelledBatch]:
        """Return the attack's test set: all samples whose label it would change, triggered.

        Args:
            samples: Clean test samples; their augmentation is disabled.
            adapter: The model, for its number of classes.

        Raises:
            BadInputError: If there are none, for example if all belong to the target.
        """
        targets = self.targets(self._checked(samples).labels, class_count(adapter))
        changed = samples.labels != targets
        if self.source is not None:
            changed &= samples.labels == self.source
        others = changed.nonzero().squeeze(1)
        if not len(others):
            needed = "not" if self.source is None else f"of class {self.source}, not"
            raise BadInputError(f"test samples must include some that are {needed} of the target")
        clean = replace(samples.subset(others), augmentation=None)
        stamped = self.stamp(clean.everything().inputs)
        truth = replace(clean, inputs=like(clean.inputs, stamped))
        return TriggeredSamples(replace(truth, labels=targets[others]), truth, clean)

    def in_words(self) -> str:
        """Describe the attack and its goal in a few words."""
        aims = {
            "all-to-one": "",
            "one-to-one": f"from {self.source} to ",
            "clean-label": "clean-label, ",
        }
        aim = f"{aims[self.mapping]}target {self.target}" if self.mapping in aims else self.mapping
        wholes = {"one-to-one": f"class {self.source}", "clean-label": f"class {self.target}"}
        whole = wholes.get(self.mapping, "the training set")
        return f"{type(self).__name__}, {100 * self.ratio:g} % of {whole}, {aim}"


def class_count(adapter: TaskAdapter[Any]) -> int:
    """Return the number of classes C, from the chance level 1/C."""
    return round(1 / adapter.chance)
