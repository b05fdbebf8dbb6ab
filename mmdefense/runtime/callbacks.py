"""Callbacks: what a user's own code, or an experiment tracker, is told of a purification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmdefense.runtime.run import Event, Progress, silent

__all__ = ["Callback", "Listeners", "told"]


class Callback:
    """What is called in the course of a purification; override what you need.

    The order is ``on_start``, then ``on_stage`` and ``on_step`` of one stage after another, then
    ``on_evaluate``, and ``on_end`` in any case. What a method raises ends the purification.

    Example:
        >>> class Losses(Callback):
        ...     def on_step(self, event):
        ...         if "loss" in event.values:
        ...             print(f"{event.stage} {event.step}: {event.values['loss']:.2f}")
        >>> import mmdefense as mmd
        >>> data = (images, labels)
        >>> short = {"steps": 5, "restarts": 0}
        >>> purified = mmd.purify(model, data, "fine-tuning", **short, callbacks=[Losses()])
        fine-tune 5: ...
    """

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Called first.

        Args:
            settings: The name of the defense as ``"defense"``, and its settings by name.
        """

    def on_stage(self, event: Event) -> None:
        """Called when a stage begins, or goes on after another, with its first event."""

    def on_step(self, event: Event) -> None:
        """Called when a stage reports how far it is; ``event.values`` may be empty."""

    def on_evaluate(self, values: Mapping[str, float]) -> None:
        """Called with what was measured of the result: the utility before and after, for example.

        Args:
            values: Rates in ``[0, 1]``, ``"seconds"``, and the measures of the evidence, by name.
        """

    def on_end(self, error: BaseException | None) -> None:
        """Called last.

        Args:
            error: What ended the purification before it was done; none where nothing did.
        """


@dataclass
class Listeners:
    """A :data:`~mmdefense.runtime.run.Progress` that tells callbacks; notes go to ``progress``.

    Attributes:
        callbacks: They are called in this order.
        progress: Called with each event before them.
    """

    callbacks: Sequence[Callback]
    progress: Progress = silent
    _stage: str | None = field(default=None, init=False)

    def __call__(self, event: Event) -> None:
        """Tell all of an event."""
        self.progress(event)
        if event.note:
            return
        for callback in self.callbacks:
            if event.stage != self._stage:
                callback.on_stage(event)
            callback.on_step(event)
        self._stage = event.stage


@contextmanager
def told(
    callbacks: Sequence[Callback], progress: Progress | None, settings: Mapping[str, Any]
) -> Iterator[Progress | None]:
    """Tell callbacks of start and end, and give what tells them of what comes between.

    Args:
        callbacks: They are called in this order.
        progress: What else is called with each event.
        settings: What ``on_start`` is told.

    Yields:
        What is to be called with each event, if anything.
    """
    if not callbacks:
        yield progress
        return
    for callback in callbacks:
        callback.on_start(settings)
    error: BaseException | None = None
    try:
        yield Listeners(callbacks, progress or silent)
    except BaseException as raised:
        error = raised
        raise
    finally:
        for callback in callbacks:
            callback.on_end(error)
