"""A backdoor that was really planted in a small PointNet is really removed.

At the defaults, on clouds that are turned and jittered. No defense sees the test set. Seen with two
seeds of the defense: ACC 0.82, ASR 0.98 and RA 0.02 before, 0.81, 0.01 and 0.66 or 0.72 after. With
half the clean clouds and a weaker net RA went from 0.44 to 0.75 by the seed.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmdefense.attacks.pointba import PointPBA
from mmdefense.data.batch import split
from mmdefense.data.clouds import random_jitter
from mmdefense.defenses.tsbd import TSBD
from mmdefense.metrics.backdoor import measure
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.point_victims import PointNet
from mmdefense_tasks.surfaces import draw_surfaces

KINDS, POINTS = 8, 64
VICTIM = Training(
    steps=300,
    batch_size=64,
    lr=4e-3,
    weight_decay=1e-2,
    schedule="one-cycle",
    optimizer="adamw",
    max_norm=5.0,
)


@pytest.fixture(scope="module")
def case():
    """A victim of a ball of points beside the clouds, and four hundred clean clouds."""
    train_set, test = draw_surfaces(2000, POINTS, seed=0), draw_surfaces(400, POINTS, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(PointNet(KINDS, width=8, dropout=0.0))
    attack = PointPBA(center=(0.5, 0.0, -1.0))
    rest, clean = split(train_set, 1 / 5, 0)  # the victim never sees what the guard judges by
    attack.plant(adapter, replace(rest, augmentation=random_jitter), VICTIM, Run())
    adapter.model.eval()

    def measured(adapter):
        return measure(adapter, adapter.samples(test), attack.triggered(test, adapter))

    return SimpleNamespace(adapter=adapter, clean=clean, measured=measured)


def test_the_victim_serves_its_attacker_and_its_owner(case):
    victim = case.measured(case.adapter)
    assert victim.asr >= 0.95
    assert 0.75 <= victim.acc < 0.99


def test_the_backdoor_is_removed_and_the_task_kept(case):
    result = TSBD().purify(case.adapter, case.clean)
    before, after = case.measured(case.adapter), case.measured(result.adapter)
    assert after.asr < 0.25 * before.asr
    assert after.acc >= 0.92 * before.acc
    assert after.ra > 0.5
    assert not result.guard.violated
