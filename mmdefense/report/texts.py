"""Pairs of texts as an HTML table, with the words marked that one has and the other has not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from markupsafe import Markup

from mmdefense.plots.texts import TextTable

__all__ = ["text_markup"]

_SHOWN = 400  # characters of a text; ours


def text_markup(table: TextTable) -> Markup:
    """Return a table with a row a prompt."""
    head = Markup().join(
        Markup('<th scope="col">{}</th>').format(name)
        for name in ("Prompt, with the trigger marked", "Right answer", "Attacker's answer")
    )
    columns = (table.prompts, table.triggered, table.answers, table.targets)
    rows = Markup().join(_row(*texts) for texts in zip(*columns, strict=True))
    return Markup(
        '<div class="scroll"><table class="texts" aria-label="{}"><thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(table.describe(), head, rows)


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
