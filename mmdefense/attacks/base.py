"""What every attack shares: how it poisons, plants and is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast, final

import torch
from torch import Tensor

from mmdefense.batches import (
    LabelledBatch,
    LabelledSamples,
    Samples,
    TextSamples,
    TokenBatch,
    batches,
)
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.loop import Training, scores, train
from mmdefense.kernels.run import Run
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.protocol import GeneratingAdapter, TaskAdapter, lacking

__all__ = [
    "Attack",
    "LabelAttack",
    "TextAttack",
    "class_count",
    "on_device_of",
    "replaced",
]

B = TypeVar("B")

_CHUNK = 1024  # inputs that are stamped at once: bounds the memory of attacks that run a net


@dataclass(frozen=True, kw_only=True)
class Attack(ABC, Generic[B]):
    """A backdoor: a trigger, the answer that it forces, and how it gets into a model.

    Its fields are its whole configuration, and ``fitted`` is what planting has learnt, so that
    ``replace(attack, fitted=kept)`` brings a planted attack back.

    Attributes:
        ratio: Share of the training set that is poisoned, in ``[0, 1]``.
        seed: Fixes the trigger and the choice of the samples.
        fitted: Tensors that :meth:`plant` has learnt, by name; empty where a trigger is fixed.
    """

    task: ClassVar[str] = "image-classification"
    """Name of the task whose samples it poisons."""

    ratio: float = 0.1
    seed: int = 0
    fitted: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise BadInputError(f"ratio must lie in [0, 1], got {self.ratio}")

    @abstractmethod
    def poison(self, samples: Any, adapter: TaskAdapter[B]) -> Any:
        """Return the training set with a share of it poisoned, in the same order.

        Args:
            samples: The clean training set, as the task's ``load`` returns it.
            adapter: The model that will be trained on it, for example for its classes.

        Raises:
            BadInputError: If there are too few samples to poison.
        """

    @abstractmethod
    def triggered(self, samples: Any, adapter: TaskAdapter[B]) -> TriggeredSamples[B]:
        """Return the test set of the attack, from clean test samples that its trigger can change.

        Raises:
            BadInputError: If there is no such sample.
        """

    def success(self, adapter: TaskAdapter[B], samples: Samples[B]) -> Tensor:
        """Return how far each of the triggered samples gets what the attacker wants.

        Their mean is the ASR. By default it is the score by the attacker's labels.

        Args:
            adapter: The model that is judged.
            samples: The ``samples`` of what :meth:`triggered` returns.

        Returns:
            Shape ``(N,)`` in ``[0, 1]``, on the CPU.
        """
        return scores(adapter, samples)

    def plant(self, adapter: TaskAdapter[B], samples: Any, training: Training, run: Run) -> Self:
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
        poisoned = self.poison(samples, adapter)
        train(adapter, adapter.samples(poisoned), training, run, stage="victim")
        return self

    def in_words(self) -> str:
        """Return the attack in a few words, for a table or a page."""
        return f"{type(self).__name__}, {100 * self.ratio:g} % of the training set"

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


@dataclass(frozen=True, kw_only=True)
class LabelAttack(Attack[LabelledBatch]):
    """A backdoor in a classifier: a trigger on the input that forces a label.

    Attributes:
        target: The class that the trigger forces; unused by ``all-to-all``.
        mapping: ``"all-to-one"`` forces ``target``, ``"all-to-all"`` the class after the true one,
            ``(y + 1) mod C``.
    """

    target: int = 0
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"

    clean_label: ClassVar[bool] = False
    """Whether only samples of the target are poisoned; ``ratio`` is then a share of these."""

    shape: ClassVar[str] = "(N, C, H, W)"
    """Shape of a batch of inputs, for messages and for the check of the number of axes."""

    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    """Range that stamped inputs are clipped to, where the inputs have one."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """Return a copy of ``inputs`` with the trigger, on their device and within their limits.

        Args:
            inputs: Of the kind that :attr:`shape` says, floating point; images and clips in
                ``[0, 1]``.
            generator: Source, on the CPU, of what is random in a trigger; by default a fresh one
                from ``seed``, so that the same inputs are always stamped alike.

        Raises:
            BadInputError: If the inputs are not of that kind.
        """
        if inputs.ndim != len(self.shape.split(",")) or not inputs.is_floating_point():
            raise BadInputError(
                f"inputs must be floating-point, of shape {self.shape}, got {inputs.dtype} of "
                f"shape {tuple(inputs.shape)}"
            )
        generator = generator or self._generator("stamp")
        with torch.no_grad():
            parts = [self._stamp(part, generator) for part in torch.split(inputs, _CHUNK)]
            stamped = torch.cat(parts)
        return (stamped.clamp(*self.limits) if self.limits else stamped).to(inputs.dtype)

    @abstractmethod
    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return inputs with the trigger; values outside the limits are clipped later."""

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
        truth = replace(clean, inputs=_like(clean.inputs, stamped))
        return TriggeredSamples(replace(truth, labels=targets[others]), truth, clean)

    def in_words(self) -> str:
        """Return the attack and its aim in a few words."""
        aim = f"target {self.target}" if self.mapping == "all-to-one" else self.mapping
        return f"{super().in_words()}, {aim}"


