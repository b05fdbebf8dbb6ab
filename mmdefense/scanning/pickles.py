"""Report what a pickle would look up, build and call, without doing any of it.

Levels follow one rule: a name that is not known to be harmless in this use is ``high``; see
:mod:`mmdefense.checkpoints.names` for what is known. A pickle that cannot be read to its end is at
least ``medium``, and ``high`` if a loader would unpickle it.

References:
    picklescan's issues 14 and 22 for the memo decoys; protectai/modelscan's issues 85, 330 and 338
    for gadgets beyond deny lists.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterator
from typing import IO

from mmdefense.checkpoints.names import (
    DATA,
    ENUMS,
    MATHS,
    allowed_by_torch,
    built_level,
    is_dangerous,
)
from mmdefense.findings import Finding, Level, Rule
from mmdefense.scanning.machine import MAX_STEPS, Followed, Name, Use
from mmdefense.scanning.opcodes import follow

__all__ = ["IMPORT", "MAX_DEPTH", "is_deliberate", "level_of", "scan_pickles"]

IMPORT = Rule(
    id="pickle-import",
    level="medium",
    measured="a name that the pickle imports",
    reference="names known to be harmless in this use",
    meaning="Unpickling looks up this name and can call it with arguments from the file.",
    blind_spot="what the named thing does: a class of your own may well be harmless.",
)
PLAIN = Rule(
    id="pickle-data",
    level="info",
    measured="names that the pickle imports",
    reference="plain data types of Python and NumPy",
    meaning="Numbers, texts, paths and containers next to the tensors. mmdefense reads them as "
    "data.",
    blind_spot="nothing that these types can do; other imports are reported separately.",
)
HIDDEN = Rule(
    id="pickle-hidden-import",
    level="high",
    measured="what the pickle looks up or calls",
    reference="names written literally in the file",
    meaning="What is imported or called cannot be determined without running the pickle.",
    blind_spot="what it is.",
)
CHANGED = Rule(
    id="pickle-changes-code",
    level="high",
    measured="the objects that the pickle sets attributes on",
    reference="objects that it creates itself",
    meaning="It changes a class or function that other code then uses.",
    blind_spot="what the change does.",
)
BROKEN = Rule(
    id="pickle-broken",
    level="medium",
    measured="whether the pickle can be read to the end",
    reference="opcodes that every unpickler reads alike, up to STOP",
    meaning="What comes before the break still runs, and other readers may continue after it.",
    blind_spot="what follows the break.",
)
NESTED_TOO_DEEP = Rule(
    id="pickle-nesting",
    level="high",
    measured="pickles within pickles",
    reference="four levels",
    meaning="Layers of pickles hide what the innermost one does.",
    blind_spot="anything below the fourth level.",
)

MAX_DEPTH = 4
_STREAMS = 10_000
_MAX_BASE64 = 1_000_000
_TORCH_MAGIC, _TORCH_PICKLES = 0x1950A86A20F9469CFC6C, 5
_PROTO = 0x80
_BY_CHANCE = 8
"""Opcodes after which it cannot be chance: random bytes break sooner."""
_HELD = frozenset(
    {
        *("builtins.getattr", "operator.getitem", "_operator.getitem"),
        "torch.storage._load_from_bytes",
    }
)
"""Functions that some harmless calls need; those calls are recognised, others are high."""
_BASE64 = re.compile(r"[\w+/\-\s]{24,}={0,2}\s*", re.ASCII)
_HEX = re.compile(r"([0-9a-fA-F]{2}){12,}", re.ASCII)
_PROPER = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def level_of(module: str, name: str, use: Use = "called") -> Level | None:
    """Return the level of a pickle that uses a name this way; None for names that build tensors.

    An attribute of an attribute is never harmless: it leads through one module to another.
    """
    full = f"{module}.{name}"
    if "." in name:
        return "high"
    if full in allowed_by_torch():
        return None
    if full in DATA or full in ENUMS or (full in _HELD | MATHS and use == "held"):
        return "info"
    known = None if use == "called" else built_level(module, name)
    return "high" if known is None or is_dangerous(module, name) else known


def is_deliberate(followed: Followed) -> bool:
    """Return whether bytes that may not be a pickle do what random bytes do not.

    Text can look like an import. It is not one if the name is malformed, or unused before the bytes
    break.
    """
    if followed.exhausted or (followed.crossed and followed.calls) or _is_begun(followed):
        return True
    if followed.error and not (followed.calls and followed.steps > 2):
        return False
    return any(
        _is_proper(found)
        and (not followed.error or (use != "held" and _level(found, use) == "high"))
        for found, use in followed.uses.items()
    )


def _is_proper(found: Name) -> bool:
    return bool(_PROPER.fullmatch(found.full))


def _is_begun(followed: Followed) -> bool:
    """Return whether a broken pickle is clearly one."""
    return bool(followed.error) and followed.first == _PROTO and followed.steps >= _BY_CHANCE


def _level(found: Name, use: Use) -> Level | None:
    return level_of(found.module, found.name, use)


def scan_pickles(
    stream: IO[bytes], subject: str, *, declared: bool = True, loose: bool = False, depth: int = 0
) -> Iterator[Finding]:
    """Yield the findings on the consecutive pickles in ``stream``.

    PyTorch's older format and some trainers write several; readers differ in how many they load.

    Args:
        stream: A seekable binary file, at their start.
        subject: Its name in the findings.
        declared: Whether a loader would read it as a pickle. In other bytes, such as the raw
            storages after the pickles of the older format, only what cannot be chance is reported.
        loose: Whether files of numbers have such names as often as pickles.
        depth: Number of pickles and archives around it.
    """
    if depth > MAX_DEPTH:
        yield NESTED_TOO_DEEP.found(subject, depth)
        return
    every, place, needed, steps = Followed(), stream.tell(), int(declared), 0
    size = stream.seek(0, io.SEEK_END)
    for count in range(_STREAMS):
        followed = follow(stream, place, steps=MAX_STEPS - steps)
        steps += followed.steps
        if followed.error and count >= needed and not is_deliberate(followed):
            if declared and needed == 1:
                yield BROKEN.found(subject, f"{size - place} bytes after it are not a pickle")
            break
        if count == 0 and followed.value == _TORCH_MAGIC:
            needed = _TORCH_PICKLES
        if count < needed or is_deliberate(followed):
            every.take(followed)
        yield from _scan_inner(followed, subject, depth, MAX_STEPS - steps)
        if followed.error:
            yield BROKEN.found(subject, followed.error, level=_broken_level(followed, loose))
            break
        place = followed.end
        if place >= size:
            break
    else:
        yield BROKEN.found(subject, f"it has more than {_STREAMS} pickles", level="high")
    yield from _judged(every, subject)


def _broken_level(followed: Followed, loose: bool) -> Level:
    """Return the level of a break: lower if it is more likely a file of numbers than a pickle."""
    is_named = any(_is_proper(found) for found in followed.uses)
    is_none = not is_named and not followed.hidden and followed.first != _PROTO
    return "medium" if loose and is_none and followed.steps < _BY_CHANCE else "high"


def _judged(followed: Followed, subject: str) -> Iterator[Finding]:
    levels = {found.full: _level(found, use) for found, use in followed.uses.items()}
    for name, level in sorted(levels.items()):
        if level not in {None, "info"}:
            yield IMPORT.found(subject, name, level=level)
    if plain := sorted(name for name, level in levels.items() if level == "info"):
        yield PLAIN.found(subject, ", ".join(plain))
    for what in sorted(set(followed.hidden)):
        yield HIDDEN.found(subject, what)
    for what in sorted(set(followed.changed)):
        yield CHANGED.found(subject, what)


def _scan_inner(followed: Followed, subject: str, depth: int, steps: int) -> Iterator[Finding]:
    """Yield what pickles within a pickle hold: those that PyTorch would load, and others."""
    name = f"{subject}!nested pickle"
    for data in followed.loaded:
        yield from scan_pickles(io.BytesIO(data), name, depth=depth + 1)
    for constant in followed.constants:
        for data in _readings(constant):
            inner = follow(io.BytesIO(data), steps=steps)
            steps = max(steps - inner.steps, 0)
            is_pickle = not inner.error and bool(inner.uses or inner.constants)
            if is_pickle or is_deliberate(inner):
                yield from scan_pickles(io.BytesIO(data), name, declared=is_pickle, depth=depth + 1)


def _readings(constant: str | bytes) -> Iterator[bytes]:
    data = constant.encode("latin-1", "ignore") if isinstance(constant, str) else bytes(constant)
    yield data
    text = data[:_MAX_BASE64].decode("latin-1")
    if _HEX.fullmatch(text):
        yield bytes.fromhex(text)
    if _BASE64.fullmatch(text):
        try:
            yield base64.b64decode(text, altchars=b"-_" if set("-_") & set(text) else None)
        except (binascii.Error, ValueError):
            return
