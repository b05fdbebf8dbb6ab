"""Backdoors that were really planted in small nets are really removed.

Clean images are cropped, as is the default, and nothing is inserted that imitates a trigger. The
bounds leave room for what a seed, a processor or a version of PyTorch changes: a net this small and
144 clean images move by ten points. No defense sees the test set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import split
from mmdefense.data.images import random_shift
from mmdefense.defenses.baeraser import BaEraser
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.defenses.fst import FST
from mmdefense.defenses.ft_sam import FTSAM
from mmdefense.defenses.i_bau import IBAU
from mmdefense.defenses.neural_cleanse import NeuralCleanse
from mmdefense.defenses.sau import SAU
from mmdefense.defenses.tsbd import TSBD
from mmdefense.evaluation.spec import read_spec
from mmdefense.evaluation.victims import train_victim
from mmdefense.metrics.backdoor import measure
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_digits
from mmdefense_tasks.victims import SmallResNet

VICTIM = Training(
    steps=150, batch_size=64, lr=0.1, weight_decay=5e-4, schedule="one-cycle", max_norm=5.0
)
RATES = Path(__file__).parents[2] / "recipes" / "grids" / "rates.toml"
UNGUARDED: dict[str, Any] = {"max_utility_drop": 1.0, "restarts": 0}
DEFENSES = [FIP(), TSBD(), BaEraser()]


@dataclass(frozen=True)
class Case:
    adapter: object
    attack: BadNets
    clean: object
    test: object

    def measured(self, adapter):
        triggered = self.attack.triggered(self.test, adapter)
        return measure(adapter, adapter.samples(self.test), triggered)


@pytest.fixture(scope="module", params=[0, 1])
def case(request):
    """A victim of BadNets on the digits, and a tenth of the data, unseen, as clean data."""
    seed = request.param
    train_set, test = load_digits()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = adapt(SmallResNet(10, 1, width=8))
    attack = BadNets(seed=seed)
    rest, clean = split(train_set, 0.1, seed)  # the victim never sees what the guard judges by
    attack.plant(adapter, replace(rest, augmentation=random_shift), VICTIM, Run(seed))
    adapter.model.eval()
    return Case(adapter, attack, clean, test)


def test_the_victim_serves_its_attacker_and_its_owner(case):
    victim = case.measured(case.adapter)
    assert victim.asr >= 0.95
    assert victim.acc >= 0.9


@pytest.mark.slow  # test_end_to_end.py has FIP's defaults on another net
@pytest.mark.parametrize("defense", DEFENSES, ids=["FIP", "TSBD", "BAERASER"])
def test_the_backdoor_is_removed_and_the_task_kept(case, defense):
    result = replace(defense, seed=case.attack.seed).purify(case.adapter, case.clean)
    before, after = case.measured(case.adapter), case.measured(result.adapter)
    assert after.asr < 0.15 * before.asr
    assert after.acc >= 0.95 * before.acc
    assert after.ra >= 0.75
    assert not result.guard.violated


MECHANISMS = {
    "FIP, perturbation": (FIP(lr=0.02, radius=2.0, **UNGUARDED), {"radius": 0.0}),
    "Fast FIP, perturbation": (FastFIP(lr=0.32, steps=200, **UNGUARDED), {"radius": 0.0}),
    "FT-SAM, perturbation": (FTSAM(lr=0.04, **UNGUARDED), {"radius": 0.0}),
    "TSBD, zeroing": (TSBD(lr=0.04, **UNGUARDED), {"ratio": 0.0}),
    "fine-tuning, rate": (FineTuning(lr=0.16, **UNGUARDED), {"lr": 0.02}),
    "BAERASER, ascent": (BaEraser(repair_weight=0.0), {"ascent_weight": 0.0}),
    "BAERASER, true labels": (BaEraser(ascent_weight=0.0), {"repair_weight": 0.0}),
}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (0, "FIP, perturbation"),
        (0, "fine-tuning, rate"),
        pytest.param(1, "FIP, perturbation", marks=pytest.mark.slow),
        pytest.param(1, "fine-tuning, rate", marks=pytest.mark.slow),
        pytest.param(0, "BAERASER, ascent", marks=pytest.mark.slow),
        pytest.param(1, "BAERASER, ascent", marks=pytest.mark.slow),
        pytest.param(0, "BAERASER, true labels", marks=pytest.mark.slow),
        pytest.param(1, "BAERASER, true labels", marks=pytest.mark.slow),
        pytest.param(0, "FT-SAM, perturbation", marks=pytest.mark.slow),
        pytest.param(1, "FT-SAM, perturbation", marks=pytest.mark.slow),
        # On the other victim zeroing changes nothing at any rate.
        pytest.param(1, "TSBD, zeroing", marks=pytest.mark.slow),
        # On the other victim 70 % are left with it and all without, which is too little to test.
        pytest.param(0, "Fast FIP, perturbation", marks=pytest.mark.slow),
    ],
    indirect=["case"],
)
def test_without_its_mechanism_the_backdoor_stays(case, name):
    """On shifted images, which imitate no trigger, with the same draws."""
    defense, ablation = MECHANISMS[name]
    defense = replace(defense, seed=case.attack.seed)
    with_it, without_it = (
        case.measured(replace(defense, **change).purify(case.adapter, case.clean).adapter)
        for change in ({}, ablation)
    )
    print(case.attack.seed, type(defense).__name__, with_it, without_it)
    assert with_it.asr < 0.5 * without_it.asr
    assert with_it.ra > without_it.ra + 0.3
    assert with_it.acc >= 0.95 * case.measured(case.adapter).acc


@pytest.mark.slow
def test_true_labels_bring_triggered_samples_back_where_ascent_alone_does_not():
    """A wave over the whole image (SIG): without the target, most samples go to a third class."""
    case = next(case for case in read_spec(RATES).cases if case.attack == "sig")
    victim = train_victim(replace(case, clean=0.1), Run(0))
    with_it, without_it = (
        victim.after(BaEraser(repair_weight=weight).purify(victim.adapter, victim.clean).adapter)
        for weight in (1.0, 0.0)
    )
    print(victim.before, with_it, without_it)
    assert victim.before.asr >= 0.8
    assert with_it.asr <= 0.05
    assert with_it.ra >= 0.8
    assert with_it.ra > without_it.ra + 0.3
    assert with_it.acc >= victim.before.acc - 0.03


BASELINES = {
    "fst": (FST(lr=0.08, **UNGUARDED), {"alpha": 0.0, "redraw": False}),
    "neural-cleanse": (NeuralCleanse(steps=100, **UNGUARDED), {"share": 0.0}),
    "i-bau": (IBAU(steps=40, **UNGUARDED), {"radius": 1e-6}),
    "sau": (SAU(steps=40, **UNGUARDED), {"sharing": 0.0}),
}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (0, "fst"),
        (0, "neural-cleanse"),
        pytest.param(1, "i-bau", marks=pytest.mark.slow),  # on 0: 0.01 or 0.42, by the processor
        pytest.param(0, "sau", marks=pytest.mark.slow),
    ],
    indirect=["case"],
)
def test_what_a_baseline_adds_to_fine_tuning_removes_the_backdoor(case, name):
    """On shifted images, without the inserted rectangles that imitate a trigger.

    At a fixed rate and without the guard, so that nothing else differs.
    """
    defense, without = BASELINES[name]
    defense = replace(defense, seed=case.attack.seed)
    with_it, without_it = (
        case.measured(replace(defense, **change).purify(case.adapter, case.clean).adapter)
        for change in ({}, without)
    )
    victim = case.measured(case.adapter)
    assert with_it.asr < 0.15 * victim.asr
    assert with_it.acc >= 0.9 * victim.acc
    assert without_it.asr > 0.5 * victim.asr
