from __future__ import annotations

import pytest
from condition import assert_same, condition

from mmdefense.analysis.settings_compared import settings_compared
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.metrics.backdoor import measure


def test_each_setting_is_measured_and_the_model_left_as_it_is(victims, data, triggered):
    adapter = victims[0]
    before = condition(adapter.model)
    settings = {"none": FineTuning(steps=0), "some": FineTuning(steps=10, lr=0.05, restarts=0)}
    found = settings_compared(adapter, data[0], data[1], triggered, settings)
    assert_same(before, condition(adapter.model))
    assert found.before == found.after["none"] == measure(adapter, data[1], triggered)
    alone = settings_compared(adapter, data[0], data[1], triggered, {"some": settings["some"]})
    assert alone.after["some"] == found.after["some"]
    acc, asr = found.plot().panels()
    assert acc.labels == ["before", "none", "some"]
    assert asr.values[0] == pytest.approx(100 * found.before.asr)
