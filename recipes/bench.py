"""Measure the kernels against plain versions of the same work, side by side in one run.

    python recipes/bench.py -o out/bench    # what `make bench` does: minutes on two cores
    python recipes/bench.py --smoke         # does it run at all: seconds

What it shows: for each row of `bench.md` and `bench.json` the ratio of two times, measured in turn
(A B A B ...), as the median over the repetitions and the least and the greatest of them; the aim;
and whether both sides computed the same.

Measured: see "Speed" in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmdefense as mmd
from mmdefense.batches import LabelledSamples, split
from mmdefense.defenses.base import Defense, Result
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.defenses.tsbd import TSBD
from mmdefense.evaluation.victims import Victim, named_cases, train_victim
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.loop import Training, mean_score, train
from mmdefense.kernels.pruning_curve import head_activations, pruning_curve
from mmdefense.kernels.run import Event, Run
from mmdefense.kernels.units import parameters_by_name, rank, select_sub_weights, silence
from mmdefense.kernels.units import weight_change, zero
from mmdefense_tasks.image_classification import load_digits
from mmdefense_tasks.victims import PreActResNet18, SmallResNet

Sides = Sequence[Callable[[], float]]
"""What is compared; each call does the work once and returns its seconds."""

STEPS, FIRST = 60, 20
"""Updates of one run of the loop, and how many of them pass before its clock starts."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How large everything is.

    Attributes:
        device: Where it runs.
        repeats: Repetitions of each row.
        wide: Filters of the first stage of the PreActResNet18 that is pruned and ranked.
        narrow: The same of the nets that are trained.
        images: Images that a pruning curve is measured on.
        batch: Samples per update.
        victim_steps: Updates that plant the backdoor.
        budgets: Updates that FIP and Fast FIP are tried with, ascending.
    """

    device: torch.device
    repeats: int = 5
    wide: int = 64
    narrow: int = 16
    images: int = 128
    batch: int = 64
    victim_steps: int = 300
    budgets: tuple[int, ...] = (20, 40, 60, 80, 100, 150, 200)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio.

    Attributes:
        what: The work, and what it is set against.
        model: The net.
        aim: What the median should reach: ``">= 25"`` or ``"<= 2.1"``.
        ratios: One a repetition; none where a side never reached its goal.
        check: How equal the results were.
        memory: Peak memory beside that of the other side, where it was measured.
    """

    what: str
    model: str
    aim: str
    ratios: list[float]
    check: str
    memory: str = ""

    def cells(self) -> list[str]:
        """Return the cells of its line in the table."""
        measured, verdict = "never", "no"
        if self.ratios:
            median = statistics.median(self.ratios)
            measured = f"{median:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
            sign, bound = self.aim.split()
            verdict = "yes" if (median >= float(bound)) == (sign == ">=") else "no"
        return [self.what, self.model, measured, self.aim, verdict, self.check, self.memory]


# %% Clocks


def synchronised(device: torch.device) -> float:
    """Return the time in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call."""
    begin = synchronised(device)
    work()
    return synchronised(device) - begin


def ratios(slow: Callable[[], float], fast: Callable[[], float], repeats: int) -> list[float]:
    """Return slow over fast, one a repetition; the two alternate."""
    return [slow() / fast() for _ in range(repeats)]


class StepClock:
    """Times the updates of a stage by its signs of progress, each of which waits for the device."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.marks: list[tuple[int, float]] = []

    def __call__(self, event: Event) -> None:
        """Note the time of a sign of progress."""
        if event.stage == self.stage:
            self.marks.append((event.step, time.perf_counter()))

    @property
    def seconds(self) -> float:
        """Seconds per update, the first of them left out."""
        (first, begin), (last, end) = self.marks[0], self.marks[-1]
        return (end - begin) / (last - first)


# %% The pruning curve against evaluating the net at each step


def fresh(net: Callable[..., nn.Module], width: int, device: torch.device) -> nn.Module:
    """Return a net for the digits with random weights, the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net(classes=10, channels=1, width=width).to(device)


def pruning_row(setting: Setting) -> Row:
    """Silence the features of a PreActResNet18 in 20 steps, most dormant first."""
    adapter = mmd.adapt(fresh(PreActResNet18, setting.wide, setting.device))
    digits = load_digits()[1]
    samples = adapter.samples(digits.subset(torch.arange(setting.images)))
    fit_head(adapter, samples)
    order = [unit for _, unit in rank([head_activations(adapter, samples)], descending=False)]
    counts = [len(order) * step // 20 for step in range(20)]
    fork, group = adapter.fork(), [adapter.head_group()]

    def at_once() -> Tensor:
        return pruning_curve(adapter, samples, order, counts)

    def again_and_again() -> Tensor:
        fork.model.load_state_dict(adapter.model.state_dict())
        curve = []
        for start, stop in pairwise([0, *counts]):
            silence(fork.model, group, [(0, unit) for unit in order[start:stop]])
            curve.append(mean_score(fork, samples))
        return torch.tensor(curve, dtype=torch.float64)

    found, expected = at_once(), again_and_again()
    return Row(
        what="the net evaluated at each of 20 steps / the pruning curve from one pass",
        model=f"PreActResNet18, width {setting.wide}, {setting.images} images of 16x16",
        aim=">= 25",
        ratios=ratios(
            lambda: timed(again_and_again, setting.device),
            lambda: timed(at_once, setting.device),
            setting.repeats,
        ),
        check=f"equal at {int((found - expected < 1e-6).sum())} of 20 points",
    )
