"""Reading options: from the user, with defaults stated by the model."""

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
    """Reading options by name: the user's, with the model's as defaults.

    A reader takes the options that it uses. An option of the user that no reader took is an error,
    since it would have no effect; options stated by the model may be left over.

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
            stated: Options stated by the model.
            **given: Options given by the user; None and an empty sequence mean not given.

        Raises:
            BadInputError: If a number is out of bounds.
        """
        self._stated = stated
        self._given = {name: value for name, value in given.items() if value not in (None, ())}
        for name, value in (*stated.items(), *self._given.items()):
            _check_bounds(name, value)
        self._used: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Return the user's value, else the model's, else ``default``; mark the option as used."""
        self._used.add(name)
        return self._given.get(name, self._stated.get(name, default))

    def stated(self, name: str) -> Any:
        """Return the model's value, ignoring the user's; None if the model states none."""
        return self._stated.get(name)

    def given(self, name: str) -> bool:
        """Return whether the user gave an option."""
        return name in self._given

    def check_used(self, where: object) -> None:
        """Reject user options that no reader took.

        Raises:
            BadInputError: If there are any; the message names the first.
        """
        for name, value in self._given.items():
            if name not in self._used:
                raise BadInputError(f"{name}={value} has no effect on {where}; leave it out")
