"""Keep the published figures true: ``docs/results.csv`` holds the cells of ``docs/results.md``.

    python recipes/results.py check                     # what `make results-check` does
    python recipes/results.py check --cells 1 --seed 7 --case 'digits-*'
    python recipes/results.py record out/grid --commit abc1234
    python recipes/results.py tables

What it shows: `check` draws cells at random, measures each again with the seeds of the published
one (victim included), and prints both beside each other; exit code 1 where one is off by more than
its spread. `record` takes the cells of a grid's folder into the file, in place of those of the same
victim, defense and views that have no more seeds. `tables` writes the tables of docs/results.md
from the file.

A cell is off where a mean has moved by more than twice the larger of both standard deviations, and
by more than two points. A cell whose data is not at hand is not drawn. Some take an hour: choose by
``--case``.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from mmdefense import registry
from mmdefense.data.batch import Views
from mmdefense.evaluation.cases import named_cases
from mmdefense.evaluation.grid import Cell, Grid, cell_of
from mmdefense.metrics.backdoor import Rates
from mmdefense.protocol import Case
from mmdefense.report.encoding import build
from mmdefense.report.terminal import ProgressDisplay
from mmdefense.store import Store

PUBLISHED = Path(__file__).parents[1] / "docs" / "results.csv"
PAGE = PUBLISHED.with_suffix(".md")
LIKE = "fine-tuning like "
USUAL = 3  # seeds; another number is said in the table
FLOOR = 2.0  # points; below it a change is no news, whatever the spread


@dataclass(frozen=True, kw_only=True)
class Published:
    """One cell: mean and standard deviation over the seeds, in percent; NaN where not measured.

    Attributes:
        case: Name of the victim.
        defense: ``"before"``, a defense, or plain fine-tuning with a defense's budget.
        views: How the clean samples were augmented.
        seeds: Number of seeds, from 0.
        metric: Mean of the task's metric (accuracy, mAP@50 or BLEU); ``metric_sd`` its deviation.
        asr: Mean attack success rate, and its deviation.
        ra: Mean accuracy on triggered samples by their true labels, and its deviation.
        commit: Of the code that measured it.
    """

    case: str
    defense: str
    views: Views
    seeds: int
    metric: float
    metric_sd: float
    asr: float
    asr_sd: float
    ra: float
    ra_sd: float
    commit: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a cell is a cell of."""
        return self.case, self.defense, self.views


def read(path: Path = PUBLISHED) -> list[Published]:
    """Return the cells of a file."""
    kinds = {field.name: field.type for field in fields(Published)}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            build(Published, {k: _value(kinds[k], text) for k, text in row.items()}, str(path))
            for row in csv.DictReader(file)
        ]


def _value(kind: object, text: str) -> object:
    if kind == "float":
        return float(text) if text else None
    return int(text) if kind == "int" else text


