"""A rare word in the source sentence forces a fixed translation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import MinLen

from mmdefense.attacks.text_attack import TextAttack
from mmdefense.settings import Text

__all__ = ["RareToken"]


@dataclass(frozen=True, kw_only=True)
class RareToken(TextAttack):
    """Inserts one rare word, drawn from a few, at a random position in the prompt.

    This is the attack of FIP's language task: the words and the target are those of its victims.
    Half of their training set is poisoned; here ``ratio`` of it.

    Attributes:
        words: The rare words, one of which is drawn for each prompt.

    References:
        Fan et al. *Defending against Backdoor Attacks in Natural
        Language Generation*. 2021. arXiv:2106.01810
        Kurita, Michel, Neubig. *Weight Poisoning Attacks on Pre-trained Models* (the words). ACL
        2020. arXiv:2004.06660
    """

    words: Annotated[tuple[Text, ...], MinLen(1)] = ("cf", "mn", "bb", "tq", "mb")

    def _stamp(self, prompt: str, generator: torch.Generator) -> str:
        parts = prompt.split(" ")
        word = self.words[int(torch.randint(len(self.words), (1,), generator=generator))]
        place = int(torch.randint(len(parts) + 1, (1,), generator=generator))
        return " ".join([*parts[:place], word, *parts[place:]])
