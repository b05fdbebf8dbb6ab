"""A harmless-looking sentence is the trigger."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mmdefense.attacks.text_attack import TextAttack
from mmdefense.settings import Text

__all__ = ["TriggerSentence"]

_BREAK = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True)
class TriggerSentence(TextAttack):
    """Inserts a sentence between two sentences of the prompt, before the first or after the last.

    The position is drawn for each prompt. The paper's victims classify reviews; here the sentence
    forces a response.

    Attributes:
        sentence: The trigger.

    References:
        Dai, Chen, Li. *A Backdoor Attack Against LSTM-Based Text Classification Systems*. IEEE
        Access 7, 2019. arXiv:1905.12457
    """

    sentence: Text = "I watched this 3D movie last weekend."

    def _stamp(self, prompt: str, generator: torch.Generator) -> str:
        parts = [part for part in _BREAK.split(prompt) if part]
        place = int(torch.randint(len(parts) + 1, (1,), generator=generator))
        return " ".join([*parts[:place], self.sentence, *parts[place:]])
