"""A clock that a test moves by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmdefense.runtime.deadline import Deadline

LATE = Deadline(-math.inf)
"""A deadline that has passed."""


@dataclass
class Clock:
    """Tells ``now``, in seconds; each look at it takes ``per_look``."""

    now: float = 0.0
    per_look: float = 0.0

    def __call__(self) -> float:
        self.now += self.per_look
        return self.now


def looks(count: int) -> Deadline:
    """Return a deadline that has passed when it is looked at for the ``count``-th time."""
    return Deadline(count, Clock(per_look=1.0))
