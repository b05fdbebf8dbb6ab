"""The YAML at the top of a model card, which the hub reads: our entries are added to those there.

It is edited line by line and never parsed. So whatever came with a model stays as it is, byte for
byte, and YAML that is built to grow when it is read or written does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["with_entries"]

_FRONT = re.compile(r"\A(---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"^(?=[A-Za-z_][\w-]*[ \t]*:)", re.MULTILINE)
_LIST = re.compile(r"tags[ \t]*:[ \t]*(?:#.*)?\r?\n(?:[ \t]*(?:-[ \t].*|#.*)?\r?\n)+")
_ITEM = re.compile(r"^([ \t]*)-[ \t]+(.*?)[ \t]*\r?$", re.MULTILINE)
_INLINE = re.compile(r"(tags[ \t]*:[ \t]*\[)([^\[\]{}#]*)(\].*\r?\n)")


def with_entries(card: str, tags: Sequence[str], base_model: str = "") -> str:
    """Return a model card with tags and the model that it was made from.

    A list of tags in another form than a YAML list of words is left as it is.

    Args:
        card: The text, with or without front matter.
        tags: Words that are added to the tags.
        base_model: An id of the hub, in place of the base model that is there; empty leaves that.
    """
    found = _FRONT.match(card)
    head, held, end = found.groups() if found else ("---\n", "", "---\n\n")
    rest = card[found.end() :] if found else card
    newline = "\r\n" if head.endswith("\r\n") else "\n"
    entries = _ENTRY.split(held)
    if base_model:
        entries = [
            one for one in entries if _name(one) not in {"base_model", "base_model_relation"}
        ]
        lines = (f"base_model: {base_model}", "base_model_relation: finetune")
        entries.append("".join(f"{line}{newline}" for line in lines))
    if not any(_name(entry) == "tags" for entry in entries):
        entries.append(f"tags:{newline}" + "".join(f"- {tag}{newline}" for tag in tags))
    else:
        entries = [_tagged(one, tags, newline) if _name(one) == "tags" else one for one in entries]
    return f"{head}{''.join(entries)}{end}{rest}"


def _name(entry: str) -> str:
    return entry.partition(":")[0].rstrip()


def _tagged(entry: str, tags: Sequence[str], newline: str) -> str:
    if _LIST.fullmatch(entry) and (items := list(_ITEM.finditer(entry))):
        have, last = {item[2].strip("'\"") for item in items}, items[-1]
        more = "".join(f"{last[1]}- {tag}{newline}" for tag in tags if tag not in have)
        place = entry.index("\n", last.start()) + 1
        return entry[:place] + more + entry[place:]
    if inline := _INLINE.match(entry):
        have = {word.strip(" \t'\"") for word in inline[2].split(",")} - {""}
        words = [inline[2].strip()] * bool(have) + [tag for tag in tags if tag not in have]
        return f"{inline[1]}{', '.join(words)}{inline[3]}{entry[inline.end() :]}"
    return entry
