"""Unlearn clean and poisoned data; compare how far units move, and a benign net with a victim.

    python recipes/analyses/unlearning_changes.py            # digits, SmallResNet: minutes
    python recipes/analyses/unlearning_changes.py --smoke    # that it runs, no more

The paper (TSBD, arXiv:2405.20291, Fig. 1 and 3): the neuron weight changes under clean and under
poison unlearning are positively correlated, and the units of a backdoored model have larger
gradient norms than a clean model's. Measured here: see docs/analyses.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mmdefense.analysis.unlearning_changes import activeness, unlearning_changes
from mmdefense.evaluation.victims import train_victim
from mmdefense.plots.unlearning_changes import ActivenessCompared
from mmdefense.report.page import write_analysis
from mmdefense.runtime.run import Run
from mmdefense_tasks.image_classification import ImageClassification

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--attack", default="badnets", help="a name of `mmdefense list attacks`")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out/analyses"), help="where the page goes")
parser.add_argument("--smoke", action="store_true", help="few steps: that it runs, no more")
options = parser.parse_args()

# %% The victim: SmallResNet on handwritten digits, 10 % of the training set poisoned.
case = replace(ImageClassification().cases()[0], attack=options.attack)
if options.smoke:
    case = replace(case, training=replace(case.training, steps=20))
victim = train_victim(case, Run(options.seed))
assert victim.attack is not None
adapter = victim.adapter
triggered = victim.attack.triggered(victim.test, adapter)
print(f"the victim: ACC {victim.before.acc:.1%}, ASR {victim.before.asr:.1%}")

# %% NWC under clean and under poison unlearning, each from a copy of the victim.
clean = adapter.samples(victim.clean)
few_epochs = {"max_epochs": 5} if options.smoke else {}
run = Run(options.seed)
changes = unlearning_changes(adapter, clean, triggered.samples, run, **few_epochs)
print(f"units: {len(changes.clean)}")
print(f"correlation (Pearson): {changes.correlation:.3f}")
print(f"rank correlation (Spearman): {changes.rank_correlation:.3f}")
for fraction in (0.01, 0.05, 0.1, 0.2):
    print(f"top {fraction:.0%} by poison NWC found by clean NWC: {changes.overlap(fraction):.0%}")

# %% Activeness of the victim and of a net that was trained without poison.
benign = train_victim(replace(case, attack=None), Run(options.seed))
norms = {
    "benign": activeness(benign.adapter, clean),
    "backdoored": activeness(adapter, clean),
}
for name, values in norms.items():
    print(
        f"activeness, {name}: mean {values.mean():.4g}, median {values.median():.4g}, "
        f"99th percentile {values.quantile(0.99):.4g}, largest {values.max():.4g}"
    )

path = options.out / "unlearning_changes.html"
path.parent.mkdir(parents=True, exist_ok=True)
write_analysis("Units under unlearning", [], [changes.plot(), ActivenessCompared(norms)], path)
print(f"page: {path}")
