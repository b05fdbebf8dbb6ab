"""Look at where triggered samples lie in the penultimate layer, before and after a purification.

    python recipes/analyses/clusters.py                     # digits, SmallResNet, FIP: minutes
    python recipes/analyses/clusters.py --defense tsbd
    python recipes/analyses/clusters.py --smoke             # that it runs, no more

The paper (FIP, arXiv:2409.00863, Fig. 5, t-SNE): triggered samples form a cluster of their own near
the target class before, and lie among their true classes after the purification. Measured here: see
docs/analyses.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mmdefense.analysis.clusters import clusters
from mmdefense.defenses.base import viewed
from mmdefense.evaluation.cases import described_case
from mmdefense.evaluation.grid import VIEWS
from mmdefense.evaluation.victims import purified_row, train_victim
from mmdefense.pipeline.purification import configured
from mmdefense.report.page import write_analysis
from mmdefense.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="digits", help="digits or mnist")
parser.add_argument("--attack", default="badnets", help="a name of `mmdefense list attacks`")
parser.add_argument("--defense", default="fip", help="a name of `mmdefense list defenses`")
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

# %% The purification, and the nearest clean neighbours of the triggered samples.
few_steps = {"steps": 5} if options.smoke else {}
victim = replace(victim, clean=viewed(adapter, adapter.samples(victim.clean), options.views))
defense = configured(options.defense, {"seed": options.seed, **few_steps})
row, purified = purified_row(victim, options.defense, defense)
assert purified is not None
lines.append(f"after {options.defense}: ACC {row.after.acc:.1%}, ASR {row.after.asr:.1%}")
found = clusters(adapter, purified.result.adapter, victim.test, triggered, 0)
for when, (target, own) in zip(("before", "after"), found.among(), strict=True):
    lines.append(
        f"nearest clean neighbours of triggered samples {when}: {target:.0%} of the target class, "
        f"{own:.0%} of the true one"
    )
print(*lines, sep="\n")

path = options.out / "clusters.html"
write_analysis("Clusters of the penultimate layer", lines, [found.plot(options.seed)], path)
print(f"page: {path}")
