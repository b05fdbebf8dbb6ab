"""What pruning, the attention loss and distillation add to fine-tuning, on 43 real traffic signs.

On the digits of test_effects.py the first two add nothing. Here all do, for the same draws at a
fixed rate and without the guard. The victim is that of recipes/grids/traffic_signs.toml.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmdefense.defenses.fine_pruning import FinePruning
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.defenses.nad import NAD
from mmdefense.evaluation.spec import read_spec
from mmdefense.evaluation.victims import Victim, train_victim
from mmdefense.runtime.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.real_data]

SPEC = Path(__file__).parents[2] / "recipes" / "grids" / "traffic_signs.toml"
UNGUARDED: dict[str, Any] = {"max_utility_drop": 1.0, "restarts": 0}


@pytest.fixture(scope="module")
def victim() -> Victim:
    """A victim of BadNets, and a quarter of the data, unseen, as clean data."""
    grid = read_spec(SPEC)
    case = next(case for case in grid.cases if case.attack == "badnets")
    return train_victim(replace(case, clean=0.25), Run(0))


PAIRS = {
    "pruning": (FinePruning(lr=0.02, **UNGUARDED), FineTuning(lr=0.02, **UNGUARDED)),
    "attention": (NAD(lr=0.04, **UNGUARDED), NAD(lr=0.04, beta=0.0, **UNGUARDED)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_without_its_mechanism_more_of_the_backdoor_stays(victim, name):
    with_it, without_it = (
        victim.after(defense.purify(victim.adapter, victim.clean).adapter)
        for defense in PAIRS[name]
    )
    print(name, victim.before, with_it, without_it)
    assert victim.before.asr >= 0.95
    assert with_it.asr < 0.5 * without_it.asr
    assert with_it.ra > without_it.ra
    assert with_it.acc >= 0.95 * victim.before.acc


def test_distillation_keeps_accuracy_at_a_rate_that_costs_it(victim):
    with_it, without_it = (
        victim.after(
            FineTuning(lr=0.64, distillation=share, **UNGUARDED)
            .purify(victim.adapter, victim.clean)
            .adapter
        )
        for share in (0.5, 0.0)
    )
    print("distillation", victim.before, with_it, without_it)
    assert with_it.acc >= without_it.acc + 0.05
    assert with_it.asr < 0.2
    assert with_it.ra > without_it.ra
