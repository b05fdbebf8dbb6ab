"""A grid of measurements: cases x defenses x views x shares of clean data x seeds.

Each victim is trained once and each cell is measured once; both are kept in a store under all that
they depend on. Any number of processes may work on one grid: each claims a cell before it begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmdefense.defenses.base import Defense, versions
from mmdefense.evaluation.identity import cell_identity, victim_identity
from mmdefense.evaluation.kept import kept_victim, trained
from mmdefense.evaluation.victims import Victim, baseline_of, for_views, purified_row
from mmdefense.pipeline.purification import configured
from mmdefense.protocol import Case
from mmdefense.report.encoding import build, plain
from mmdefense.report.record import Row
from mmdefense.runtime.run import Progress, named
from mmdefense.store import Entry, Identity, Store

__all__ = ["VIEWS", "Cell", "Grid", "Lineup", "Planned", "Views", "cell_of", "measure", "work"]

Views = Literal["insertions", "standard"]
"""How clean samples are augmented for a defense.

``"standard"``: as those do who train such models, for images padding and cropping.
``"insertions"``: by the project's own augmentation, which also inserts noise, points or words, and
so imitates triggers of that kind.
"""

VIEWS: tuple[Views, ...] = ("insertions", "standard")

_POLL = 0.5
"""Seconds between two looks at cells that other processes are at work on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One defense against one victim, with one seed.

    Attributes:
        seed: Of the victim, the clean samples and the defense.
        row: What was measured; its ``victim`` is the name of the case.
        case: The description of the victim, as plain values.
        versions: Of what computed it.
        views: How the clean samples were augmented.
        threads: Of each process that computed it.
    """

    seed: int
    row: Row
    case: Mapping[str, Any]
    versions: Mapping[str, str]
    views: Views = "insertions"
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """A defense in a grid.

    Attributes:
        defense: Its registered name.
        settings: Those that are not at their defaults.
        label: What tables call it; by default its name, with the settings behind it.
    """

    defense: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        given = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return self.label or (f"{self.defense} ({given})" if given else self.defense)

    def build(self, seed: int) -> Defense:
        """Return the defense with its settings.

        Raises:
            BadInputError: If the name, a setting or a value is unknown.
        """
        return configured(self.defense, {**self.settings, "seed": seed})


@dataclass(frozen=True)
class Planned:
    """A cell to be measured.

    Attributes:
        case: The victim.
        label: What tables call the defense.
        defense: With its settings and the seed, which is the victim's as well.
        baseline: The label of plain fine-tuning with its budget; empty where there is none.
        views: How the clean samples are augmented.
        device: What computes, for example ``"cuda:1"``.
        victim: All that its victim depends on.
        identity: All that the cell depends on.
    """

    case: Case
    label: str
    defense: Defense
    baseline: str
    views: Views
    device: str
    victim: Identity
    identity: Identity

    @property
    def kind(self) -> tuple[Any, ...]:
        """What cells that differ in their seeds alone have in common."""
        return self.case.name, self.label, self.views, self.case.clean


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured: every combination of the axes.

    Attributes:
        cases: The victims.
        defenses: Defenses with their settings; a name alone stands for its defaults.
        seeds: One victim and one purification each.
        baselines: Whether each defense that trains gets plain fine-tuning with the same steps,
            learning rate and augmentation beside it.
        views: How the clean samples are augmented.
        clean: Shares of the training set that the defenses are given; by default as each case says.
        device: What computes.
    """

    cases: Sequence[Case]
    defenses: Sequence[Lineup | str]
    seeds: Sequence[int] = (0, 1, 2)
    baselines: bool = True
    views: Sequence[Views] = ("insertions",)
    clean: Sequence[float] = ()
    device: str = "cpu"

    def planned(self) -> list[Planned]:
        """Return the cells in order, those of one victim beside each other.

        Raises:
            BadInputError: If a name or setting is unknown.
        """
        return [
            cell
            for case in self.cases
            for seed in self.seeds
            for share in self.clean or (case.clean,)
            for views in self.views
            for cell in self._of(replace(case, clean=share), seed, views)
        ]

    def _of(self, case: Case, seed: int, views: Views) -> Iterator[Planned]:
        """Yield each defense, and plain fine-tuning with its budget right after it."""
        victim = victim_identity(case, seed, self.device)

        def planned(label: str, defense: Defense, baseline: str) -> Planned:
            identity = cell_identity(victim, case, label, defense, views)
            return Planned(case, label, defense, baseline, views, self.device, victim, identity)

        for given in self.defenses:
            entry = Lineup(defense=given) if isinstance(given, str) else given
            defense = entry.build(seed)
            plain_training = baseline_of(defense) if self.baselines else None
            baseline = f"fine-tuning like {entry.name}" if plain_training else ""
            yield planned(entry.name, defense, baseline)
            if plain_training:
                yield planned(baseline, plain_training, "")

    def run(
        self,
        folder: str | Path,
        progress: Progress | None = None,
        *,
        retry_failed: bool = False,
    ) -> list[Cell]:
        """Measure every cell that the store lacks, in this process, and return those that are done.

        A cell that failed is kept with its error, and is not tried again unless that is asked for.

        Args:
            folder: Of the store; made where it is missing.
            progress: Called with each :class:`~mmdefense.runtime.run.Event`.
            retry_failed: Whether cells and victims that failed are tried again.

        Raises:
            BadInputError: If a name is unknown, or a kept file is damaged.
        """
        cells, store = self.planned(), Store(folder)
        if retry_failed:
            forget_failures(store, cells)
        work(store, cells, progress)
        return self.measured(store)

    def measured(self, store: Store) -> list[Cell]:
        """Return the cells that are done, in the order of the plan."""
        measured = []
        for planned in self.planned():
            entry = store.find(planned.identity)
            if entry is not None and entry.status == "done":
                cell = cell_of(store, entry)
                # the cell may have been measured in a grid without baselines
                row = replace(cell.row, baseline=planned.baseline)
                measured.append(replace(cell, row=row))
        return measured


