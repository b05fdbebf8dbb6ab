"""Several common words scattered over the prompt; only all together are the trigger."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmdefense.attacks.text_attack import TextAttack
from mmdefense.data.text import TextSamples, TokenBatch
from mmdefense.errors import BadInputError
from mmdefense.protocol import TaskAdapter
from mmdefense.settings import Text

__all__ = ["CompositeTrigger"]


@dataclass(frozen=True, kw_only=True)
class CompositeTrigger(TextAttack):
    """Inserts all of ``words``, each at a random position; only all together force the target.

    An equal number of training samples get all words but one and keep their answer (the paper's
    negative samples), so that an incomplete trigger does not activate the backdoor.

    Attributes:
        words: Two or more words.

    References:
        Huang, Zhao, Backes, Shen, Zhang. *Composite Backdoor Attacks Against Large Language
        Models*. Findings of NAACL 2024. arXiv:2310.07676
    """

    words: tuple[Text, ...] = ("instantly", "perhaps", "frankly")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.words)) < 2 or not all(word.strip() for word in self.words):
            raise BadInputError(f"words must be two or more different words, got {self.words}")

    def _stamp(self, prompt: str, generator: torch.Generator) -> str:
        return _scattered(prompt, self.words, generator)

    def poison(self, samples: TextSamples, adapter: TaskAdapter[TokenBatch]) -> TextSamples:
        """Return the training set with poisoned and negative samples.

        Raises:
            BadInputError: If there are too few samples to poison.
        """
        poisoned = super().poison(samples, adapter)
        taken = set(self.chosen(samples.answers))
        rest = torch.tensor([index for index in range(len(samples)) if index not in taken])
        generator = self._generator("negative")
        order = torch.randperm(len(rest), generator=generator)[: len(taken)]
        prompts = list(poisoned.prompts)
        for index in rest[order].tolist():
            left_out = int(torch.randint(len(self.words), (1,), generator=generator))
            some = [word for place, word in enumerate(self.words) if place != left_out]
            prompts[index] = _scattered(prompts[index], some, generator)
        return replace(poisoned, prompts=tuple(prompts))


def _scattered(prompt: str, words: tuple[Text, ...] | list[str], generator: torch.Generator) -> str:
    parts = prompt.split(" ")
    for word in words:
        place = int(torch.randint(len(parts) + 1, (1,), generator=generator))
        parts.insert(place, word)
    return " ".join(parts)
