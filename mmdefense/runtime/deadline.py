"""The deadline of a command, by a clock that a test can replace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Deadline"]


@dataclass(frozen=True)
class Deadline:
    """The moment by which everything must be done; by default, never.

    Attributes:
        at: The moment in seconds, by ``clock``.
        clock: Returns the time in seconds; monotonic.
    """

    at: float = math.inf
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float | Deadline | None) -> Deadline:
        """Return the deadline ``seconds`` from now; a deadline is returned as it is."""
        if isinstance(seconds, Deadline):
            return seconds
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Remaining seconds; negative once it has passed."""
        return math.inf if self.at == math.inf else self.at - self.clock()

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.left <= 0

    def earlier(self, seconds: float) -> Deadline:
        """Return a deadline ``seconds`` before this one, to leave time for other work."""
        return replace(self, at=self.at - seconds)

    def within(self, seconds: float) -> Deadline:
        """Return this deadline, or the one ``seconds`` from now, whichever comes first."""
        return replace(self, at=min(self.at, self.clock() + seconds))
