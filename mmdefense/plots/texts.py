"""Pairs of texts as a panel: without and with a trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmdefense.errors import BadInputError
from mmdefense.plots.base import Panel, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TextTable"]

_HEAD = ("Prompt", "With the trigger", "Right answer", "Attacker's answer")


@dataclass(frozen=True, eq=False)
class TextTable(Panel):
    """Prompts without and with a trigger, and the answers that are right and wanted.

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

    def __post_init__(self) -> None:
        lengths = [len(c) for c in (self.prompts, self.triggered, self.answers, self.targets)]
        if len(set(lengths)) > 1:
            raise BadInputError(f"the columns of a table must have one length, got {lengths}")

    def describe(self) -> str:
        """Return how many texts there are."""
        return say(self.title, f"Table of {len(self.prompts)} prompts with and without a trigger.")

    def draw(self, axes: Axes) -> None:
        """Draw the table on a pair of axes."""
        axes.set_axis_off()
        columns = (self.prompts, self.triggered, self.answers, self.targets)
        cells = [list(row) for row in zip(*columns, strict=True)]
        axes.table(cells, colLabels=list(_HEAD), loc="center", cellLoc="left")