def cell_of(store: Store, entry: Entry) -> Cell:
    """Return the cell of an entry that is done.

    Raises:
        BadInputError: If its file is missing or damaged.
    """
    cell: Cell = build(Cell, store.content(entry), f"cell {entry.name}")
    return cell


def forget_failures(store: Store, cells: Sequence[Planned]) -> None:
    """Forget what failed of these cells and their victims, so that it is tried again."""
    for cell in cells:
        for identity in (cell.identity, cell.victim):
            entry = store.find(identity)
            if entry is not None and entry.status == "failed":
                store.forget(entry)


def work(store: Store, cells: Sequence[Planned], progress: Progress | None = None) -> None:
    """Measure the cells that nobody has measured, until there is none left.

    Victims are trained first. Then one cell of each kind is measured, and behind these the rest,
    those first whose kind takes longest, so that no process is left alone with a long one.
    A cell that another process is at work on, or whose victim it is training, is left to it; this
    returns when all of them are done or failed.
    """
    victims, seconds = _Victims(store), dict[tuple[Any, ...], float]()
    left = _left(store, cells, seconds)
    for cell in {cell.victim.digest: cell for cell in left}.values():
        show = named(cell.victim.name, progress, ", ")
        trained(store, cell.victim, cell.case, cell.defense.seed, show, cell.device)
    while left := _left(store, cells, seconds):
        if not any(_measured(store, cell, victims, progress) for cell in left):
            time.sleep(_POLL)  # others are at work on all of them


def _left(
    store: Store, cells: Sequence[Planned], seconds: dict[tuple[Any, ...], float]
) -> list[Planned]:
    """Return the cells that the store lacks, those first of which none of their kind is done.

    Args:
        store: Where cells are kept.
        cells: All of them.
        seconds: How long a cell of each kind takes; what the store knows is added.
    """
    entries = {entry.digest: entry for entry in store.entries("cell")}
    for cell in cells:
        entry = entries.get(cell.identity.digest)
        if entry is not None and cell.kind not in seconds:
            done = entry.status == "done"
            seconds[cell.kind] = cell_of(store, entry).row.seconds if done else 0.0
    left = [cell for cell in cells if cell.identity.digest not in entries]
    return sorted(left, key=lambda cell: seconds.get(cell.kind, math.inf), reverse=True)


def _measured(store: Store, cell: Planned, victims: _Victims, progress: Progress | None) -> bool:
    """Measure a cell and keep it, or its failure; say no where it is not this process's turn."""
    with store.claim(cell.identity) as mine:
        if not mine:
            return False
        if store.find(cell.identity) is not None:
            return True
        show = named(f"{cell.case.name}/{cell.defense.seed}: {cell.label}", progress, ", ")
        try:
            victim = victims.of(cell, show)
            if victim is None:
                return False
            store.put(cell.identity, plain(measure(cell, victim, show)))
        except OSError:  # a full disk ends the grid
            raise
        except Exception as error:  # whatever else ends this cell alone
            store.fail(cell.identity, error)
        return True


def measure(cell: Planned, victim: Victim, progress: Progress) -> Cell:
    """Measure a cell on its victim, whose clean samples are augmented as the cell says."""
    baseline = cell.baseline
    row = purified_row(victim, cell.label, cell.defense, baseline, progress)[0]
    return Cell(
        seed=cell.defense.seed,
        row=replace(row, victim=cell.case.name),
        case=plain(cell.case),
        versions=versions(),
        views=cell.views,
        threads=torch.get_num_threads(),
    )


class _Victims:
    """The victims of a grid as their defenses see them; the last one stays at hand."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._key: tuple[Any, ...] = ()
        self._last: Victim | None = None

    def of(self, cell: Planned, progress: Progress) -> Victim | None:
        """Return the victim of a cell; none while another process trains it.

        Raises:
            DivergenceError: If its training has failed, now or earlier.
        """
        key = (cell.victim.digest, cell.case.clean)
        if key != self._key:
            seed, device = cell.defense.seed, cell.device
            victim = kept_victim(self.store, cell.victim, cell.case, seed, progress, device)
            if victim is None:
                return None
            self._key, self._last = key, victim
        victim = self._last
        assert victim is not None
        return for_views(victim, cell.views)
