from __future__ import annotations

import pytest
import torch

from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses.awm import AWM
from mmdefense.defenses.baeraser import BaEraser
from mmdefense.defenses.clp import CLP
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.defenses.nft import NFT
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


@pytest.mark.parametrize("kind", [FIP, FastFIP, TSBD, BaEraser, FineTuning])
def test_a_transformer_takes_larger_steps_of_sgd_and_smaller_ones_of_adamw(adapter, kind):
    adapter.layer_norm = True
    defense = kind(lr=0.5, adamw_lr=0.25, layer_norm_factor=3.0)
    assert defense.training(adapter).lr == 1.5
    smaller = kind(optimizer="adamw", adamw_lr=0.75, layer_norm_factor=3.0)
    assert smaller.training(adapter).lr == 0.25
    assert FineTuning.like(defense).training(adapter).lr == 1.5


def test_the_baseline_takes_over_what_training_defenses_share(adapter):
    defense = TSBD(lr=0.3, adamw_lr=0.2, steps=7, batch_size=3, momentum=0.1, seed=4, holdout=0.3)
    baseline = FineTuning.like(defense)
    assert baseline.training(adapter) == defense.training(adapter)
    assert (baseline.seed, baseline.holdout, baseline.adamw_lr) == (4, 0.3, 0.2)


def test_updates_below_the_last_digit_of_bfloat16_add_up(adapter, corners):
    given = adapter.model[4].weight
    adapter.model.to(torch.bfloat16)
    start = given.detach().clone()
    clean = LabelledSamples(corners.inputs.float(), corners.labels, corners.augmentation)
    tiny = FineTuning(
        lr=2e-4, steps=200, momentum=0.0, max_norm=None, max_utility_drop=1.0, restarts=0
    )
    found = tiny.purify(adapter, clean).model[4].weight
    assert found.dtype == torch.bfloat16
    assert (found != start).float().mean() > 0.1  # each update is below half of a last digit


@pytest.mark.parametrize(
    ("kind", "what"),
    [(FineTuning, "values"), (NFT, "unit masks"), (AWM, "weight masks"), (CLP, "nothing")],
)
def test_a_plan_names_what_a_defense_trains(adapter, kind, what):
    assert kind().trains(adapter).endswith(what)
