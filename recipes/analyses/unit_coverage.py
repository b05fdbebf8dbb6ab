"""Ask which orders of units put first those that the trigger changes most.

    python recipes/analyses/unit_coverage.py            # digits, SmallResNet: minutes
    python recipes/analyses/unit_coverage.py --smoke    # that it runs, no more

The paper (TSBD, arXiv:2405.20291, Fig. 4): the order by neuron weight change (NWC) covers the units
with the largest trigger-activated change (TAC) better than fine-pruning's, CLP's, ANP's and RNP's.
Measured here: see docs/analyses.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmdefense.analysis.unit_coverage import FRACTIONS, unit_coverage, unit_scores
from mmdefense.defenses.base import viewed
from mmdefense.evaluation.cases import described_case
from mmdefense.evaluation.grid import VIEWS
from mmdefense.evaluation.victims import train_victim
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
victim_line = f"the victim: ACC {victim.before.acc:.1%}, ASR {victim.before.asr:.1%}"
print(victim_line)

# %% The orders, from clean data alone, and their coverage.
few_steps = {"ANP": {"steps": 3}, "RNP": {"epochs": 2, "unlearn_epochs": 2}}
clean = viewed(adapter, adapter.samples(victim.clean), options.views)
scores = unit_scores(adapter, clean, Run(options.seed), few_steps if options.smoke else {})
last = [group.layer for group in adapter.unit_groups() if "shortcut" not in group.layer][-1]
found = {
    "all layers": unit_coverage(adapter, triggered, scores),
    f"{last} alone": unit_coverage(adapter, triggered, scores, layers=[last]),
}
rows = [["units of", "order", *[f"{fraction:.0%}" for fraction in FRACTIONS]]]
for where, coverage in found.items():
    for name, ratios in coverage.ratios.items():
        rows.append([where, name, *[f"{ratio:.0%}" for ratio in ratios]])
table = Table(*rows[0])
for row in rows[1:]:
    table.add_row(*row)
Console(width=110).print(table)

path = options.out / "unit_coverage.html"
plots = [replace(coverage.plot(), of=where) for where, coverage in found.items()]
write_analysis("Coverage of TAC", [victim_line], plots, path, rows)
print(f"page: {path}")
