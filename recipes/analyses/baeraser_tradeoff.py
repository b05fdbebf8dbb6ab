"""Look at what BAERASER recovers, and how its weights and the clean data decide what is left.

    python recipes/analyses/baeraser_tradeoff.py            # digits, SmallResNet: minutes
    python recipes/analyses/baeraser_tradeoff.py --smoke    # that it runs, no more

The paper (BAERASER, arXiv:2201.09538): with beta / alpha (drift against ascent) of 1e-4 the ASR is
about 0 and the ACC drops by more than 10 points, with 100 the drop is small; with 1 % of the clean
data the ASR falls by at most 98 points; the recovered triggers resemble the true one. Measured
here: see docs/analyses.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmdefense.analysis.settings_compared import settings_compared
from mmdefense.defenses.base import viewed
from mmdefense.evaluation.cases import described_case
from mmdefense.evaluation.grid import VIEWS
from mmdefense.evaluation.victims import train_victim
from mmdefense.pipeline.purification import configured
from mmdefense.plots.base import Plot
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
case = described_case({"base": f"{options.data}-clean", "attack": options.attack})
if options.smoke:
    case = replace(case, training=replace(case.training, steps=20))
rows = [["clean data", "beta / alpha", "ACC", "ASR", "RA"]]
plots: list[Plot] = []

# %% The weight of the drift against that of the ascent, and the share of clean data.
alpha = 0.5
ratios = (2e-3,) if options.smoke else (1e-4, 2e-3, 1.0, 100.0)
few_steps = {"steps": 5, "search_steps": 2, "screening": 2} if options.smoke else {}
for share in (0.05,) if options.smoke else (0.05, 0.01):
    defenses = {
        f"{ratio:g}": configured(
            "baeraser",
            {
                "seed": options.seed,
                "ascent_weight": alpha,
                "drift_weight": ratio * alpha,
                **few_steps,
            },
        )
        for ratio in (ratios if share == 0.05 else (2e-3,))
    }
    victim = train_victim(replace(case, clean=share), Run(options.seed))
    assert victim.attack is not None
    triggered = victim.attack.triggered(victim.test, victim.adapter)
    clean = viewed(victim.adapter, victim.adapter.samples(victim.clean), options.views)
    found = settings_compared(victim.adapter, clean, victim.test, triggered, defenses, options.seed)
    for name, rates in {"the victim": found.before, **found.after}.items():
        shown = [f"{100 * (rate or 0):.1f}" for rate in (rates.acc, rates.asr, rates.ra)]
        rows.append([f"{share:.0%}", name, *shown])
    plots.append(replace(found.plot(), of=f"{share:.0%} clean data"))
    plots.append(victim.task.show(triggered.clean, triggered.samples))  # the true trigger
    plots += found.plots[next(iter(defenses))]  # the recovered ones
table = Table(*rows[0])
for row in rows[1:]:
    table.add_row(*row)
Console(width=110).print(table)
path = options.out / "baeraser_tradeoff.html"
write_analysis("What BAERASER recovers and what it leaves", [], plots, path, rows)
print(f"page: {path}")
