"""Plant a backdoor in an image classifier, remove it with a little clean data, measure both.

    python recipes/image_classification.py                     # handwritten digits, embedded
    python recipes/image_classification.py --data gtsrb32      # a set of the folder MMDEFENSE_DATA
    python recipes/image_classification.py --data ~/my_images  # train/CLASS/*.png, test/CLASS/*.png
    python recipes/image_classification.py --smoke             # does it run at all: seconds

What it shows: a classifier that is good on clean images and obeys a patch of 3x3 pixels; and what
is left of both after each defense, beside plain fine-tuning with the same steps and learning rate.

Measured: see the tables in docs/results.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

import mmdefense as mmd
from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import split
from mmdefense.defenses.base import Defense
from mmdefense.defenses.fip import FIP
from mmdefense.evaluation.victims import Victim, compared
from mmdefense.pipeline.purification import configured
from mmdefense.report.tables import results_table
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import ImageClassification, load_data
from mmdefense_tasks.victims import SmallResNet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="digits", help="a name of `mmdefense list data`, or a folder")
parser.add_argument("--defense", action="append", help="may be repeated; by default all five")
parser.add_argument("--steps", type=int, help="of training the victim; digits 300, mnist 700")
parser.add_argument("--clean", type=float, default=0.05, help="share of the training set given")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="where the purified models and their pages go")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% Data: images in [0, 1], shape (N, C, H, W), and labels. Training images are shifted about.
train = load_data(options.data, split="train")
test = load_data(options.data, split="test")
train, test = (part.in_memory() for part in (train, test))
classes = int(train.labels.max()) + 1
channels = train.inputs.shape[1]

# %% The victim: the attacker stamps a patch on 10 % of the training images and labels them 0.
steps = options.steps or (20 if options.smoke else 300 if options.data == "digits" else 700)
torch.manual_seed(options.seed)  # for the random weights; all else has a seed of its own
adapter = mmd.adapt(SmallResNet(classes, channels))
attack = BadNets(target=0, ratio=0.1, seed=options.seed).plant(
    adapter,
    train,
    Training(steps=steps, lr=0.1, weight_decay=5e-4, schedule="one-cycle", max_norm=5.0),
    Run(options.seed),
)

# %% The defender has a few clean samples, and knows neither the trigger nor the target; the judge,
# who measures on test data, knows both.
clean = split(train, options.clean, options.seed)[1]
victim = Victim(ImageClassification(), adapter, attack, clean, test)
before = victim.before
print(f"the victim: ACC {before.acc:.1%}, ASR {before.asr:.1%}, RA {before.ra:.1%}")
names = options.defense or ["fip", "fast-fip", "tsbd", "fine-pruning", "baeraser"]
if options.smoke:
    defenses: dict[str, Defense] = {"fip": FIP(steps=5)}
else:
    defenses = {name: configured(name, {"seed": options.seed}) for name in names}

# %% Each defense at its defaults, and beside it plain fine-tuning with the same budget. What is
# left is measured by a judge who knows the trigger.
rows = []
for row, purified in compared(victim, defenses):
    rows.append(row)
    if purified is not None and options.out is not None:
        purified.save(options.out / row.defense.replace(" ", "-"))
Console(width=120).print(results_table(rows, f"{options.data}, BadNets at 10 %"))
