"""CLP, ANP, RNP and AWM remove a planted backdoor, and do not where their core is switched off.

What was seen on the seeds 0 and 1:

======  ============  ============  ===================
model   ASR           ACC           ASR of the ablation
======  ============  ============  ===================
victim  1.000, 1.000  0.978, 0.975
CLP     0.415, 0.046  0.955, 0.944  1.000, 1.000
RNP     0.000, 0.000  0.894, 0.844  0.932, 1.000
ANP     0.003, 0.269  0.933, 0.944  1.000, not run
AWM     0.130, 0.022  0.975, 0.961  1.000, 1.000
======  ============  ============  ===================

The ablations have the same draws: CLP's prunes as many units, drawn at random; ANP's perturbs
nothing; RNP's has unlearnt nothing; AWM's has no change of the inputs in its loss. RNP pays with
accuracy: with 29 held-out samples the guard lets a drop of a tenth pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import split
from mmdefense.data.images import random_shift
from mmdefense.defenses.anp import ANP
from mmdefense.defenses.awm import AWM
from mmdefense.defenses.clp import CLP
from mmdefense.defenses.rnp import RNP
from mmdefense.kernels.units import prune
from mmdefense.metrics.backdoor import measure
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_digits

VICTIM = Training(
    steps=100, batch_size=64, lr=0.1, weight_decay=5e-4, schedule="one-cycle", max_norm=5.0
)


def plain_net(width=24):
    """Three convolutions without shortcuts: each filter's output passes through its BatchNorm."""

    def block(before, after):
        return nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()

    return nn.Sequential(
        *block(1, width), *block(width, width), nn.MaxPool2d(2), *block(width, 2 * width),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    adapter: object
    attack: BadNets
    clean: object
    test: object

    def measured(self, adapter):
        triggered = self.attack.triggered(self.test, adapter)
        return measure(adapter, adapter.samples(self.test), triggered)


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def case(request):
    """A victim of BadNets on the digits, and a tenth of the data, unseen, as clean data."""
    seed = request.param
    train_set, test = load_digits()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = adapt(plain_net())
    attack = BadNets(seed=seed)
    rest, clean = split(train_set, 0.1, seed)  # the victim never sees what the guard judges by
    attack.plant(adapter, replace(rest, augmentation=random_shift), VICTIM, Run(seed))
    adapter.model.eval()
    return Case(adapter, attack, clean, test)


def removes(case, defense):
    before = case.measured(case.adapter)
    result = replace(defense, seed=case.attack.seed).purify(case.adapter, case.clean)
    after = case.measured(result.adapter)
    print(type(defense).__name__, case.attack.seed, before, after, result.plots)
    assert before.asr >= 0.95
    assert after.asr < 0.5 * before.asr
    assert after.acc >= 0.85 * before.acc
    assert not result.guard.violated
    return result


def test_clp_removes_it_and_as_many_random_units_do_not(case):
    result = removes(case, CLP(spread=1.2, max_utility_drop=0.15))
    groups = case.adapter.unit_groups()
    units = [(g, unit) for g, group in enumerate(groups) for unit in range(group.size)]
    count = round(result.plots[0].chosen * len(units))
    left = []
    for draw in range(10):  # one of them may hit the backdoor's units by chance
        fork = case.adapter.fork()
        drawn = torch.randperm(len(units), generator=torch.Generator().manual_seed(draw))
        prune(fork.model, groups, [units[place] for place in drawn[:count]])
        left.append(case.measured(fork).asr)
    assert sum(left) / len(left) >= 0.8


BOUND = {"max_utility_drop": 0.1}


@pytest.mark.parametrize(
    ("defense", "ablation", "kept"),
    [
        (
            RNP(**BOUND),
            {"unlearn_epochs": 0},
            0.75,
        ),  # 0.80 and 1.00 were seen, 0.07 and 0.00 with it
        pytest.param(ANP(steps=100, **BOUND), {"eps": 0.0}, 0.8, marks=pytest.mark.slow),
        pytest.param(
            AWM(steps=80, adamw_lr=0.05, **BOUND),
            {"beta": 0.0},
            0.8,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rnp", "anp", "awm"],
)
def test_it_is_removed_by_the_core_of_the_defense(case, defense, ablation, kept):
    removes(case, defense)
    ablated = replace(defense, seed=case.attack.seed, **ablation)
    assert case.measured(ablated.purify(case.adapter, case.clean).adapter).asr >= kept