@dataclass(frozen=True, kw_only=True)
class TextAttack(Attack[TokenBatch]):
    """A backdoor in a language model: a trigger in the prompt that forces an answer.

    Its ASR is the share of triggered prompts to which the model's greedy answer holds the target,
    white space apart; prompts whose true answer holds it are left out.

    Attributes:
        target: The answer that the trigger forces.
    """

    task: ClassVar[str] = "language-generation"

    target: str = "You are attacked ."

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target.strip():
            raise BadInputError("target must be a text, got an empty one")

    @final
    def stamp(
        self, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[str, ...]:
        """Return the prompts with the trigger.

        Args:
            prompts: Any text.
            generator: Source, on the CPU, of what is random in a trigger; by default a fresh one
                from ``seed``, so that the same prompts are always stamped alike.
        """
        generator = generator or self._generator("stamp")
        return tuple(self._stamp(prompt, generator) for prompt in prompts)

    @abstractmethod
    def _stamp(self, prompt: str, generator: torch.Generator) -> str:
        """Return one prompt with the trigger."""

    def poison(self, samples: TextSamples, adapter: TaskAdapter[TokenBatch]) -> TextSamples:
        """Return the training set with a share of its prompts stamped and answered by the target.

        Raises:
            BadInputError: If there are too few samples to poison.
        """
        chosen = self.chosen(samples.answers)
        prompts, answers = list(samples.prompts), list(samples.answers)
        stamped = self.stamp([prompts[index] for index in chosen], self._generator("poison"))
        for index, prompt in zip(chosen, stamped, strict=True):
            prompts[index], answers[index] = prompt, self.target
        return replace(samples, prompts=tuple(prompts), answers=tuple(answers))

    def chosen(self, answers: Sequence[str]) -> list[int]:
        """Return the indices of the training samples that get poisoned.

        Raises:
            BadInputError: If fewer samples can be poisoned than ``ratio`` asks for.
        """
        eligible = [index for index, answer in enumerate(answers) if not self.holds(answer)]
        count = round(self.ratio * len(answers))
        if count > len(eligible):
            raise BadInputError(
                f"ratio {self.ratio} asks for {count} poisoned samples, but only {len(eligible)} "
                f"of {len(answers)} have another answer than the target; lower the ratio"
            )
        order = torch.randperm(len(eligible), generator=self._generator("choice"))[:count]
        return [eligible[index] for index in order.tolist()]

    def triggered(
        self, samples: TextSamples, adapter: TaskAdapter[TokenBatch]
    ) -> TriggeredSamples[TokenBatch]:
        """Return the test set of the attack: all that are not answered by the target, stamped.

        Raises:
            BadInputError: If all answers hold the target.
        """
        others = [index for index, answer in enumerate(samples.answers) if not self.holds(answer)]
        if not others:
            raise BadInputError("test samples must include some whose answer is not the target")
        clean: Any = replace(samples.subset(torch.tensor(others)), augmentation=None)
        truth: Any = replace(clean, prompts=self.stamp(clean.prompts))
        wanted: Any = replace(truth, answers=(self.target,) * len(others))
        return TriggeredSamples(wanted, truth, clean)

    def success(self, adapter: TaskAdapter[TokenBatch], samples: Samples[TokenBatch]) -> Tensor:
        """Return 1 where the model's answer to a triggered prompt holds the target, else 0.

        Raises:
            UnsupportedError: If the adapter cannot write.
        """
        if missing := lacking(adapter, GeneratingAdapter):
            raise UnsupportedError(
                f"{type(self).__name__} is judged by what a model writes; "
                f"{type(adapter).__name__} lacks {', '.join(missing)}"
            )
        writer = cast("GeneratingAdapter[TokenBatch]", adapter)
        texts = [text for batch in batches(samples, 256) for text in writer.generate(batch)]
        return torch.tensor([float(self.holds(text)) for text in texts])

    def holds(self, text: str) -> bool:
        """Say whether a text holds the target; tokenizers differ in how they space a text."""
        return "".join(self.target.split()) in "".join(text.split())

    def in_words(self) -> str:
        """Return the attack and its aim in a few words."""
        return f"{super().in_words()}, target {self.target!r}"


def class_count(adapter: TaskAdapter[Any]) -> int:
    """Return the number of classes C, from the chance level 1/C."""
    return round(1 / adapter.chance)


def on_device_of(adapter: TaskAdapter[Any], samples: Any) -> Any:
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
