"""Texts without and with the trigger of an attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdefense.plots.base import Plot
from mmdefense.plots.texts import TextTable

__all__ = ["TriggeredTexts"]


@dataclass(frozen=True, eq=False)
class TriggeredTexts(Plot):
    """Prompts without and with the trigger, and the answers to both.

    Attributes:
        prompts: Without the trigger.
        triggered: The same with the trigger.
        answers: The right ones.
        targets: The attacker's.
    """

    prompts: Sequence[str]
    triggered: Sequence[str]
    answers: Sequence[str]
    targets: Sequence[str]

    title = "The trigger"
    caption = (
        "Each row is one test sample without and with the trigger, whose words are marked. A "
        "model with a working backdoor gives the attacker's answer to every prompt that "
        "carries the trigger."
    )
    wide = True

    def panels(self) -> list[TextTable]:
        """Return the table of the texts."""
        return [TextTable(self.prompts, self.triggered, self.answers, self.targets)]
