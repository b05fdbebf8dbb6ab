"""What a defense runs with from start to end: seed, progress, states, store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdefense.checkpoints.runs import RunStore
from mmdefense.errors import BadInputError
from mmdefense.notes import note
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.memory import Room
from mmdefense.runtime.parts import Parts

__all__ = [
    "Event",
    "OutOfTime",
    "Progress",
    "Run",
    "copy_state",
    "named",
    "put_state",
    "silent",
    "whole",
]


@dataclass(frozen=True, slots=True)
class Event:
    """A progress event: ``step`` of ``total`` steps of ``stage`` are done.

    Attributes:
        stage: Name of the stage.
        step: Steps done.
        total: Planned steps, of which a stage may skip the last ones; 0 if unknown.
        values: Measurements by name.
        note: A message to the user, if there is one; such an event reports no progress.
        ended: Whether the stage is over, with or without all of its steps.
    """

    stage: str
    step: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    ended: bool = False


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Show nothing but the notes."""
    if event.note:
        note(event.note)


def named(name: str, progress: Progress | None, mark: str = ": ") -> Progress:
    """Return a callback that puts a name and a mark before each stage; silent without ``progress``.

    The text of notes stays the same.
    """
    if progress is None:
        return lambda event: None
    shown: Progress = progress
    return lambda event: shown(replace(event, stage=f"{name}{mark}{event.stage}"))


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a detached copy of the state dict on the CPU; sharded weights are gathered."""
    return {n: whole(v.detach()).to("cpu", copy=True) for n, v in model.state_dict().items()}


def put_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state of :func:`copy_state` into the same model."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(state), options=options)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered first if it is sharded over processes (a DTensor)."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class OutOfTime(Exception):  # noqa: N818  # not an error: the state so far is judged and returned
    """The deadline of a run has passed in the middle of a stage."""


@dataclass
class Run:
    """What one purification runs with.

    Attributes:
        seed: The root of all randomness; see :meth:`generator`.
        progress: Called with each :class:`Event`.
        store: Where to save states for a resumed run; None saves nothing.
        history: All reported values, in chronological order.
        states: Candidate states for the utility guard, oldest first, each with its label.
        deadline: When to stop; checked in :meth:`report` and after each update of a training.
        room: How many samples fit into memory at once; saved with the states, so that a resumed run
            continues with the same parts.
        shared: Results of :meth:`once` for a run and its milder ones, by stage.
        parts: Seconds and threads, including those of the parts before an interruption.
    """

    seed: int = 0
    progress: Progress = silent
    store: RunStore | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    states: list[tuple[str, dict[str, Tensor]]] = field(default_factory=list)
    deadline: Deadline = field(default_factory=Deadline)
    room: Room = field(default_factory=Room)
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts)

    def __post_init__(self) -> None:
        self.room.notify = lambda text: self.progress(Event("memory", 0, 1, note=text))

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh generator that depends on the seed and ``name`` alone."""
        return torch.Generator(device).manual_seed(self.seed_for(name))

    def seed_for(self, name: str) -> int:
        """Return an integer that depends on the seed and ``name`` alone."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def report(self, stage: str, step: int, total: int, **values: float) -> None:
        """Report progress, and add the values to the history.

        Raises:
            OutOfTime: If the deadline has passed, and the stage is not done.
        """
        self.record(stage, step, total, ended=False, **values)
        if step < total:
            self.check_time(stage, step, total)

    def record(
        self, stage: str, step: int, total: int, *, ended: bool = False, **values: float
    ) -> None:
        """Report progress and add the values to the history, without checking the time."""
        plain = {name: float(value) for name, value in values.items()}  # as it is stored
        if plain:
            self.history.append({"stage": stage, "step": step, **plain})
        self.progress(Event(stage, step, total, plain, ended=ended))

    def check_time(self, stage: str, step: int, total: int) -> None:
        """End the run if its deadline has passed.

        Raises:
            OutOfTime: If so; it names the stage and the step.
        """
        if self.deadline.passed:
            self.progress(Event(stage, step, total, ended=True))
            raise OutOfTime(f"{stage}, step {step} of {total}")

    def part(self, name: str) -> Run:
        """Return a run within this one, with its own history, states and files.

        They share seed, deadline and room; ``name`` is put before the stages of the part.
        """
        progress = named(name, self.progress)
        store = self.store.part(name) if self.store else None
        part = Run(self.seed, progress, store, deadline=self.deadline)
        part.room, part.parts = self.room, self.parts
        return part

    def milder(self, name: str) -> Run:
        """Return a part that repeats the run at a smaller learning rate.

        Results that do not depend on the rate are reused; see :meth:`once`.
        """
        part = self.part(name)
        part.shared = self.shared
        return part

    def adopt(self, name: str, part: Run) -> None:
        """Add the history of a part to this one, with ``name`` before its stages."""
        self.history += [{**entry, "stage": f"{name}: {entry['stage']}"} for entry in part.history]

    def snapshot(self, label: str, model: nn.Module) -> None:
        """Keep the current state as a candidate that the utility guard may return."""
        self.states.append((label, copy_state(model)))

    def once(
        self, stage: str, compute: Callable[[], dict[str, Any]], *, at_any_rate: bool = False
    ) -> dict[str, Any]:
        """Return the result of ``compute``, which runs once: a resumed run reads it from the store.

        Tensors that were read from the store are on the CPU.

        Args:
            stage: A name that is unique in the run.
            compute: Computes the result.
            at_any_rate: Whether the result is the same at any learning rate, so that milder runs
                reuse it.
        """
        if at_any_rate and stage in self.shared:
            return self.shared[stage]
        kept = self.recall(stage)
        if kept is None:
            kept = compute()
            self.keep(stage, kept)
        if at_any_rate:
            self.shared[stage] = kept
        return kept

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Save ``value``, with the history and states so far, in the store, if there is one."""
        if self.store:
            kept = {
                "value": dict(value),
                "history": self.history,
                "states": self.states,
                "sizes": self.room.sizes,
                "parts": self.parts.kept(),
            }
            self.store.save(name, kept)

    def recall(self, name: str) -> dict[str, Any] | None:
        """Return a saved value, and restore the history, states and sizes of that time.

        It returns None if nothing was saved.

        Raises:
            BadInputError: If the file is not one that :meth:`keep` wrote.
        """
        kept = self.store.load(name) if self.store else None
        if kept is None:
            return None
        if kept.keys() != {"value", "history", "states", "sizes", "parts"}:
            raise BadInputError(
                f"checkpoint {name!r} does not belong to a run; delete it to start again"
            )
        self.history[:] = kept["history"]
        self.states[:] = [(label, state) for label, state in kept["states"]]
        self.room.sizes = dict(kept["sizes"])
        self.parts.go_on_from(kept["parts"])
        value: dict[str, Any] = kept["value"]
        return value