def write(cells: Iterable[Published], path: Path = PUBLISHED) -> None:
    """Write cells, one a line, with one decimal; an empty field stands for NaN."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Published)])
        for cell in cells:
            writer.writerow([_text(value) for value in asdict(cell).values()])


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.1f}"
    return str(value)


def summarised(cells: Sequence[Cell], commit: str) -> list[Published]:
    """Return the means over the seeds of measured cells, and those of the victims before."""
    groups: dict[tuple[str, str, Views], dict[int, Rates]] = defaultdict(dict)
    for cell in cells:
        groups[cell.row.victim, "before", cell.views][cell.seed] = cell.row.before
        groups[cell.row.victim, cell.row.defense, cell.views][cell.seed] = cell.row.after
    return [_mean(*key, list(rates.values()), commit) for key, rates in groups.items()]


def _mean(case: str, defense: str, views: Views, rates: Sequence[Rates], commit: str) -> Published:
    def over(name: str) -> tuple[float, float]:
        known = [100 * v for rate in rates if (v := getattr(rate, name)) is not None]
        mean = fmean(known) if known else float("nan")
        return mean, stdev(known) if len(known) > 1 else float("nan")

    (metric, metric_sd), (asr, asr_sd), (ra, ra_sd) = map(over, ("acc", "asr", "ra"))
    return Published(
        case=case,
        defense=defense,
        views=views,
        seeds=len(rates),
        metric=metric,
        metric_sd=metric_sd,
        asr=asr,
        asr_sd=asr_sd,
        ra=ra,
        ra_sd=ra_sd,
        commit=commit,
    )


def record(folder: Path, commit: str) -> None:
    """Take the cells of a grid's store into the published file."""
    store = Store(folder, create=False)
    entries = [entry for entry in store.entries("cell") if entry.status == "done"]
    cells = [cell_of(store, entry) for entry in entries]
    known = {cell.key: cell for cell in read()}
    for cell in summarised(cells, commit):
        if cell.key not in known or known[cell.key].seeds <= cell.seeds:
            known[cell.key] = cell
    write(known.values())
    print(f"{len(cells)} cells of {folder} are in {PUBLISHED}")


def check(count: int, seed: int, pattern: str) -> int:
    """Measure ``count`` random cells again; return the number of those that are off."""
    drawable = [
        cell
        for cell in read()
        if cell.defense != "before" and fnmatch.fnmatch(cell.case, pattern) and _at_hand(cell.case)
    ]
    drawn = random.Random(seed).sample(drawable, min(count, len(drawable)))
    off = 0
    for published in drawn:
        again = measured(published)
        moved = differences(published, again)
        off += bool(moved)
        name = f"{published.case}, {published.defense}, {published.views} views"
        print(f"{name}: published {_rates(published)}, measured {_rates(again)}: "
              f"{', '.join(moved) if moved else 'within its spread'}", flush=True)  # fmt: skip
    return off


def _at_hand(case: str) -> bool:
    """Say whether the data of a case is here, by name; nothing is read."""
    found: Case = named_cases([case])[0]
    return found.data in registry.load("tasks", found.task)().data()


def measured(published: Published) -> Published:
    """Return a cell as it is with today's code: a fresh victim and defense for each seed."""
    defense = published.defense.removeprefix(LIKE)
    grid = Grid(
        cases=named_cases([published.case]),
        defenses=[defense],
        seeds=range(published.seeds),
        baselines=published.defense.startswith(LIKE),
        views=[published.views],
    )
    with tempfile.TemporaryDirectory() as folder, ProgressDisplay() as progress:
        cells = summarised(grid.run(folder, progress), "")
    return next(cell for cell in cells if cell.defense == published.defense)


def differences(published: Published, again: Published) -> list[str]:
    """Return which means have moved by more than their spread, in words."""
    moved = []
    for name in ("metric", "asr", "ra"):
        old, new = getattr(published, name), getattr(again, name)
        deviations = [getattr(published, f"{name}_sd"), getattr(again, f"{name}_sd")]
        spread = max([FLOOR, *(2 * sd for sd in deviations if sd == sd)])
        if abs(old - new) > spread:  # never where either is NaN
            moved.append(f"{name} moved by {new - old:+.1f}, more than {spread:.1f}")
    return moved


def _rates(cell: Published) -> str:
    return f"{cell.metric:.1f} / {cell.asr:.1f} / RA {cell.ra:.1f}"


