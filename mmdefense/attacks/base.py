"""What every attack on image classifiers shares: whom it poisons, how it relabels and plants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from mmdefense.batches import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import Training, train
from mmdefense.kernels.run import Run
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.protocol import TaskAdapter

__all__ = ["Attack", "class_count", "on_device_of", "replaced"]

_CHUNK = 1024  # images that are stamped at once: bounds the memory of attacks that run a net


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A backdoor: a trigger, the answer that it forces, and how it gets into a model.

    Its fields are its whole configuration, and ``fitted`` is what planting has learnt, so that
    ``replace(attack, fitted=kept)`` brings a planted attack back.

    Attributes:
        target: The class that the trigger forces; unused by ``all-to-all``.
        ratio: Share of the training set that is poisoned, in ``[0, 1]``.
        mapping: ``"all-to-one"`` forces ``target``, ``"all-to-all"`` the class after the true one,
            ``(y + 1) mod C``.
        seed: Fixes the trigger and the choice of the samples.
        fitted: Tensors that :meth:`plant` has learnt, by name; empty where a trigger is fixed.
    """

    target: int = 0
    ratio: float = 0.1
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    seed: int = 0
    fitted: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    clean_label: ClassVar[bool] = False
    """Whether only samples of the target are poisoned; ``ratio`` is then a share of these."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise BadInputError(f"ratio must lie in [0, 1], got {self.ratio}")
        if self.target < 0:
            raise BadInputError(f"target must be a class, at least 0, got {self.target}")
        known = ("all-to-one",) if self.clean_label else ("all-to-one", "all-to-all")
        if self.mapping not in known:
            raise BadInputError(
                f"mapping of {type(self).__name__} must be {' or '.join(known)}, "
                f"got {self.mapping!r}"
            )

    @final
    def stamp(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a copy of ``inputs`` with the trigger, on their device and in ``[0, 1]``.

        Args:
            inputs: Images in ``[0, 1]``, shape ``(N, C, H, W)``, floating point.
            generator: Source, on the CPU, of what is random in a trigger; by default a fresh one
                from ``seed``, so that the same images are always stamped alike.

        Raises:
            BadInputError: If the inputs are not such images.
        """
        if inputs.ndim != 4 or not inputs.is_floating_point():
            raise BadInputError(
                "inputs must be floating-point images of shape (N, C, H, W), got "
                f"{inputs.dtype} of shape {tuple(inputs.shape)}"
            )
        generator = generator or self._generator("stamp")
        with torch.no_grad():
            parts = [self._stamp(part, generator) for part in torch.split(inputs, _CHUNK)]
            return torch.cat(parts).clamp(0, 1).to(inputs.dtype)

    @abstractmethod
    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``images`` with the trigger; values outside ``[0, 1]`` are clipped later."""

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

    def poison(self, samples: LabelledSamples, classes: int) -> LabelledSamples:
        """Return the training set with a share of it stamped and relabelled, in the same order.

        Raises:
            BadInputError: If there are too few samples to poison.
        """
        chosen = self.chosen(samples.labels)
        labels = samples.labels.clone()
        labels[chosen] = self.targets(labels[chosen], classes)
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

    def triggered(self, samples: LabelledSamples, classes: int) -> TriggeredSamples[LabelledBatch]:
        """Return the test set of the attack: all that are not of the target, stamped.

        Args:
            samples: Clean test samples; their augmentation is left out.
            classes: Number of classes C.

        Raises:
            BadInputError: If all samples are of the target.
        """
        targets = self.targets(samples.labels, classes)
        others = (samples.labels != targets).nonzero().squeeze(1)
        if not len(others):
            raise BadInputError("test samples must include some that are not of the target class")
        clean = replace(samples.subset(others), augmentation=None)
        stamped = self.stamp(clean.everything().inputs)
        truth = replace(clean, inputs=_like(clean.inputs, stamped))
        return TriggeredSamples(replace(truth, labels=targets[others]), truth, clean)

    def plant(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> Self:
        """Train ``adapter.model`` in place so that it learns its task and the backdoor.

        Args:
            adapter: The model to become a victim.
            samples: The clean training set.
            training: Steps, rates and modes.
            run: Seed, progress and store.

        Returns:
            The attack to stamp with: this one, or a fitted copy where planting shapes the trigger.
        """
        samples = on_device_of(adapter, samples)
        poisoned = self.poison(samples, class_count(adapter))
        train(adapter, adapter.samples(poisoned), training, run, stage="victim")
        return self

    def _learnt(self, name: str) -> Tensor:
        """Return a tensor that :meth:`plant` has learnt."""
        if name not in self.fitted:
            raise BadInputError(
                f"{type(self).__name__} learns its trigger from a model and has none yet; use the "
                "attack that plant() returns"
            )
        return self.fitted[name]

    def _generator(self, name: str) -> torch.Generator:
        """Return a fresh generator on the CPU, so that each device draws the same numbers."""
        return Run(self.seed).generator(name)


def class_count(adapter: TaskAdapter[Any]) -> int:
    """Return the number of classes C, from the chance level 1/C."""
    return round(1 / adapter.chance)


def on_device_of(adapter: TaskAdapter[LabelledBatch], samples: LabelledSamples) -> LabelledSamples:
    """Return the samples where the model is, after the adapter has checked them."""
    adapter.samples(samples)
    return samples.to(next(adapter.model.parameters()).device)


def replaced(inputs: Tensor, indices: Tensor, images: Tensor) -> Tensor:
    """Return a copy of ``inputs`` with ``images`` at ``indices``, in the type of ``inputs``."""
    copy = inputs.clone()
    copy[indices] = _like(inputs, images)
    return copy


def _like(inputs: Tensor, images: Tensor) -> Tensor:
    """Return images in ``[0, 1]`` in the type and range of ``inputs``: 8 bits stay 8 bits."""
    if inputs.dtype == torch.uint8:
        return (images * 255).round().to(torch.uint8)
    return images.to(inputs.dtype)
