"""Orders of units: their coverage of TAC, and ACC and ASR along one."""

from __future__ import annotations

import pytest
import torch

from mmdefense.analysis.pruning_phases import Phases, pruning_phases
from mmdefense.analysis.unit_coverage import unit_coverage, unit_scores
from mmdefense.kernels.loop import mean_score
from mmdefense.metrics.tac import trigger_activated_change
from mmdefense.runtime.run import Run


def test_the_order_by_tac_covers_all_and_its_reverse_nothing(victims, triggered):
    adapter = victims[0]
    change = torch.cat(list(trigger_activated_change(adapter, triggered).values()))
    scores = {"tac": change, "reverse": -change}
    found = unit_coverage(adapter, triggered, scores, (0.25, 0.5, 1.0))
    assert found.ratios == {"tac": (1, 1, 1), "reverse": (0, 0, 1)}
    assert [curve.name for curve in found.plot().panels()[0].curves] == ["tac", "reverse"]


def test_the_coverage_of_one_layer_is_that_of_its_units(victims, triggered):
    adapter = victims[0]
    by_layer = trigger_activated_change(adapter, triggered)
    first, second = by_layer  # 6 and 8 units
    change = torch.cat([by_layer[first], -by_layer[second]])
    for layer, expected in ((first, (1, 1)), (second, (0, 1))):
        found = unit_coverage(adapter, triggered, {"order": change}, (0.5, 1.0), layers=[layer])
        assert found.ratios == {"order": expected}


def test_every_order_ranks_all_units(victims, data):
    adapter = victims[0]
    units = sum(group.size for group in adapter.unit_groups())
    few = {"ANP": {"steps": 3}, "RNP": {"epochs": 2, "unlearn_epochs": 2}}
    scores = unit_scores(adapter, data[0], Run(0), few)
    assert scores.keys() == {"fine-pruning", "NWC", "CLP", "ANP", "RNP", "random"}
    assert all(values.shape == (units,) for values in scores.values())


def test_phases_begin_with_the_rates_of_the_given_model(victims, data, triggered):
    adapter = victims[0]
    found = pruning_phases(adapter, *data, triggered)
    assert found.fractions[0] == 0
    assert found.fractions[-1] == 1
    assert found.acc[0] == pytest.approx(mean_score(adapter, data[1]))
    assert found.asr[0] == pytest.approx(mean_score(adapter, triggered.samples))


def test_a_phase_ends_where_its_rate_has_fallen():
    phases = Phases((0.0, 0.25, 0.5, 0.75, 1.0), (0.9, 0.9, 0.88, 0.6, 0.1), (1.0, 0.98, 0.2, 0, 0))
    assert (phases.backdoor_falls, phases.task_falls) == (0.5, 0.75)
    assert phases.asr_before_the_task_falls() == 0.2
    assert Phases((0.0, 1.0), (0.9, 0.9), (1.0, 1.0)).backdoor_falls == 1
