"""The parts of a run that was cut off and went on: their seconds, and with how many threads."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mmdefense.notes import note

__all__ = ["Parts"]


@dataclass
class Parts:
    """What the parts of a run took. It is kept with each state, so that the next part counts on.

    Attributes:
        clock: Returns the time in seconds.
        begun: When this part began, by that clock.
        earlier: Seconds of the parts before, each up to the state that the next one went on from.
        threads: Number of threads of each part.
        name: Tells this part from others.
    """

    clock: Callable[[], float] = time.monotonic
    begun: float | None = None
    earlier: float = 0.0
    threads: list[int] = field(default_factory=lambda: [torch.get_num_threads()])
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if self.begun is None:
            self.begun = self.clock()

    @property
    def seconds(self) -> float:
        """Seconds of all parts up to now."""
        assert self.begun is not None
        return self.earlier + self.clock() - self.begun

    def kept(self) -> dict[str, Any]:
        """Return what is to be kept with a state."""
        return {"name": self.name, "seconds": self.seconds, "threads": list(self.threads)}

    def go_on_from(self, kept: Mapping[str, Any]) -> None:
        """Count on from what was kept with a state, unless this very part has kept it."""
        if kept["name"] == self.name:
            return
        if not self.earlier:
            now = self.threads[-1]
            self.threads[:] = [*kept["threads"], now]
            if kept["threads"][-1] != now:
                note(
                    f"the run was begun with {kept['threads'][-1]} threads and goes on with {now}: "
                    "the result may differ from that of a run that was not cut off"
                )
        self.earlier = max(self.earlier, float(kept["seconds"]))
