"""Prune features one by one, most dormant first, and watch ACC and ASR.

    python recipes/analyses/pruning_phases.py            # digits, SmallResNet: a minute
    python recipes/analyses/pruning_phases.py --smoke    # that it runs, no more

The paper (Fine-Pruning, arXiv:1805.12185): three phases: units dormant on all data go and nothing
happens; units that only the trigger activates go and the ASR falls; units that clean data needs go
and the ACC falls. Measured here: see docs/analyses.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mmdefense.analysis.pruning_phases import pruning_phases
from mmdefense.evaluation.cases import described_case
from mmdefense.evaluation.victims import train_victim
from mmdefense.protocol import HeadAdapter
from mmdefense.report.page import write_analysis
from mmdefense.runtime.run import Run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--data", default="digits", help="digits or mnist")
parser.add_argument("--attack", default="badnets", help="a name of `mmdefense list attacks`")
parser.add_argument("--seed", type=int, default=0)
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

# %% The order is that of fine-pruning on the clean samples; the rates are those of the test set.
assert isinstance(adapter, HeadAdapter)
clean = adapter.samples(victim.clean)
phases = pruning_phases(adapter, clean, adapter.samples(victim.test), triggered)
lines += [
    f"the ASR is 5 points lower from {phases.backdoor_falls:.0%} of the features pruned on",
    f"the ACC is 5 points lower from {phases.task_falls:.0%} on",
    f"least ASR until then: {phases.asr_before_the_task_falls():.1%}",
]
print(*lines, sep="\n")

path = options.out / "pruning_phases.html"
write_analysis("Phases of pruning", lines, [phases.plot()], path)
print(f"page: {path}")
