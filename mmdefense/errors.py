"""The errors that a user can meet, one class for each remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "BadInputError",
    "DivergenceError",
    "LowUtilityError",
    "MMDefenseError",
    "UnsupportedError",
    "one_line",
    "printable",
]


class MMDefenseError(Exception):
    """Base of every error that mmdefense raises on purpose; its message is one clear line.

    Example:
        >>> import mmdefense as mmd
        >>> try:
        ...     mmd.purify(model, (images, labels), "tsdb")
        ... except mmd.MMDefenseError as error:
        ...     print(error)
        unknown defense 'tsdb'; did you mean 'tsbd'?
    """


class BadInputError(MMDefenseError, ValueError):
    """What was given is wrong: the message says what, what was given, and what to do.

    Example:
        >>> import mmdefense as mmd
        >>> mmd.purify(model, (images, labels), "fine-tuning", holdout=0)
        Traceback (most recent call last):
        ...
        mmdefense.errors.BadInputError: holdout must lie in ...
    """


class LowUtilityError(BadInputError):
    """The model does not work on the data as it was read: what is measured so means nothing."""


class UnsupportedError(MMDefenseError, TypeError):
    """What was given is sound, but this defense or adapter cannot serve it.

    Example:
        >>> import mmdefense as mmd
        >>> mmd.adapt(model, task="language-generation")
        Traceback (most recent call last):
        ...
        mmdefense.errors.UnsupportedError: no adapter of language-generation accepts a ...
    """


class LostProcessError(MMDefenseError, RuntimeError):
    """A process that computed the same run has ended, or does not answer."""


class DivergenceError(MMDefenseError, RuntimeError):
    """A loss stopped being finite.

    Attributes:
        state: The last good state dict of the model, where it is at hand.

    Example:
        >>> import mmdefense as mmd
        >>> try:
        ...     mmd.purify(model, (images, labels), "fine-tuning", lr=1e30)
        ... except mmd.DivergenceError as error:
        ...     model.load_state_dict(error.state)
        <All keys matched successfully>
    """

    def __init__(self, message: str, state: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.state = state


def one_line(error: BaseException) -> str:
    """Return the first line of another library's error, for use in a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def printable(text: str) -> str:
    """Return text on one line that a terminal shows as it is: what is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
