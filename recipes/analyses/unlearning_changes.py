"""Unlearn clean and poisoned data; compare how far units move, and a benign net with a victim.

    python recipes/analyses/unlearning_changes.py            # digits, SmallResNet: minutes
    python recipes/analyses/unlearning_changes.py --smoke    # that it runs, no more

The paper (TSBD, arXiv:2405.20291, Fig. 1): the neuron weight changes under clean and under
poison unlearning are positively correlated, and the units of a backdoored model have larger
gradient norms than a clean model's. Measured here: see docs/analyses.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from mmdefense.analysis.unlearning_changes import activeness, unlearning_changes
from mmdefense.defenses.base import viewed
from mmdefense.evaluation.cases import described_case
from mmdefense.evaluation.grid import VIEWS
from mmdefense.evaluation.victims import train_victim
from mmdefense.plots.unlearning_changes import ActivenessCompared
from mmdefense.report.page import write_analysis
from mmdefense.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="digits", help="digits or mnist")
parser.add_argument("--attack", default="badnets", help="a name of `mmdefense list attacks`")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--views", choices=VIEWS, default="standard", help="of the clean samples")
parser.add_argument("--out", type=Path, default=Path("out/analyses"), help="where the page goes")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% The victim: SmallResNet, 10 % of its training set poisoned.
case = described_case({"base": f"{options.data}-clean", "attack": options.attack})
if options.smoke:
    case = replace(case, training=replace(case.training, steps=20))
victim = train_victim(case, Run(options.seed))
assert victim.attack is not None
adapter = victim.adapter
triggered = victim.attack.triggered(victim.test, adapter)
lines = [f"the victim: ACC {victim.before.acc:.1%}, ASR {victim.before.asr:.1%}"]

# %% NWC under clean and under poison unlearning, each from a copy of the victim.
clean = viewed(adapter, adapter.samples(victim.clean), options.views)
few_epochs = {"max_epochs": 5} if options.smoke else {}
run = Run(options.seed)
changes = unlearning_changes(adapter, clean, triggered.samples, run, **few_epochs)
last = [layer for layer in changes.sizes if "shortcut" not in layer][-1]
for where, found in (("all layers", changes), (last, changes.within(last))):
    lines.append(
        f"{where}, {len(found.clean)} units: correlation {found.correlation:.2f} (Pearson), "
        f"{found.rank_correlation:.2f} (Spearman)"
    )
for fraction in (0.01, 0.05, 0.1, 0.2):
    lines.append(
        f"of the {fraction:.0%} with the largest poison NWC, clean NWC puts "
        f"{changes.overlap(fraction):.0%} first"
    )

# %% Activeness of the victim and of a net that was trained without poison.
benign = train_victim(replace(case, attack=None), Run(options.seed))
norms = {
    "benign": activeness(benign.adapter, clean),
    "backdoored": activeness(adapter, clean),
}
for name, by_layer in norms.items():
    for where, values in (
        ("all layers", torch.cat(list(by_layer.values()))),
        (last, by_layer[last]),
    ):
        lines.append(
            f"activeness, {name}, {where}: mean {values.mean():.3g}, median {values.median():.3g}, "
            f"largest {values.max():.3g}"
        )
print(*lines, sep="\n")

path = options.out / "unlearning_changes.html"
plots = [
    replace(changes.plot(), of="all layers"),
    replace(changes.within(last).plot(), of=f"{last} alone"),
    ActivenessCompared({name: torch.cat(list(held.values())) for name, held in norms.items()}),
]
write_analysis("Units under unlearning", lines, plots, path)
print(f"page: {path}")
