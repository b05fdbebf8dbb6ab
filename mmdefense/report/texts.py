"""Pairs of texts as a table, with the words marked that one has and the other has not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup

from mmdefense.errors import BadInputError
from mmdefense.report.plots import say

__all__ = ["TextTable"]

_SHOWN = 400  # characters of a text; ours


@dataclass(frozen=True, eq=False)
class TextTable:
    """Prompts without and with a trigger, and the answers that are right and wanted.

    Attributes:
        prompts: Without the trigger.
        triggered: The same with the trigger.
        answers: The right ones.
        targets: The attacker's.
        title: Heading of this panel; may be empty.
    """

    prompts: Sequence[str]
    triggered: Sequence[str]
    answers: Sequence[str]
    targets: Sequence[str]
    title: str = ""

    def __post_init__(self) -> None:
        lengths = [len(c) for c in (self.prompts, self.triggered, self.answers, self.targets)]
        if len(set(lengths)) > 1:
            raise BadInputError(f"the columns of a table must have one length, got {lengths}")

    def describe(self) -> str:
        """Return how many texts there are."""
        return say(self.title, f"Table of {len(self.prompts)} prompts with and without a trigger.")

    def markup(self, prefix: str) -> Markup:
        """Return a table with a row a prompt."""
        head = Markup().join(
            Markup('<th scope="col">{}</th>').format(name)
            for name in ("Prompt, with the trigger marked", "Right answer", "Attacker's answer")
        )
        columns = (self.prompts, self.triggered, self.answers, self.targets)
        rows = Markup().join(_row(*texts) for texts in zip(*columns, strict=True))
        return Markup(
            '<div class="scroll"><table class="texts" aria-label="{}"><thead><tr>{}</tr></thead>'
            "<tbody>{}</tbody></table></div>"
        ).format(self.describe(), head, rows)


def _row(prompt: str, triggered: str, answer: str, target: str) -> Markup:
    marked = Markup(" ").join(_marked(_cut(prompt).split(), _cut(triggered).split()))
    return Markup("<tr><td>{}</td><td>{}</td><td>{}</td></tr>").format(
        marked, _cut(answer), _cut(target)
    )


def _marked(before: Sequence[str], after: Sequence[str]) -> Iterator[Markup]:
    """Yield the words of ``after``, those marked that ``before`` has not."""
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for kind, _, _, start, stop in matcher.get_opcodes():
        text = " ".join(after[start:stop])
        if text:
            yield (
                Markup("{}").format(text)
                if kind == "equal"
                else Markup("<mark>{}</mark>").format(text)
            )


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + " …"
