"""The parts of an interrupted and resumed run: their seconds and numbers of threads."""

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
    """The time and threads of the parts of a run, saved with each state for the next part.

    Attributes:
        clock: Returns the time in seconds.
        begun: When this part began, by that clock.
        earlier: Seconds of the earlier parts, each up to the state that the next one resumed from.
        threads: Number of threads of each part.
        name: Unique name of this part.
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
        """Seconds of all parts so far."""
        assert self.begun is not None
        return self.earlier + self.clock() - self.begun

    def kept(self) -> dict[str, Any]:
        """Return what to save with a state."""
        return {"name": self.name, "seconds": self.seconds, "threads": list(self.threads)}

    def go_on_from(self, kept: Mapping[str, Any]) -> None:
        """Continue from what was saved with a state, unless this part saved it itself."""
        if kept["name"] == self.name:
            return
        if not self.earlier:
            now = self.threads[-1]
            self.threads[:] = [*kept["threads"], now]
            if kept["threads"][-1] != now:
                note(
                    f"the run began with {kept['threads'][-1]} threads and continues with {now}: "
                    "the result may differ from that of an uninterrupted run"
                )
        self.earlier = max(self.earlier, float(kept["seconds"]))
