"""What a row of the table of everyday inputs is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError, UnsupportedError


@dataclass(frozen=True)
class Refused:
    """An input that is refused with one line.

    Attributes:
        line: A regular expression that is found in the line.
        code: The exit code: 2 where the input is wrong, 3 where it is sound but not supported.
    """

    line: str
    code: int = 2

    @property
    def error(self) -> type[Exception]:
        return {2: BadInputError, 3: UnsupportedError}[self.code]


@dataclass(frozen=True)
class Row:
    """One everyday input.

    Attributes:
        name: The input in a few words; the id of the test.
        read: Makes the input in an empty folder and reads it as a user would, in Python; returns
            what came out. For the command line use :class:`Command`.
        right: What must come out: a value (numbers are compared within 1e-6), or a refusal.
    """

    name: str
    read: Callable[[Path], Any]
    right: Any


@dataclass(frozen=True)
class Command:
    """An everyday input that is given to the command line.

    Attributes:
        name: The input in a few words; the id of the test.
        make: Makes the input in an empty folder; returns the arguments after ``mmdefense``.
        code: The right exit code.
        said: A regular expression that is found in what the command writes, on either stream.
        check: Called with the folder afterwards, where there is more to look at.
    """

    name: str
    make: Callable[[Path], list[str]]
    code: int
    said: str = ""
    check: Callable[[Path], None] | None = None
