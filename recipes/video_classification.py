"""Plant a backdoor in a model of clips, remove it with a few clean ones, measure both.

    python recipes/video_classification.py                     # moving digits, embedded
    python recipes/video_classification.py --data ucf101_mini  # a set of MMDEFENSE_DATA's folder
    python recipes/video_classification.py --data ~/my_videos  # train/CLASS/*.avi, test/CLASS/*.avi
    python recipes/video_classification.py --attack temporal-patch  # or blended, ...
    python recipes/video_classification.py --smoke             # does it run at all: seconds

What it shows: a model that knows what moves how and obeys a patch of 3x3 pixels in its frames; and
what is left of both after each defense, beside plain fine-tuning with the same steps and learning
rate. Of real videos several clips are scored, and their mean is the answer for the video.

Measured: see the tables in docs/results.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

import mmdefense as mmd
from mmdefense import registry
from mmdefense.data.batch import split
from mmdefense.defenses.base import Defense
from mmdefense.defenses.fip import FIP
from mmdefense.evaluation.victims import Victim, compared
from mmdefense.pipeline.purification import configured
from mmdefense.report.tables import results_table
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.video_classification import VideoClassification, top_accuracy
from mmdefense_tasks.video_victims import SmallVideoResNet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="moving-digits", help="a name of `list data`, or a folder")
parser.add_argument("--attack", default="badnets", help="a name of `mmdefense list attacks`")
parser.add_argument("--defense", action="append", help="may be repeated; by default all five")
parser.add_argument("--steps", type=int, default=300, help="of training the victim")
parser.add_argument("--clean", type=float, default=0.1, help="share of the training set given")
parser.add_argument("--clips", type=int, default=3, help="of each test video, but for the digits")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="where the purified models and their pages go")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% Data: clips in [0, 1], shape (N, C, T, H, W), and labels. Clips of a test video share a score.
task = VideoClassification()
clips = 1 if options.data == "moving-digits" else options.clips
train = task.load(options.data, split="train")
test = task.load(options.data, split="test", clips=clips)
train, test = (part.in_memory() for part in (train, test))
if options.smoke:
    train, test = (part.subset(torch.arange(0, len(part), 20)) for part in (train, test))
shape = task.describe(train)

# %% The victim: the attacker stamps the trigger on some training clips; all but one attack relabel.
torch.manual_seed(options.seed)  # for the random weights; all else has a seed of its own
adapter = mmd.adapt(SmallVideoResNet(shape["classes"], shape["channels"]))
attack = registry.load("attacks", options.attack)(seed=options.seed).plant(
    adapter,
    task.for_training(train),
    Training(
        steps=10 if options.smoke else options.steps,
        batch_size=64,
        lr=0.1,
        weight_decay=5e-4,
        schedule="one-cycle",
        max_norm=5.0,
    ),
    Run(options.seed),
)

# %% The defender has a few clean samples, and knows neither the trigger nor the target; the judge,
# who measures on test data, knows both.
clean = split(train, options.clean, options.seed)[1]
victim = Victim(task, adapter, attack, clean, test)
before = victim.before
levels = ", ".join(f"{top_accuracy(adapter, test, level=level):.1%} by {level}"
                   for level in ("clip", "video"))  # fmt: skip
print(f"the victim: ACC {levels}, ASR {before.asr:.1%}, RA {before.ra:.1%}")
if shape["classes"] >= 10:
    print(f"top-5: {top_accuracy(adapter, test, top=5):.1%} by video")
names = options.defense or ["fip", "fast-fip", "tsbd", "fine-pruning", "baeraser"]
if options.smoke:
    defenses: dict[str, Defense] = {"fip": FIP(steps=2, max_utility_drop=1.0)}
else:
    defenses = {name: configured(name, {"seed": options.seed}) for name in names}

# %% Each defense at its defaults, and beside it plain fine-tuning with the same budget. What is
# left is measured by a judge who knows the trigger.
rows = []
for row, purified in compared(victim, defenses):
    rows.append(row)
    if purified is not None and options.out is not None:
        purified.save(options.out / row.defense.replace(" ", "-"))
Console(width=120).print(results_table(rows, f"{options.data}, {attack.in_words()}"))
