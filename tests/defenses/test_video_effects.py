"""A backdoor that was really planted in a small net of clips is really removed.

Seen with seed 0, ACC / ASR: victim 0.980 / 1.000, FIP 0.990 / 0.047, TSBD 0.985 / 0.000. The
settings suit a net that is trained for seconds; see ``test_effects.py``. No defense sees the test
set.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.clips import random_clip_shift
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses.fip import FIP
from mmdefense.defenses.tsbd import TSBD
from mmdefense.metrics.backdoor import measure
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.moving_digits import moving_digits
from mmdefense_tasks.video_victims import SmallVideoResNet

FOUR = 4  # left, right, up and down: few enough to be learnt in seconds
VICTIM = Training(
    steps=160, batch_size=48, lr=0.1, weight_decay=5e-4, schedule="one-cycle", max_norm=5.0
)
DEFENSES = [
    FIP(trace="true", steps=100, batch_size=32, lr=0.05, strength=0.3, eta_r=1.0),
    TSBD(steps=60, batch_size=32, lr=0.02, unlearn_lr=0.01),
]


def part(split: str, every: int) -> LabelledSamples:
    samples = moving_digits(split)
    shifts = (samples.labels < FOUR).nonzero().squeeze(1)[::every]
    return replace(samples.subset(shifts), classes=samples.classes[:FOUR])


@pytest.fixture(scope="module")
def case():
    """The victim, its attack, clean clips and test clips."""
    train_part, test_part = part("train", 1), part("test", 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(SmallVideoResNet(FOUR, 1, width=8, stages=2))
    attack = BadNets(size=4, ratio=0.2).plant(
        adapter, replace(train_part, augmentation=random_clip_shift), VICTIM, Run(0)
    )
    return adapter, attack, part("train", 8), test_part


def measured(adapter, attack, test_part):
    return measure(adapter, adapter.samples(test_part), attack.triggered(test_part, adapter))


def test_the_victim_serves_its_attacker_and_its_owner(case):
    adapter, attack, _, test_part = case
    victim = measured(adapter, attack, test_part)
    assert victim.asr >= 0.95
    assert victim.acc >= 0.85


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda defense: type(defense).__name__)
def test_the_backdoor_is_removed_and_the_task_kept(case, defense):
    adapter, attack, clean, test_part = case
    before = measured(adapter, attack, test_part)
    after = measured(defense.purify(adapter, clean).adapter, attack, test_part)
    assert after.asr < 0.25 * before.asr
    assert after.acc >= 0.93 * before.acc
