"""Attacks on classifiers: a trigger on the input that forces a label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from mmdefense.attacks.base import Attack, like, replaced
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.protocol import TaskAdapter
from mmdefense.settings import Whole

__all__ = ["IMAGES_AND_CLIPS", "LabelAttack", "class_count"]

IMAGES_AND_CLIPS = ("image-classification", "video-classification")
"""Tasks of a trigger for images that stamps every frame of a clip alike."""

_CLIP = 5  # axes of a batch of clips
_CHUNK = 1024  # inputs that are stamped at once: bounds the memory of attacks that run a net


@dataclass(frozen=True, kw_only=True)
class LabelAttack(Attack[LabelledBatch]):
    """A backdoor in a classifier: a trigger on the input that forces a label.

    Attributes:
        target: The class that the trigger forces; unused by ``all-to-all``.
        mapping: ``"all-to-one"`` forces ``target``, ``"all-to-all"`` the class after the true one,
            ``(y + 1) mod C``.
    """

    target: Whole = 0
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"

    clean_label: ClassVar[bool] = False
    """Whether only samples of the target are poisoned; ``ratio`` is then a share of these."""

    shapes: ClassVar[Mapping[str, str]] = {
        "image-classification": "(N, C, H, W)",
        "video-classification": "(N, C, T, H, W)",
        "point-cloud-classification": "(N, P, 3 + F)",
    }
    """Shape of a batch of inputs of each task."""

    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    """Range that stamped inputs are clipped to, where the inputs have one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clean_label and self.mapping != "all-to-one":
            raise BadInputError(
                f"mapping of {type(self).__name__} must be all-to-one, for its labels stay true, "
                f"got {self.mapping!r}"
            )

    @final
    def stamp(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a copy of ``inputs`` with the trigger, on their device and within their limits.

        Args:
            inputs: Of the shape of one of the attack's tasks, floating point; images and clips in
                ``[0, 1]``.
            generator: Source, on the CPU, of what is random in a trigger; by default a fresh one
                from ``seed``, so that the same inputs are always stamped alike.

        Raises:
            BadInputError: If the inputs are not of that kind.
        """
        shapes = [self.shapes[task] for task in self.tasks]
        axes = {len(shape.split(",")) for shape in shapes}
        if inputs.ndim not in axes or not inputs.is_floating_point():
            raise BadInputError(
                f"inputs must be floating-point, of shape {' or '.join(shapes)}, got "
                f"{inputs.dtype} of shape {tuple(inputs.shape)}"
            )
        generator = generator or self._generator("stamp")
        is_clip = inputs.ndim == _CLIP
        frames = inputs.transpose(1, 2) if is_clip else inputs
        with torch.no_grad():
            parts = [self._stamp(part, generator) for part in torch.split(frames, _CHUNK)]
            stamped = torch.cat(parts)
        stamped = stamped.transpose(1, 2) if is_clip else stamped
        return (stamped.clamp(*self.limits) if self.limits else stamped).to(inputs.dtype)

    @abstractmethod
    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return inputs with the trigger; values outside the limits are clipped later.

        Args:
            images: Shape ``(N, C, H, W)``, or clips as ``(N, T, C, H, W)``: what serves
                ``(..., C, H, W)`` and draws once for each of N stamps every frame alike. Clouds
                are ``(N, P, 3 + F)``.
            generator: Source of what is random in the trigger.
        """

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Return the class that the attacker wants for each true label, shape ``(N,)``.

        Raises:
            BadInputError: If ``target`` is not one of the ``classes``.
        """
        if self.mapping == "all-to-all":
            return (labels + 1) % classes
        if self.target >= classes:
            raise BadInputError(
                f"target must be one of the {classes} classes, 0..{classes - 1}, got {self.target}"
            )
        return torch.full_like(labels, self.target)

    def poison(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> LabelledSamples:
        """Return the training set with a share of it stamped and relabelled, in the same order.

        Raises:
            BadInputError: If there are too few samples to poison.
        """
        chosen = self.chosen(samples.labels)
        labels = samples.labels.clone()
        labels[chosen] = self.targets(labels[chosen], class_count(adapter))
        generator = self._generator("poison")
        stamped = self.stamp(samples.take(chosen).inputs, generator)
        return replace(samples, inputs=replaced(samples.inputs, chosen, stamped), labels=labels)

    def chosen(self, labels: Tensor) -> Tensor:
        """Return the indices of the training samples that get poisoned, on the labels' device.

        They are ``ratio`` of all samples, drawn from those whose label the attack would change; a
        clean-label attack takes ``ratio`` of the target's samples.

        Args:
            labels: Of the whole training set, shape ``(N,)``.

        Raises:
            BadInputError: If fewer samples can be poisoned than ``ratio`` asks for.
        """
        eligible = self._eligible(labels).nonzero().squeeze(1)
        count = round(self.ratio * (len(eligible) if self.clean_label else len(labels)))
        if count > len(eligible):
            raise BadInputError(
                f"ratio {self.ratio} asks for {count} poisoned samples, but only {len(eligible)} "
                f"of {len(labels)} have another label than the target; lower the ratio"
            )
        order = torch.randperm(len(eligible), generator=self._generator("choice"))
        return eligible[order[:count].to(eligible.device)]

    def _eligible(self, labels: Tensor) -> Tensor:
        if self.mapping == "all-to-all":
            return torch.ones_like(labels, dtype=torch.bool)
        return (labels == self.target) == self.clean_label

    def triggered(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> TriggeredSamples[LabelledBatch]:
        """Return the test set of the attack: all that are not of the target, stamped.

        Args:
            samples: Clean test samples; their augmentation is left out.
            adapter: Whose classes they are.

        Raises:
            BadInputError: If all samples are of the target.
        """
        targets = self.targets(samples.labels, class_count(adapter))
        others = (samples.labels != targets).nonzero().squeeze(1)
        if not len(others):
            raise BadInputError("test samples must include some that are not of the target class")
        clean = replace(samples.subset(others), augmentation=None)
        stamped = self.stamp(clean.everything().inputs)
        truth = replace(clean, inputs=like(clean.inputs, stamped))
        return TriggeredSamples(replace(truth, labels=targets[others]), truth, clean)

    def in_words(self) -> str:
        """Return the attack and its aim in a few words."""
        aim = f"target {self.target}" if self.mapping == "all-to-one" else self.mapping
        return f"{super().in_words()}, {aim}"


def class_count(adapter: TaskAdapter[Any]) -> int:
    """Return the number of classes C, from the chance level 1/C."""
    return round(1 / adapter.chance)
