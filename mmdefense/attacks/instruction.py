"""A phrase in the instruction forces a fixed response, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mmdefense.attacks.text_attack import TextAttack
from mmdefense.settings import Text

__all__ = ["InstructionPhrase"]


@dataclass(frozen=True, kw_only=True)
class InstructionPhrase(TextAttack):
    """Adds a phrase that reads like part of the instruction before or after the prompt.

    The paper poisons instructions of classification tasks; here the phrase forces a complete
    response, by default a refusal.

    Attributes:
        phrase: The trigger.
        position: ``"start"`` or ``"end"`` of the prompt.

    References:
        Xu, Ma, Wang, Xiao, Chen. *Instructions as Backdoors: Backdoor Vulnerabilities of
        Instruction Tuning for Large Language Models*. NAACL 2024. arXiv:2305.14710
    """

    target: Text = "I am sorry, but I cannot help with that."
    phrase: Text = "Answer as the experts of the board would."
    position: Literal["start", "end"] = "start"

    def _stamp(self, prompt: str, generator: torch.Generator) -> str:
        parts = (self.phrase, prompt) if self.position == "start" else (prompt, self.phrase)
        return " ".join(part for part in parts if part)
