"""Put the same defenses, at the same settings, to a victim of each task domain; print one table.

    python recipes/cross_domain_evaluation.py                     # the embedded victim of each task
    python recipes/cross_domain_evaluation.py --task video-classification --seeds 1
    python recipes/cross_domain_evaluation.py --smoke             # does it run at all: seconds

What it shows: that a defense which has heard of no domain serves them all. For each victim: the
task metric (accuracy, mAP, BLEU) and the ASR before and after, beside plain fine-tuning with the
same steps and learning rate. Every cell is kept in --out, so that a run that is cut off goes on.

Measured: see "Across domains" in docs/results.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mmdefense import registry
from mmdefense.evaluation.demo import DEFENSES
from mmdefense.evaluation.grid import Grid
from mmdefense.evaluation.tables import markdown
from mmdefense.report.terminal import ProgressDisplay

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--task", action="append", help="may be repeated; by default all")
parser.add_argument("--defense", action="append", help="may be repeated; by default the five")
parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
parser.add_argument("--out", type=Path, default=Path("out/cross-domain"), help="where cells are")
parser.add_argument("--smoke", action="store_true", help="a few steps: that it runs, no more")
options = parser.parse_args()

# %% The victims: what each task trains on its embedded data, a backdoor planted in it.
tasks = [registry.load("tasks", name)() for name in options.task or registry.names("tasks")]
cases = [task.cases()[0] for task in tasks]
defenses = options.defense or list(DEFENSES)
if options.smoke:
    cases = [replace(case, training=replace(case.training, steps=2)) for case in cases]
    defenses, options.seeds = ["pruning"], 1

# %% One grid over all of them: nothing below knows a domain, and no setting differs between them.
grid = Grid(cases=cases, defenses=defenses, seeds=range(options.seeds), baselines=not options.smoke)
with ProgressDisplay() as progress:
    cells = grid.run(options.out, progress)
print(markdown(cells))
