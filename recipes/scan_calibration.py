"""Scan victims and their clean twins; count what is found, and what is found where nothing is.

    python recipes/scan_calibration.py --case digits-badnets --first-seed 100 --seeds 3
    python recipes/scan_calibration.py             # every victim of every task: hours on two cores
    python recipes/scan_calibration.py --zoo       # the shipped nets, which are not trained
    python recipes/scan_calibration.py --smoke     # does it run at all: seconds

What it shows: how far the verdict of `mmdefense scan MODEL --data DIR` can be trusted. A detection
is an outlier among the triggers of a victim, a false alarm one in a model without a backdoor. Each
scan is kept in --out as soon as it is done, so that a run that is cut off goes on.

Bounds of the scan were chosen on seeds below 100; take others to judge it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mmdefense.evaluation.calibration import calibrate, markdown
from mmdefense.evaluation.cases import named_cases
from mmdefense.evaluation.zoo import zoo_named
from mmdefense.report.terminal import ProgressDisplay

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--case", action="append", help="a victim, may be repeated; by default all")
parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
parser.add_argument("--first-seed", type=int, default=100, help="the first of them")
parser.add_argument(
    "--out", type=Path, default=Path("out/scan-calibration"), help="where it is kept"
)
parser.add_argument("--zoo", action="store_true", help="the nets of the zoo, each with its seed")
parser.add_argument("--smoke", action="store_true", help="a few steps: that it runs, no more")
options = parser.parse_args()

# %% The victims; a clean twin is trained for each net and data set.
if options.zoo:
    cases = zoo_named(options.case or ())
    options.first_seed, options.seeds = 0, 1
else:
    cases = named_cases(options.case or (["digits-badnets"] if options.smoke else None))
    cases = [case for case in cases if case.attack is not None]
if options.smoke:
    cases = [replace(case, training=replace(case.training, steps=2)) for case in cases]
    options.seeds = 1

# %% One scan each, at the same settings in every domain.
seeds = range(options.first_seed, options.first_seed + options.seeds)
with ProgressDisplay() as progress:
    cells = calibrate(cases, seeds, options.out, progress, zoo=options.zoo)
print(markdown(cells))
