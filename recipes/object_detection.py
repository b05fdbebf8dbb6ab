"""Plant a backdoor in an object detector, remove it with a little clean data, measure both.

    python recipes/object_detection.py                             # digits in scenes, embedded
    python recipes/object_detection.py --data bccd_voc             # a set of MMDEFENSE_DATA
    python recipes/object_detection.py --data ~/voc --clean 0.2    # VOC, COCO json or json lines
    python recipes/object_detection.py --attack object-generation  # or another of BadDet's
    python recipes/object_detection.py --smoke                     # does it run at all: seconds

What it shows: a detector (torchvision's FCOS over a small pyramid) that finds the objects of clean
images, and takes an object with a chessboard in its corner for the attacker's class; and what is
left of both after each defense, beside plain fine-tuning with the same budget. mAP@50 is the mAP at
IoU 0.5, ASR the share of objects that turn into the target.

Measured: see the tables in docs/results.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import mmdefense as mmd
from mmdefense import registry
from mmdefense.data.batch import split
from mmdefense.defenses.base import Defense
from mmdefense.defenses.fip import FIP
from mmdefense.evaluation.victims import Victim, compared
from mmdefense.metrics.detection import mean_average_precision
from mmdefense.pipeline.purification import configured
from mmdefense.report.tables import results_table
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.detection_scenes import digit_scenes
from mmdefense_tasks.detection_victims import small_fcos
from mmdefense_tasks.object_detection import ObjectDetection, load_detection

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="digit-scenes", help="a name, or a folder")
parser.add_argument("--attack", default="regional-misclassification")
parser.add_argument("--defense", action="append", help="may be repeated; by default all five")
parser.add_argument("--steps", type=int, default=400, help="of training the victim")
parser.add_argument("--clean", type=float, default=0.1, help="share of the training set given")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="where the purified models and their pages go")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% Data: images in [0, 1], and for each the boxes (M, 4) in pixels and labels (M,) of its objects.
if options.smoke:
    train, test = digit_scenes("train", count=80), digit_scenes("test", count=16)
else:
    train = load_detection(options.data, split="train")
    test = load_detection(options.data, split="test")
task = ObjectDetection()

# %% The victim: the attacker alters 10 % of the training images and their annotations.
described = task.describe(train)
torch.manual_seed(options.seed)  # for the random weights; all else has a seed of its own
adapter = mmd.adapt(small_fcos(**described))
attack = registry.load("attacks", options.attack)(ratio=0.1, seed=options.seed).plant(
    adapter,
    task.for_training(train),
    Training(
        steps=3 if options.smoke else options.steps,
        batch_size=16 if options.smoke else 64,
        lr=0.005,
        weight_decay=1e-4,
        schedule="one-cycle",
        max_norm=5.0,
        optimizer="adamw",
    ),
    Run(options.seed),
)

# %% The defender has a few clean samples, and knows neither the trigger nor the target; the judge,
# who measures on test data, knows both.
clean = split(train, options.clean, options.seed)[1]
victim = Victim(task, adapter, attack, clean, test)
before = victim.before
detector: Any = adapter
precision = mean_average_precision(detector, test)["map"]
print(f"the victim: mAP@50 {before.acc:.1%}, mAP {precision:.1%}, ASR {before.asr:.1%}")
names = options.defense or ["fip", "fast-fip", "tsbd", "fine-pruning", "baeraser"]
if options.smoke:
    defenses: dict[str, Defense] = {"fip": FIP(steps=2, batch_size=4, max_utility_drop=1.0)}
else:
    defenses = {name: configured(name, {"seed": options.seed}) for name in names}

# %% Each defense at its defaults, and beside it plain fine-tuning with the same budget. What is
# left is measured by a judge who knows the trigger.
rows = []
for row, purified in compared(victim, defenses):
    rows.append(row)
    if purified is not None and options.out is not None:
        purified.save(options.out / row.defense.replace(" ", "-"))
title = f"{options.data}, {options.attack} at 10 %"
Console(width=120).print(results_table(rows, title, task.metric))
