"""Data sets of the ``datasets`` library, saved to disk or by hub id. Their code is never run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, one_line
from mmdefense.files import plain_file
from mmdefense.libraries import needed
from mmdefense_tasks.parts import chosen_part

__all__ = ["open_part", "reading"]


def open_part(where: str | Path, split: str) -> Any:
    """Return the rows of a split; all rows if the data set is not split.

    Raises:
        BadInputError: If it cannot be loaded, or lacks the split.
        UnsupportedError: If ``datasets`` is not installed.
    """
    with needed(f"data set {where}"):
        from datasets import load_dataset, load_from_disk
    with reading(where):
        if Path(where).is_dir():
            for path in Path(where).rglob("*"):
                if not path.is_dir():
                    plain_file(path)
            held = load_from_disk(str(where))
        else:
            held = load_dataset(str(where))
    if not isinstance(held, Mapping):
        return held
    part = chosen_part(list(held), split, where)
    if part is None:
        raise BadInputError(f"data set {where} must have a {split!r} split, got {', '.join(held)}")
    return held[part]


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Turn any error of the library (network, missing, damaged) into a one-line message.

    Raises:
        BadInputError: Instead of the error.
    """
    try:
        yield
    except BadInputError:
        raise
    except Exception as error:  # the library raises many exception types
        raise BadInputError(f"data set {where} cannot be loaded: {one_line(error)}") from error
