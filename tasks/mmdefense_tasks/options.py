"""Reading options: the user's, and those that the model states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdefense.errors import BadInputError

__all__ = ["Options"]


_BOUNDS = {
    "image_size": (1, 8192),
    "channels": (1, 4096),
    "frames": (1, 4096),
    "clips": (1, 1024),
    "points": (1, 10**7),
    "features": (3, 4096),
}
"""Bounds of the numeric options; the upper ones are our choice, so that one sample fits in
memory."""


def _check_bounds(name: str, value: Any) -> None:
    least, most = _BOUNDS.get(name, (0, 0))
    numbers = value if isinstance(value, tuple | list) else (value,)
    if most and not all(number is None or least <= number <= most for number in numbers):
        raise BadInputError(f"{name} must be at least {least} and at most {most}, got {value}")


class Options:
    """Reading options by name: the user's, and behind them the model's as defaults.

    A reader takes what it uses. What the user gave and no reader took is an error, since it would
    have had no effect; what the model states may be left over.

    Example:
        >>> options = Options({"channels": 3}, channels=None, frames=8)
        >>> options.take("channels")
        3
        >>> options.check_used("clips.npz")
        Traceback (most recent call last):
        ...
        mmdefense.errors.BadInputError: frames=8 has no effect on clips.npz; leave it out
    """

    def __init__(self, stated: Mapping[str, Any], **given: Any) -> None:
        """Collect the options.

        Args:
            stated: What the model states.
            **given: What the user says; None and an empty sequence stand for nothing.

        Raises:
            BadInputError: If a number is out of its bounds.
        """
        self._stated = stated
        self._given = {name: value for name, value in given.items() if value not in (None, ())}
        for name, value in (*stated.items(), *self._given.items()):
            _check_bounds(name, value)
        self._used: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Return the user's value, or else the model's, or else ``default``; mark it as used."""
        self._used.add(name)
        return self._given.get(name, self._stated.get(name, default))

    def stated(self, name: str) -> Any:
        """Return what the model states, whatever the user says; none where it states nothing."""
        return self._stated.get(name)

    def given(self, name: str) -> bool:
        """Return whether the user gave an option."""
        return name in self._given

    def check_used(self, where: object) -> None:
        """Refuse options of the user's that no reader took.

        Raises:
            BadInputError: Naming the first.
        """
        for name, value in self._given.items():
            if name not in self._used:
                raise BadInputError(f"{name}={value} has no effect on {where}; leave it out")
