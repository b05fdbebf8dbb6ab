"""Measure defenses by the field's own protocol, beside what the papers and the leaderboard report.

    python recipes/benchmarks/protocol.py run --device cuda            # a part of 8 minutes
    python recipes/benchmarks/protocol.py run --device cuda            # the next part, and so on
    python recipes/benchmarks/protocol.py table                        # ours, theirs, difference
    python recipes/benchmarks/protocol.py run --smoke                  # that it runs, no more

PreActResNet18 on CIFAR-10 (`cifar10_jpeg`, found through MMDEFENSE_DATA), 10 % poisoned, target 0,
5 % of the training set as clean data, standard views. Victims are trained for 40 epochs on a
one-cycle schedule (the leaderboard: 100 epochs at 0.01 on a cosine), so that one fits into a part.
`published.csv` holds the figures to compare with, each with its source. Fine-tuning, FT-SAM and
NAD have the budget of the leaderboard, all other defenses their defaults.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mmdefense.evaluation.cases import CleanData
from mmdefense.evaluation.grid import Grid, work
from mmdefense.evaluation.lineup import Lineup
from mmdefense.protocol import Case
from mmdefense.report.terminal import shown
from mmdefense.store import Store
from mmdefense.training import Training

PUBLISHED = Path(__file__).with_name("published.csv")
EPOCHS, IMAGES, BATCH = 40, 50_000, 128
EPOCH = IMAGES // BATCH
FIELD = {"lr": 0.01, "steps": 1000, "batch_size": 256}
"""The leaderboard's budget of fine-tuning: 100 epochs of 2,500 images."""
ATTACKS: dict[str, dict[str, Any]] = {
    "badnets": {},
    "blended": {},
    "trojannn": {},
    "input-aware": {"mask_steps": 10 * EPOCH},
    "lc": {"ratio": 1.0},  # of the target's images: a tenth of the training set
    "sig": {"ratio": 1.0},
    "lira": {"joint_steps": 20 * EPOCH},
    "ssba": {},
    "lf": {},
    "wanet": {},
}
DEFENSES: list[str | Lineup] = [
    Lineup(defense="fine-tuning", settings=FIELD, label="fine-tuning"),
    Lineup(defense="ft-sam", settings=FIELD, label="ft-sam"),
    Lineup(defense="nad", settings=FIELD, label="nad"),
    "fip",
    "fast-fip",
    "tsbd",
    "fine-pruning",
    "baeraser",
    "nft",
    "fst",
    "i-bau",
    "sau",
    "anp",
    "rnp",
    "awm",
    "clp",
    "neural-cleanse",
]


@dataclass(frozen=True)
class Published:
    """A figure of a paper or a leaderboard, in percent."""

    source: str
    attack: str
    defense: str
    acc: float
    asr: float


def published() -> list[Published]:
    """Return all figures, as the file has them."""
    with PUBLISHED.open(newline="") as file:
        return [
            Published(r["source"], r["attack"], r["defense"], float(r["acc"]), float(r["asr"]))
            for r in csv.DictReader(file)
        ]


def grid_of(device: str, seeds: Sequence[int]) -> Grid:
    """Return all attacks x all defenses."""
    training = Training(
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        lr=0.1,
        weight_decay=5e-4,
        schedule="one-cycle",
        check_every=200,
    )
    case = Case(
        name="",
        task="image-classification",
        data="cifar10_jpeg",
        model="mmdefense_tasks.victims:PreActResNet18(classes={classes}, channels={channels})",
        training=training,
        attack=None,
    )
    return Grid(
        cases=[
            replace(case, name=name, attack=name, settings=settings)
            for name, settings in ATTACKS.items()
        ],
        defenses=DEFENSES,
        seeds=seeds,
        baselines=False,
        views=("standard",),
        clean=(CleanData(share=0.05),),
        device=device,
    )


def smoke(grid: Grid) -> Grid:
    """Return a few steps of two attacks and two defenses on digits."""
    net = "mmdefense_tasks.victims:SmallResNet(classes={classes}, channels={channels})"
    short = {"steps": 5, "batch_size": 64}
    return replace(
        grid,
        cases=[
            replace(
                case, data="digits", model=net, training=replace(case.training, steps=20, lr=0.05)
            )
            for case in grid.cases[:2]
        ],
        defenses=[
            Lineup(defense=name, settings=short, label=name) for name in ("fine-tuning", "ft-sam")
        ],
        device="cpu",
    )


def run(grid: Grid, store: Store, budget: float) -> None:
    """Measure cells in order; begin none that would not end within the budget, in seconds."""
    began, longest = time.monotonic(), 0.0
    planned = grid.planned()
    with shown("auto") as progress:
        for cell in planned:
            if store.find(cell.identity) is not None:  # measured, or failed
                continue
            start = time.monotonic()
            if start - began + longest > budget:
                break
            work(store, [cell], progress)
            longest = max(longest, time.monotonic() - start)
    print(f"{len(grid.measured(store))} of {len(planned)} cells measured")


def rows(grid: Grid, store: Store) -> Iterator[str]:
    """Yield a Markdown table: what was measured here beside each published figure."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for cell in grid.measured(store):
        attack, row = str(cell.case["attack"]), cell.row
        for defense, rates in (("none", row.before), (row.defense, row.after)):
            if rates.acc is not None and rates.asr is not None:
                found[attack, defense].append((100 * rates.acc, 100 * rates.asr))
    yield "| source | attack | defense | theirs, ACC / ASR | ours | difference |"
    yield "|---|---|---|--:|--:|--:|"
    for theirs in published():
        ours = _ours(found, theirs)
        cells = ["not measured", ""]
        if ours is not None:
            acc, asr = ours
            cells = [
                f"{acc:.2f} / {asr:.2f}",
                f"{acc - theirs.acc:+.2f} / {asr - theirs.asr:+.2f}",
            ]
        figures = f"{theirs.acc:.2f} / {theirs.asr:.2f}"
        yield f"| {' | '.join([theirs.source, theirs.attack, theirs.defense, figures, *cells])} |"


def _ours(
    found: dict[tuple[str, str], list[tuple[float, float]]], theirs: Published
) -> tuple[float, float] | None:
    """Return the mean ACC and ASR over the seeds; of a mean over attacks, once all are measured."""
    attacks = list(ATTACKS) if theirs.attack == "mean" else [theirs.attack]
    each = [found.get((attack, theirs.defense), []) for attack in attacks]
    if not all(each):
        return None
    means = [(fmean(acc for acc, _ in part), fmean(asr for _, asr in part)) for part in each]
    return fmean(acc for acc, _ in means), fmean(asr for _, asr in means)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--out", type=Path, default=Path("out/protocol"), help="the store")
    parser.add_argument("--device", default="cuda", help="such as cuda or cpu")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of one part")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
    options = parser.parse_args()
    grid = grid_of(options.device, range(options.seeds))
    if options.smoke:
        grid = smoke(grid)
    store = Store(options.out)
    if options.command == "run":
        run(grid, store, options.budget)
    print("\n".join(rows(grid, store)))


if __name__ == "__main__":
    main()
