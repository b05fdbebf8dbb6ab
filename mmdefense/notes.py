"""Notes: one-line messages to the user that do not stop the run.

In Python a note is a warning; the command line writes it to standard error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmdefense.errors import printable

__all__ = ["Note", "note", "notes_written"]


class Note(UserWarning):
    """What was assumed, skipped or changed; not an error."""


def note(text: str) -> None:
    """Tell the user something, such as which classes were taken or how many files were skipped.

    Args:
        text: One line.
    """
    warnings.warn(text, Note, stacklevel=3)


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
