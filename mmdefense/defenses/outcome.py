"""What a defense reports besides the purified model and the plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Choice", "TriggerSearch"]


@dataclass(frozen=True, kw_only=True)
class TriggerSearch:
    """The outcome of a search for triggers, for defenses that search.

    Attributes:
        targets: Number of targets that were searched.
        found: Number of triggers that passed the acceptance threshold.
        working: Number of targets whose trigger works but was not accepted.
        families: Kinds of trigger that were searched for.
        threshold: Success rate that a trigger had to reach.
    """

    targets: int
    found: int
    working: int = 0
    families: tuple[str, ...] = ()
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice among several defenses, by what a defender can measure.

    Attributes:
        defense: The one that was chosen.
        settings: Its fields.
        why: What was found in the given model, a line for each defense that was tried, the choice.
        success_before: Largest success of the triggers that the defenses were judged by, on the
            held-out samples in the given model, in ``[0, 1]``; None if there are none.
        success_after: The same in the returned model.
    """

    defense: str
    settings: Mapping[str, Any]
    why: tuple[str, ...]
    success_before: float | None = None
    success_after: float | None = None
