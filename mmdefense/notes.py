"""Notes: one-line messages to the user that do not stop the run.

In Python a note is a warning; the command line writes it to standard error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mmdefense.errors import printable

__all__ = ["Note", "note", "notes_written"]


class Note(UserWarning):
    """What was assumed, skipped or changed; not an error."""


def note(text: str) -> None:
    """Tell the user something, such as which classes were taken or how many files were skipped.

    The warning points to the user's line, not to one of this package.

    Args:
        text: One line.
    """
    warnings.warn(text, Note, stacklevel=_level_of_the_user())


def _level_of_the_user() -> int:
    """Return the stack level, counted from the caller, at which this package was entered."""
    level, user, frame = 1, 1, sys._getframe(1)
    while frame.f_back is not None:
        level, inside = level + 1, _is_ours(frame)
        user, frame = level if inside else user, frame.f_back
    return user


def _is_ours(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in ("mmdefense", "mmdefense_adapters", "mmdefense_tasks")


@contextmanager
def notes_written() -> Iterator[None]:
    """Within the block, write notes to standard error, each text once, not as warnings."""
    written: set[str] = set()
    with warnings.catch_warnings():
        others = warnings.showwarning
        warnings.simplefilter("always", Note)

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if not issubclass(category, Note):
                others(message, category, *place)
            elif str(message) not in written:
                written.add(str(message))
                print(f"mmdefense: note: {printable(str(message))}", file=sys.stderr)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
