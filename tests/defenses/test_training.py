from __future__ import annotations

import pytest

from mmdefense.defenses.baeraser import BaEraser
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.defenses.tsbd import TSBD


@pytest.mark.parametrize("kind", [FIP, FastFIP, TSBD, BaEraser, FineTuning])
def test_a_defense_trains_as_models_of_the_kind_are_trained(adapter, kind):
    defense = kind(lr=0.5, adamw_lr=0.25)
    plans = [defense.training(adapter)]
    adapter.optimizer = "adamw"
    plans += [defense.training(adapter), kind(lr=0.5, optimizer="sgd").training(adapter)]
    assert [(plan.optimizer, plan.lr) for plan in plans] == [
        ("sgd", 0.5), ("adamw", 0.25), ("sgd", 0.5),
    ]  # fmt: skip


def test_the_baseline_takes_over_what_training_defenses_share(adapter):
    defense = TSBD(lr=0.3, adamw_lr=0.2, steps=7, batch_size=3, momentum=0.1, seed=4, holdout=0.3)
    baseline = FineTuning.like(defense)
    assert baseline.training(adapter) == defense.training(adapter)
    assert (baseline.seed, baseline.holdout, baseline.adamw_lr) == (4, 0.3, 0.2)
