"""A case and a defense that take a second, for the tests of demo and grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmdefense import registry
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.plots.pruning_curve import PruningCurve
from mmdefense.protocol import Case
from mmdefense.training import Training

CASE = Case(
    name="quick",
    task="image-classification",
    data="digits",
    attack="badnets",
    model="commands:Net(classes={classes})",
    training=Training(steps=40, lr=0.1, batch_size=64),
    seen=True,
)

CLOUDS = replace(
    {case.name: case for case in registry.load("tasks", "point-cloud-classification")().cases()}[
        "surfaces-pcba"
    ],
    training=Training(steps=1, batch_size=4),
)


@dataclass(frozen=True, kw_only=True)
class Quick(FineTuning):
    """Fine-tunes for a moment, and pretends to have pruned."""

    steps: int = 3

    def _run(self, work):
        super()._run(work)
        work.plots.append(PruningCurve(torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.1]), 0.0))


@dataclass(frozen=True, kw_only=True)
class Sam(FineTuning):
    """Stands for FT-SAM."""


@dataclass(frozen=True, kw_only=True)
class Broken(FineTuning):
    """Ends in an error."""

    def _run(self, work):
        raise ValueError("it breaks")
