"""Victim x defense x seed, each measured once and kept; mean and spread over the seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from mmdefense import registry
from mmdefense.checkpoints.runs import RunStore, write_atomically
from mmdefense.defenses.base import Defense, versions
from mmdefense.errors import BadInputError
from mmdefense.evaluation.victims import Case, Victim, baseline_of, purified_row, train_victim
from mmdefense.kernels.run import Event, Progress, Run
from mmdefense.metrics.definitions import heading
from mmdefense.report.encoding import build, plain
from mmdefense.report.formats import number
from mmdefense.report.record import Rates, Row

__all__ = ["VIEWS", "Cell", "Grid", "Views", "markdown"]

Views = Literal["insertions", "standard"]
"""How clean samples are augmented for a defense.

``"standard"``: as those do who train such models, for images padding and cropping.
``"insertions"``: by the project's own augmentation, which also inserts noise, points or words, and
so imitates triggers of that kind.
"""

VIEWS: tuple[Views, ...] = ("insertions", "standard")

_COLUMNS = ("acc", "asr", "ra", "der")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One defense against one victim, with one seed.

    Attributes:
        seed: Of the victim, the clean samples and the defense.
        row: What was measured; its ``victim`` is the name of the case.
        case: The description of the victim, as plain values.
        versions: Of what computed it.
        views: How the clean samples were augmented.
    """

    seed: int
    row: Row
    case: Mapping[str, Any]
    versions: Mapping[str, str]
    views: Views = "insertions"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured. Cells that are already in the folder are not measured again.

    Attributes:
        cases: The victims.
        defenses: Names of defenses, each at its defaults: no tuning per victim.
        seeds: One victim and one purification each.
        baselines: Whether each defense that trains gets plain fine-tuning with the same steps,
            learning rate and augmentation beside it.
        views: How the clean samples are augmented.
    """

    cases: Sequence[Case]
    defenses: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    baselines: bool = True
    views: Views = "insertions"

    def run(self, folder: str | Path, progress: Progress | None = None) -> list[Cell]:
        """Measure every cell that ``folder`` lacks, and return all.

        A cell is kept as ``folder/case/defense-seed.json`` as soon as it is measured, one with
        standard views as ``folder/case/defense-standard-views-seed.json``, and a victim as
        ``folder/case/victim-seed/``. A kept cell of other settings or another case of the same
        name is measured anew.

        Args:
            folder: Made where it is missing.
            progress: Called with each sign of progress.

        Raises:
            BadInputError: If a name is unknown or a kept file is damaged.
        """
        root = Path(folder)
        cells: list[Cell] = []
        for case in self.cases:
            for seed in self.seeds:
                cells += self._of_victim(case, seed, root / case.name, progress)
        return cells

    def _of_victim(
        self, case: Case, seed: int, folder: Path, progress: Progress | None
    ) -> Iterator[Cell]:
        victim: Victim | None = None  # trained, or read from its store, only where it is needed
        for name, defense, baseline in self._lineup(seed):
            views = "" if self.views == "insertions" else f"-{self.views}-views"
            path = folder / f"{name.replace(' ', '-')}{views}-{seed}.json"
            cell = _kept(path, case, defense)
            if cell is None:
                show = _prefixed(f"{case.name}/{seed}: {name}", progress)
                victim = victim or _victim(case, seed, folder / f"victim-{seed}", self.views, show)
                cell = _measure(case, victim, name, defense, baseline, show)
                cell = replace(cell, views=self.views)
                write_atomically(path, _writer(cell))
            yield cell

    def _lineup(self, seed: int) -> Iterator[tuple[str, Defense, str]]:
        """Yield each defense with its name and that of its baseline, baselines right after."""
        for name in self.defenses:
            defense = registry.load("defenses", name)(seed=seed)
            plain_training = baseline_of(defense) if self.baselines else None
            baseline = f"fine-tuning like {name}" if plain_training else ""
            yield name, defense, baseline
            if plain_training:
                yield baseline, plain_training, ""


def _prefixed(name: str, progress: Progress | None) -> Progress:
    if progress is None:
        return lambda event: None
    shown: Callable[[Event], None] = progress
    return lambda event: shown(
        Event(f"{name}, {event.stage}", event.step, event.total, event.figures)
    )


def _victim(case: Case, seed: int, folder: Path, views: Views, progress: Progress) -> Victim:
    victim = train_victim(case, Run(seed, progress, RunStore(folder)))
    if views == "insertions":
        return victim
    return replace(victim, clean=victim.task.for_training(victim.clean))


def _measure(
    case: Case, victim: Victim, name: str, defense: Defense, baseline: str, progress: Progress
) -> Cell:
    row = purified_row(victim, name, defense, baseline, progress)[0]
    named = replace(row, victim=case.name)
    return Cell(seed=defense.seed, row=named, case=plain(case), versions=versions())


def _writer(cell: Cell) -> Callable[[Any], object]:
    return lambda file: file.write((json.dumps(plain(cell), indent=2) + "\n").encode())


def _kept(path: Path, case: Case, defense: Defense) -> Cell | None:
    """Return the cell in a file, if there is one of this case with these settings."""
    if not path.exists():
        return None
    try:
        cell: Cell = build(Cell, json.loads(path.read_text(encoding="utf-8")), "cell")
    except (ValueError, OSError) as error:
        raise BadInputError(f"cell {path} cannot be read; remove it to measure anew") from error
    same = cell.case == plain(case) and cell.row.settings == plain(defense)
    return cell if same else None


def markdown(cells: Iterable[Cell]) -> str:
    """Return the table of a grid as Markdown: rates in percent, mean and standard deviation.

    Where the victims are of tasks with other metrics than accuracy, these stand by the victim.

    Args:
        cells: In the order of the table; those of one case and defense are averaged.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    metrics: dict[str, str] = {}
    for cell in cells:
        groups.setdefault((cell.row.victim, cell.row.defense), []).append(cell.row)
        metrics[cell.row.victim] = _metric(cell)
    mixed = len(set(metrics.values())) > 1
    metric = "task metric" if mixed else heading(next(iter(metrics.values()), "accuracy"))
    head = ["victim", "defense", metric, "ASR", "RA", "DER", "seconds", "beats its baseline"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 5 + "---|"]
    shown = ""
    for (victim, defense), rows in groups.items():
        if victim != shown:
            shown = victim
            before = f"*before*, {metrics[victim]}" if mixed else "*before*"
            lines.append(_line([victim, before, *_rates([r.before for r in rows]), "", ""]))
        beats = _beats(rows, groups.get((victim, rows[0].baseline)))
        guard = "; ".join(
            f"{what} in {count} of {len(rows)}"
            for what, count in (
                ("guard violated", sum(row.violated for row in rows)),
                ("guard not decidable", sum(bool(row.undecided) for row in rows)),
                ("another state than the final one", sum(bool(row.instead) for row in rows)),
            )
            if count
        )
        seconds = f"{fmean(row.seconds for row in rows):.1f}"
        rates = _rates([row.after for row in rows])
        note = "; ".join(part for part in (rows[0].note, beats, guard) if part)
        lines.append(_line([victim, defense, *rates, seconds, note]))
    return "\n".join(lines) + "\n"


def _metric(cell: Cell) -> str:
    """Return the metric of a cell's task; of a task that is not known here, the accuracy."""
    task = str(cell.case.get("task"))
    known = task in registry.names("tasks")
    return str(registry.load("tasks", task).metric) if known else "accuracy"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rates(rates: Sequence[Rates]) -> list[str]:
    return [_mean([getattr(rate, field) for rate in rates]) for field in _COLUMNS]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return number(None)
    spread = f" ± {100 * stdev(known):.1f}" if len(known) > 1 else ""
    return f"{number(fmean(known))}{spread}"


def _beats(rows: Sequence[Row], baseline: Sequence[Row] | None) -> str:
    """Say whether the mean DER is above that of plain fine-tuning with the same budget."""
    own, other = ([r.after.der for r in part if r.after.der is not None]
                  for part in (rows, baseline or ()))  # fmt: skip
    if not own or not other:
        return ""
    return "yes" if fmean(own) > fmean(other) else "no"
