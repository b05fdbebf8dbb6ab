"""A grid of measurements: cases x defenses x views x shares of clean data x seeds.

Each victim is trained once and each cell is measured once; both are stored under everything that
they depend on. Any number of processes may work on one grid: each claims a cell first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Any, get_args

import torch

from mmdefense.data.batch import Views
from mmdefense.defenses.base import Defense, versions
from mmdefense.defenses.fine_tuning import RandomInsertion
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.evaluation.cases import Change, CleanData, Kind
from mmdefense.evaluation.identity import cell_identity, victim_identity
from mmdefense.evaluation.kept import kept_victim, trained
from mmdefense.evaluation.lineup import Contender, Lineup, with_baselines
from mmdefense.evaluation.victims import Victim, for_defenses, purified_row
from mmdefense.evaluation.zoo import zoo_weights
from mmdefense.metrics.backdoor import Rates
from mmdefense.protocol import Case
from mmdefense.report.encoding import build, plain
from mmdefense.report.record import Row
from mmdefense.runtime.run import Progress, named
from mmdefense.store import Entry, Identity, Store

__all__ = ["VIEWS", "Cell", "Grid", "Planned", "cell_of", "measure", "work"]

VIEWS: tuple[Views, ...] = get_args(Views)
"""How clean samples may be augmented."""

_POLL = 0.5
"""Seconds between two checks of cells that other processes are working on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One defense against one victim, with one seed.

    Attributes:
        seed: Seed of the victim, the clean samples and the defense.
        row: What was measured; its ``victim`` is the name of the case.
        case: The description of the victim, as plain values.
        versions: Versions of the software, and the device.
        views: How the clean samples were augmented.
        kind: Kind of the clean samples; see :data:`mmdefense.evaluation.cases.Kind`.
        threads: Threads of each process that computed it.
    """

    seed: int
    row: Row
    case: Mapping[str, Any]
    versions: Mapping[str, str]
    views: Views = "standard"
    kind: Kind = "seen"
    threads: int = 1


@dataclass(frozen=True)
class Planned:
    """A cell to be measured.

    Attributes:
        case: The victim.
        label: Name of the defense in tables.
        defense: The defense with its settings and the seed, which is also the victim's.
        baseline: The label of plain fine-tuning with its budget; empty if there is none.
        views: How the clean samples are augmented.
        change: How they differ from the victim's training data, if they do.
        device: The device to compute on, for example ``"cuda:1"``.
        victim: Everything that its victim depends on.
        identity: Everything that the cell depends on.
        retune: Poisoned samples that the purified model is retuned on; 0 leaves this out.
    """

    case: Case
    label: str
    defense: Defense
    baseline: str
    views: Views
    change: Change | None
    device: str
    victim: Identity
    identity: Identity
    retune: int = 0

    @property
    def twin(self) -> Case | None:
        """The clean twin of the victim, which is retuned for comparison; None without retuning."""
        if not self.retune:
            return None
        return replace(self.case, name=f"{self.case.name}, clean twin", attack=None, settings={})

    @property
    def group(self) -> tuple[Any, ...]:
        """What cells that differ only in their seeds have in common."""
        return self.case.name, self.label, self.views, self.case.clean, self.kind

    @property
    def kind(self) -> Kind:
        """Kind of the clean samples."""
        return self.change or ("seen" if self.case.seen else "unseen")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to measure: every combination of the axes.

    Attributes:
        cases: The victims.
        defenses: Defenses with their settings; a name alone means its defaults.
        seeds: Seeds, with one victim and one purification each.
        baselines: Whether each defense that trains is followed by fine-tuning and FT-SAM with the
            same steps, learning rate and augmentation.
        views: How the clean samples are augmented.
        clean: Clean data that the defenses get: shares of the training set and kinds; by default
            as each case says.
        retune: Number of poisoned samples on which each purified model and a clean twin of its
            victim are retuned, to see whether the backdoor comes back; 0 leaves this out.
        device: The device to compute on.
        zoo: Whether the victims are loaded from the zoo, so that every machine has the same ones.
            Clean twins of ``retune`` are trained all the same.
    """

    cases: Sequence[Case]
    defenses: Sequence[Lineup | str]
    seeds: Sequence[int] = (0, 1, 2)
    baselines: bool = True
    views: Sequence[Views] = ("standard",)
    clean: Sequence[CleanData] = (CleanData(),)
    retune: int = 0
    device: str = "cpu"
    zoo: bool = False

    def planned(self) -> list[Planned]:
        """Return the cells in order, grouped by victim.

        Raises:
            BadInputError: If a name or setting is unknown, two cases or defenses have one name, or
                the zoo lacks a victim.
        """
        _check_names("cases", [case.name for case in self.cases])
        return [
            cell
            for case in self.cases
            for seed in self.seeds
            for clean in self.clean
            for views in self.views
            for cell in self._of(clean.of(case), seed, views, clean.change)
        ]

    def _of(self, case: Case, seed: int, views: Views, change: Change | None) -> Iterator[Planned]:
        """Yield each defense, followed by the baselines of its budget."""
        entries = [Lineup(defense=one) if isinstance(one, str) else one for one in self.defenses]
        defenses = {entry.name: entry.build(seed) for entry in entries}
        _check_names("defenses", [entry.name for entry in entries])
        weights = zoo_weights(case, seed) if self.zoo else ""
        victim = victim_identity(case, seed, self.device, weights)
        rows = starmap(Contender, defenses.items())
        for row in with_baselines(defenses) if self.baselines else rows:
            label, defense = row.label, _viewing(row.defense, views)
            retune = 0 if case.attack is None else self.retune
            identity = cell_identity(victim, case, label, defense, views, change, retune)
            yield Planned(
                case=case,
                label=label,
                defense=defense,
                baseline=row.baseline,
                views=views,
                change=change,
                device=self.device,
                victim=victim,
                identity=identity,
                retune=retune,
            )

    def run(
        self,
        folder: str | Path,
        progress: Progress | None = None,
        *,
        retry_failed: bool = False,
    ) -> list[Cell]:
        """Measure every cell that the store lacks, in this process, and return those that are done.

        A cell that fails is kept with its error, and by default not tried again.

        Args:
            folder: Folder of the store; created if it is missing.
            progress: Called with each :class:`~mmdefense.runtime.run.Event`.
            retry_failed: Whether to try failed cells and victims again.

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


def _check_names(what: str, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInputError(f"two {what} of the grid have the name {twice!r}; rename one")


def cell_of(store: Store, entry: Entry) -> Cell:
    """Return the cell of an entry that is done.

    Raises:
        BadInputError: If its file is missing or damaged.
    """
    cell: Cell = build(Cell, store.content(entry), f"cell {entry.name}")
    return cell


def forget_failures(store: Store, cells: Sequence[Planned]) -> None:
    """Remove failures of these cells and their victims, so that they are tried again."""
    for cell in cells:
        for identity in (cell.identity, cell.victim):
            entry = store.find(identity)
            if entry is not None and entry.status == "failed":
                store.forget(entry)


def work(store: Store, cells: Sequence[Planned], progress: Progress | None = None) -> None:
    """Measure cells until none is left.

    Victims are trained first. Then one cell of each kind is measured, and after these the others,
    the slowest kinds first, so that no process is left alone with a slow one. A cell that another
    process is working on, or whose victim it is training, is left to that process; this returns
    when all cells are done or failed.
    """
    victims, seconds = _Victims(store), dict[tuple[Any, ...], float]()
    left = _left(store, cells, seconds)
    for cell in {cell.victim.digest: cell for cell in left}.values():
        show = named(cell.victim.name, progress, ", ")
        trained(store, cell.victim, cell.case, cell.defense.seed, show, cell.device)
        if cell.twin is not None:
            twin = victim_identity(cell.twin, cell.defense.seed, cell.device)
            trained(store, twin, cell.twin, cell.defense.seed, show, cell.device)
    while left := _left(store, cells, seconds):
        if not any(_measured(store, cell, victims, progress) for cell in left):
            time.sleep(_POLL)  # other processes are working on all of them


def _left(
    store: Store, cells: Sequence[Planned], seconds: dict[tuple[Any, ...], float]
) -> list[Planned]:
    """Return the cells that the store lacks, those of kinds without a result first.

    Args:
        store: The store of cells.
        cells: All cells.
        seconds: How long a cell of each kind takes; filled with what the store has.
    """
    entries = {entry.digest: entry for entry in store.entries("cell")}
    for cell in cells:
        entry = entries.get(cell.identity.digest)
        if entry is not None and cell.group not in seconds:
            done = entry.status == "done"
            seconds[cell.group] = cell_of(store, entry).row.seconds if done else 0.0
    left = [cell for cell in cells if cell.identity.digest not in entries]
    return sorted(left, key=lambda cell: seconds.get(cell.group, math.inf), reverse=True)


def _measured(store: Store, cell: Planned, victims: _Victims, progress: Progress | None) -> bool:
    """Measure a cell and store it or its failure; return False if another process is first."""
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
        except Exception as error:  # anything else ends only this cell
            store.fail(cell.identity, error)
        return True


def _viewing(defense: Defense, views: Views) -> Defense:
    """Return the defense with these views, if it has them as a free setting."""
    fixed = isinstance(defense, RandomInsertion) or not hasattr(defense, "views")
    return defense if fixed else replace(defense, views=views)  # type: ignore[call-arg]


def measure(cell: Planned, victim: Victim, progress: Progress) -> Cell:
    """Measure a cell on its victim; note it if there are no clean samples of its kind."""
    seed = cell.defense.seed
    try:
        given = for_defenses(victim, cell.case, cell.change, seed)
        row, _ = purified_row(given, cell.label, cell.defense, cell.baseline, progress)
    except UnsupportedError as error:
        row = Row(
            defense=cell.label,
            before=victim.before,
            after=Rates(),
            seconds=0.0,
            settings=asdict(cell.defense),
            note=str(error),
        )
    return Cell(
        seed=seed,
        row=replace(row, victim=cell.case.name),
        case=plain(cell.case),
        versions=versions(),
        views=cell.views,
        kind=cell.kind,
        threads=torch.get_num_threads(),
    )


class _Victims:
    """The victims of a grid; the last one stays in memory."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._key: tuple[Any, ...] = ()
        self._last: Victim | None = None

    def of(self, cell: Planned, progress: Progress) -> Victim | None:
        """Return the victim of a cell; None while another process trains it.

        Raises:
            DivergenceError: If its training has failed, now or earlier.
        """
        # the share of clean samples is not part of a victim that saw all samples
        key = (cell.victim.digest, cell.case.clean, cell.retune)
        if key != self._key:
            seed, device = cell.defense.seed, cell.device
            victim = kept_victim(self.store, cell.victim, cell.case, seed, progress, device)
            if victim is None:
                return None
            if cell.twin is not None:
                identity = victim_identity(cell.twin, seed, device)
                twin = kept_victim(self.store, identity, cell.twin, seed, progress, device)
                if twin is None:
                    return None
                victim = replace(victim, retune=cell.retune, twin=twin.adapter)
            self._key, self._last = key, victim
        victim = self._last
        assert victim is not None
        return victim
