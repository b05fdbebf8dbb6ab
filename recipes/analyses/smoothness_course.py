"""Watch the curvature of the clean loss while a backdoor is learnt, and while FIP removes it.

    python recipes/analyses/smoothness_course.py            # digits, SmallResNet: minutes
    python recipes/analyses/smoothness_course.py --smoke    # that it runs, no more

The paper (FIP, arXiv:2409.00863, Fig. 1 and 3): lambda_max and Tr(H) of a backdoored model are some
thirty times those of a benign one (616 and 7098 against 20 and 130), grow while the ASR does, and
fall with it during the purification. Measured here: see docs/analyses.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import mmdefense as mmd
from mmdefense.analysis.smoothness_course import Course, smoothness_course
from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import split
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses.base import Purifying
from mmdefense.evaluation.cases import described_case
from mmdefense.evaluation.grid import VIEWS
from mmdefense.kernels.loop import train as train_model
from mmdefense.pipeline.purification import configured
from mmdefense.report.page import write_analysis
from mmdefense_tasks.image_classification import ImageClassification

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="digits", help="digits or mnist")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--views", choices=VIEWS, default="standard", help="of the clean samples")
parser.add_argument("--out", type=Path, default=Path("out/analyses"), help="where the page goes")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% Data, a backdoored net and its clean twin from the same random weights.
case = described_case({"base": f"{options.data}-clean", "attack": "badnets"})
task = ImageClassification()
plain = task.load(options.data, split="train").in_memory()
train, test = task.for_training(plain), task.load(options.data, split="test").in_memory()
described = task.describe(plain)
torch.manual_seed(options.seed)
backdoored = mmd.adapt(task.victim(described["classes"], described["channels"]))
backdoored.samples(train)
benign = backdoored.fork()
attack = BadNets(target=0, ratio=0.1, seed=options.seed)
triggered = attack.triggered(test, backdoored)
training = replace(case.training, steps=20) if options.smoke else case.training
clean = split(plain, 0.01 if options.smoke else case.clean, options.seed)[1]
course = partial(
    smoothness_course,
    clean=clean,
    test=test,
    every=training.steps // (1 if options.smoke else 5),
    seed=options.seed,
    trace_error=None if options.smoke else 0.1,
)

# %% The curvature along their training, and along a purification.
courses: list[Course] = [
    course(
        "backdoored",
        backdoored,
        lambda run: attack.plant(backdoored, train, training, run),
        triggered=triggered,
        stage="victim",
    ),
    course(
        "benign",
        benign,
        lambda run: train_model(benign, train, training, run, stage="victim"),
        triggered=triggered,
        stage="victim",
    ),
]
assert isinstance(clean, LabelledSamples)
fit, holdout = split(clean, 0.2, options.seed)
few_steps = {"steps": 5} if options.smoke else {}
fip = configured("fip", {"seed": options.seed, "views": options.views, "restarts": 0, **few_steps})
purified = backdoored.fork()
courses.append(
    course(
        "purified by FIP",
        purified,
        lambda run: fip.attempt(Purifying(purified, fit, holdout, run)),
        triggered=triggered,
        stage="purify",
        every=5 if options.smoke else 30,
    )
)

# %% The table and the page.
rows = [["model", "updates", "ACC", "ASR", "λmax", "Tr(H) ± standard error", "probes"]]
for found in courses:
    for point in found.points:
        sharp = point.smoothness
        rows.append(
            [
                found.name,
                str(point.step),
                f"{point.acc:.1%}",
                f"{point.asr or 0:.1%}",
                f"{sharp.lambda_max:.3g}",
                f"{sharp.trace:.3g} ± {sharp.spread:.2g}",
                str(sharp.trace_probes),
            ]
        )
table = Table(*rows[0])
for row in rows[1:]:
    table.add_row(*row)
Console(width=110).print(table)
path = options.out / "smoothness_course.html"
plots = [each.plot() for each in courses]
write_analysis("Curvature of the clean loss", [], plots, path, rows)
print(f"page: {path}")