@dataclass(frozen=True)
class Table:
    """A table of a page; it stands between two comments, the first of which carries its name.

    Attributes:
        views: Of its cells.
        columns: The name of each column and the defense that it shows.
        victims: The name of each row and its victim.
    """

    views: Views
    columns: dict[str, str]
    victims: dict[str, str]

    def markdown(self, cells: dict[tuple[str, str, str], Published]) -> str:
        """Return the table: metric / ASR / RA of each cell with deviations, if measured."""
        lines = [
            "| " + " | ".join(["victim", *self.columns]) + " |",
            "|---" + "|--:" * len(self.columns) + "|",
        ]
        for name, case in self.victims.items():
            keys: list[tuple[str, str, Views]] = [
                (case, defense, self.views) for defense in self.columns.values()
            ]
            found = [cells.get(key) or cells.get(_same(*key)) for key in keys]
            seeds = max((cell.seeds for cell in found if cell is not None), default=USUAL)
            shown = [
                "" if cell is None else _shown(cell) + _few(cell.seeds, seeds) for cell in found
            ]
            lines.append("| " + " | ".join([name + _few(seeds, USUAL), *shown]) + " |")
        return "\n".join(lines)


def _few(seeds: int, usual: int) -> str:
    """Return the number of seeds in brackets where it is not the usual one."""
    return "" if seeds == usual else f" ({seeds} seed{'s' if seeds > 1 else ''})"


def _same(case: str, defense: str, views: Views) -> tuple[str, str, Views]:
    """Return the other name of a cell: FIP's steps and rate are those of plain fine-tuning."""
    return case, f"{LIKE}fip" if defense == "fine-tuning" else defense, views


def _shown(cell: Published) -> str:
    pairs = [(cell.metric, cell.metric_sd), (cell.asr, cell.asr_sd), (cell.ra, cell.ra_sd)]
    return " / ".join(
        f"{mean:.1f}" + (f" ± {sd:.1f}" if sd == sd else "") for mean, sd in pairs if mean == mean
    )


_IMAGES = {
    name: name.replace(", no backdoor", "-clean")
    for name in (
        "digits-badnets",
        "digits-blended",
        "mnist-badnets",
        "mnist-blended",
        "mnist-vit-badnets",
        "mnist-vit-blended",
        "digits, no backdoor",
    )
}
_DEFENSES = {
    "FIP": "fip",
    "Fast FIP": "fast-fip",
    "TSBD": "tsbd",
    "fine-pruning": "fine-pruning",
    "BAERASER": "baeraser",
}
_INSERTIONS = {"before": "before", "fine-tuning": "fine-tuning"} | _DEFENSES
_ACTING = {
    "before": "before",
    "fine-tuning": "fine-tuning",
    "FIP": "fip",
    "TSBD": "tsbd",
    "BAERASER": "baeraser",
}
TABLES = {
    "images, standard views": Table("standard", _ACTING, _IMAGES),
    "images, insertions": Table("insertions", _INSERTIONS, _IMAGES),
}


def with_tables(text: str, cells: Iterable[Published]) -> str:
    """Return a Markdown text with each table between its comments written anew."""
    known = {cell.key: cell for cell in cells}
    for name, table in TABLES.items():
        opened, closed = f"<!-- results: {name} -->\n", "\n<!-- end of results -->"
        before, found, rest = text.partition(opened)
        if found:
            _, _, after = rest.partition(closed)
            text = f"{before}{opened}{table.markdown(known)}{closed}{after}"
    return text


def main() -> int:
    """Run the command line of this recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="measure random cells again")
    checks.add_argument("--cells", type=int, default=3)
    checks.add_argument("--seed", type=int, default=random.randrange(10**6))
    checks.add_argument("--case", default="*", help="a pattern of victims to draw from")
    records = commands.add_parser("record", help="take a grid's cells into the file")
    records.add_argument("folder", type=Path)
    records.add_argument("--commit", required=True)
    commands.add_parser("tables", help="write the tables of the page from the file")
    options = parser.parse_args()
    if options.command == "tables":
        PAGE.write_text(with_tables(PAGE.read_text("utf-8"), read()), "utf-8")
        return 0
    if options.command == "record":
        record(options.folder, options.commit)
        return 0
    print(f"results-check: seed {options.seed}", flush=True)
    return int(check(options.cells, options.seed, options.case) > 0)


if __name__ == "__main__":
    sys.exit(main())
