"""Plant a backdoor in a classifier of point clouds, remove it with few clean ones, measure both.

    python recipes/point_cloud_classification.py                       # eight surfaces, embedded
    python recipes/point_cloud_classification.py --data radhar_points  # a set of MMDEFENSE_DATA
    python recipes/point_cloud_classification.py --data ~/my_meshes    # train/CLASS/*.off, test/...
    python recipes/point_cloud_classification.py --attack irba --model PointTransformer
    python recipes/point_cloud_classification.py --smoke               # does it run at all: seconds

What it shows: a PointNet that is good on clean clouds and obeys sixteen points at a place that the
attacker searched for (PCBA); and what is left of both after each defense, beside plain fine-tuning
with the same steps and learning rate. Folders of ply, pcd, obj or off files need Open3D:
pip install 'mmdefense[points]'.

Measured: see the table in the README.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

import mmdefense as mmd
from mmdefense import registry
from mmdefense.batches import split
from mmdefense.defenses.base import Defense
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.fip import FIP
from mmdefense.kernels.loop import Training
from mmdefense.kernels.run import Run
from mmdefense.metrics.backdoor import defense_effectiveness_rating, measure
from mmdefense.purification import configured
from mmdefense.report.record import Rates, Row
from mmdefense.report.tables import results_table
from mmdefense_tasks import point_victims
from mmdefense_tasks.point_clouds import PointCloudClassification, load_clouds

ATTACKS = ("pcba", "pointpba", "pointcba", "irba")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="surfaces", help="a name of `mmdefense list data`, or a path")
parser.add_argument("--attack", default="pcba", choices=ATTACKS)
parser.add_argument("--model", default="PointNet", choices=point_victims.__all__)
parser.add_argument("--points", type=int, default=256, help="of each cloud")
parser.add_argument("--defense", action="append", help="may be repeated; by default all five")
parser.add_argument("--steps", type=int, default=300, help="of training the victim")
parser.add_argument("--clean", type=float, default=0.1, help="share of the training set given")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="where the purified models and their pages go")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% Data: clouds in the unit sphere, shape (N, P, 3), and labels. Training clouds are jittered.
if options.smoke:
    options.points, options.steps = 32, 20
train = load_clouds(options.data, split="train", points=options.points)
test = load_clouds(options.data, split="test", points=options.points)
described = PointCloudClassification.describe(train)

# %% The victim: the attacker puts a trigger into 10 % of the training clouds and labels them 0.
torch.manual_seed(options.seed)  # for the random weights; all else has a seed of its own
victim = mmd.adapt(getattr(point_victims, options.model)(**described))
victim.samples(train)
attack = registry.load("attacks", options.attack)(seed=options.seed).plant(
    victim,
    PointCloudClassification.for_training(train),
    Training(
        steps=options.steps,
        batch_size=64,
        lr=2e-3,
        weight_decay=1e-2,
        schedule="one-cycle",
        optimizer="adamw",
        max_norm=5.0,
    ),
    Run(options.seed),
)
triggered = attack.triggered(test, victim)
before = measure(victim, victim.samples(test), triggered)
print(f"the victim: ACC {before.acc:.1%}, ASR {before.asr:.1%}, RA {before.ra:.1%}")

# %% The defender has a few clean clouds, and knows neither the trigger nor the target.
clean = split(train, options.clean, options.seed)[1]
names = options.defense or ["fip", "fast-fip", "tsbd", "fine-pruning", "baeraser"]
if options.smoke:
    defenses: dict[str, Defense] = {"fip": FIP(steps=5)}
else:
    defenses = {name: configured(name, {"seed": options.seed}) for name in names}


def purify(name: str, defense: Defense, baseline: str = "") -> Row:
    """Purify the victim, and return what a judge who knows the trigger makes of it."""
    purified = mmd.purify(victim, clean, defense)
    if options.out is not None:
        purified.save(options.out / name.replace(" ", "-"))
    after = measure(purified.result.adapter, victim.samples(test), triggered)
    der = defense_effectiveness_rating(before, after)
    return Row(
        defense=name,
        before=Rates(acc=before.acc, asr=before.asr, ra=before.ra),
        after=Rates(acc=after.acc, asr=after.asr, ra=after.ra, der=der),
        seconds=purified.result.seconds,
        baseline=baseline,
        violated=purified.guard.violated,
    )


# %% Each defense at its defaults, and beside it plain fine-tuning with the same budget.
rows = []
for name, defense in defenses.items():
    baseline = f"fine-tuning like {name}"
    rows.append(purify(name, defense, baseline))
    rows.append(purify(baseline, FineTuning.like(defense)))
Console(width=120).print(results_table(rows, f"{options.data}, {attack.in_words()}"))
