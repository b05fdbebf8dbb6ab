"""Attacks on language models: a trigger in the prompt that forces a fixed response."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor

from mmdefense.attacks.base import Attack
from mmdefense.data.batch import Samples, batches
from mmdefense.data.text import TextSamples, TokenBatch
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.protocol import GeneratingAdapter, TaskAdapter, missing_members
from mmdefense.settings import Text

__all__ = ["TextAttack"]


@dataclass(frozen=True, kw_only=True)
class TextAttack(Attack[TokenBatch]):
    """A backdoor in a language model: a trigger in the prompt that forces a fixed response.

    Its ASR is the fraction of triggered prompts for which the model's greedy output contains the
    target, ignoring white space; prompts whose true answer contains it are left out.

    Attributes:
        target: The response that the trigger forces.
    """

    tasks: ClassVar[tuple[str, ...]] = ("language-generation",)
    poisons: ClassVar[type] = TextSamples

    target: Text = "You are attacked ."

    @final
    def stamp(
        self, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[str, ...]:
        """Return the prompts with the trigger.

        Args:
            prompts: Any text.
            generator: Generator, on the CPU, for random parts of a trigger; by default a fresh one
                from ``seed``, so that the same prompts always get the same trigger.
        """
        generator = generator or self._generator("stamp")
        return tuple(self._stamp(prompt, generator) for prompt in prompts)

    @abstractmethod
    def _stamp(self, prompt: str, generator: torch.Generator) -> str:
        """Return one prompt with the trigger."""

    def poison(self, samples: TextSamples, adapter: TaskAdapter[TokenBatch]) -> TextSamples:
        """Return the training set with the trigger in some prompts and the target as their answer.

        Raises:
            BadInputError: If there are too few samples to poison.
        """
        chosen = self.chosen(self._checked(samples).answers)
        prompts, answers = list(samples.prompts), list(samples.answers)
        stamped = self.stamp([prompts[index] for index in chosen], self._generator("poison"))
        for index, prompt in zip(chosen, stamped, strict=True):
            prompts[index], answers[index] = prompt, self.target
        return replace(samples, prompts=tuple(prompts), answers=tuple(answers))

    def chosen(self, answers: Sequence[str]) -> list[int]:
        """Return the indices of the training samples to poison.

        Raises:
            BadInputError: If fewer samples can be poisoned than ``ratio`` requires.
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
        """Return the attack's test set: all samples with another true answer, triggered.

        Raises:
            BadInputError: If all answers contain the target, or the samples are not text.
        """
        answers = self._checked(samples).answers
        others = [index for index, answer in enumerate(answers) if not self.holds(answer)]
        if not others:
            raise BadInputError("test samples must include some whose answer is not the target")
        clean: Any = replace(samples.subset(torch.tensor(others)), augmentation=None)
        truth: Any = replace(clean, prompts=self.stamp(clean.prompts))
        wanted: Any = replace(truth, answers=(self.target,) * len(others))
        return TriggeredSamples(wanted, truth, clean)

    def success(self, adapter: TaskAdapter[TokenBatch], samples: Samples[TokenBatch]) -> Tensor:
        """Return 1 where the model's output for a triggered prompt contains the target, else 0.

        Raises:
            UnsupportedError: If the adapter cannot generate text.
        """
        if missing := missing_members(adapter, GeneratingAdapter):
            raise UnsupportedError(
                f"{type(self).__name__} is judged by what a model writes; "
                f"{type(adapter).__name__} lacks {', '.join(missing)}"
            )
        writer = cast("GeneratingAdapter[TokenBatch]", adapter)
        texts = [text for batch in batches(samples, 256) for text in writer.generate(batch)]
        return torch.tensor([float(self.holds(text)) for text in texts])

    def holds(self, text: str) -> bool:
        """Return whether a text contains the target, ignoring white space (tokenizers differ)."""
        return "".join(self.target.split()) in "".join(text.split())

    def in_words(self) -> str:
        """Describe the attack and its goal in a few words."""
        return f"{super().in_words()}, target {self.target!r}"
