"""What a model card says about a purification, in a section of its own."""

from __future__ import annotations

import re
from pathlib import Path

from mmdefense.report.formats import percent, points
from mmdefense.report.front_matter import with_entries
from mmdefense.report.record import PurificationRecord
from mmdefense.report.verdict import limits, verdict

__all__ = ["card_section", "clear_card", "write_card"]

_START, _END = "<!-- mmdefense: begin -->", "<!-- mmdefense: end -->"
_SECTION = re.compile(rf"\n*{re.escape(_START)}.*?{re.escape(_END)}\n*", re.DOTALL)

_TEXT = """\
{start}
## Purified with mmdefense

The weights of this model were changed by the backdoor purification {method} of mmdefense {version},
with {samples:,} clean samples, in {when}. Architecture, names, shapes and types are as they were.
What this card says outside this section came with the given model, and was not checked.
{reference}
| on held-out clean samples | before | after |
|---|--:|--:|
{rows}

{headline}

**To verify** that these are the files that were written, in the model's folder:

```bash
jq -r '.subject[] | "\\(.digest.sha256)  \\(.name)"' purification.json | sha256sum --check
```

`purification.json` is an in-toto statement: it also has the digests of the files that were given,
all settings, seeds and versions, so that the purification can be repeated. `report.html` shows it.

**What this does not claim.** {limits}
{end}
"""


_TAGS = ("mmdefense", "backdoor-defense")


def write_card(record: PurificationRecord, path: Path, base_model: str = "") -> None:
    """Append the section to a model card, or replace the one that is there; the rest stays.

    Its front matter gets tags and the base model.

    Args:
        record: What is known.
        path: The model card; made where there is none.
        base_model: The id on the hub of the given model; empty where it is of no hub.
    """
    before = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
    card = _with_section(with_entries(before, _TAGS, base_model), card_section(record))
    path.write_bytes(card.encode("utf-8", "surrogateescape"))


def clear_card(path: Path) -> None:
    """Take a section of ours out of a model card that came with a model, for it is of others."""
    before = path.read_bytes() if path.is_file() else b""
    kept = _SECTION.sub("\n\n", before.decode("utf-8", "surrogateescape")).rstrip() + "\n"
    if _START.encode() in before:
        path.write_bytes(kept.encode("utf-8", "surrogateescape"))


def _with_section(card: str, section: str) -> str:
    kept = _SECTION.sub("\n\n", card).rstrip()
    return f"{kept}\n\n{section}" if kept else section


def card_section(record: PurificationRecord) -> str:
    """Return the section as Markdown: what was done, rates, how to verify, the limits."""
    reference = record.defense.reference
    return _TEXT.format(
        start=_START,
        end=_END,
        method=_code(record.defense.name),
        version=_plain(record.provenance.versions.get("mmdefense", "")),
        samples=record.data.samples,
        when=_plain(record.provenance.created[:10]),
        reference=f"The method: {_plain(reference)}\n" if reference else "",
        rows="\n".join(_rows(record)),
        headline=_plain(verdict(record).headline),
        limits=_plain(" ".join(limits(record))),
    )


def _rows(record: PurificationRecord) -> list[str]:
    guard = record.guard
    rows = [f"| {_plain(guard.metric)} | {percent(guard.before)} | {percent(guard.after)} |"]
    if record.attack is not None:
        before, after = record.attack.before.asr, record.attack.after.asr
        name = _plain(record.attack.attack)
        rows.append(f"| success rate of {name} | {percent(before)} | {percent(after)} |")
    for one in record.evaluations:
        if one.retuning is not None:
            name = f"success rate after retuning on {one.retuning.poisoned} poisoned samples"
            twin = one.retuning.twin
            beside = f"a clean twin: {percent(twin[-1].asr)}" if twin else "no clean twin"
            rate = percent(one.retuning.asr)
            cells = [
                rate if f"{of} model" in one.recorded_as else "" for of in ("given", "purified")
            ]
            rows.append(f"| {name} ({beside}) | {' | '.join(cells)} |")
    choice = record.choice
    if choice is not None and choice.success_before is not None:
        rates = f"{percent(choice.success_before)} | {percent(choice.success_after)}"
        rows.append(f"| largest success of a known trigger, found or random | {rates} |")
    bound = f"| largest drop allowed, in points | | {points(guard.bound)} |"
    return [*rows, bound, f"| utility bound | | {guard.undecided or guard.verdict} |"]


def _plain(text: str) -> str:
    """Return text on one line that Markdown takes as text, whoever named the model."""
    return re.sub(r"([\\`*_\[\]<>|#!~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', '').split())}`"
