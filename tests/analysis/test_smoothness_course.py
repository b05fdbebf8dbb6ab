from __future__ import annotations

import pytest
import reference
import torch

from mmdefense.analysis.evidence import measured_sharpness
from mmdefense.analysis.smoothness_course import smoothness_course
from mmdefense.attacks.badnets import BadNets
from mmdefense.kernels.loop import mean_score
from mmdefense.runtime.run import Run
from mmdefense.training import Training

TRAINING = Training(steps=50, batch_size=32, lr=0.1)


def test_a_training_is_measured_on_its_way_and_goes_as_without_it(fresh, data, triggered):
    train, test = data
    attack, alone = BadNets(target=0, ratio=0.2), fresh.fork()
    attack.plant(alone, train, TRAINING, Run(3))
    course = smoothness_course(
        "victim",
        fresh,
        lambda run: attack.plant(fresh, train, TRAINING, run),
        train,
        test,
        triggered,
        stage="victim",
        every=25,
        seed=3,
        trace_error=None,
    )
    found, expected = (reference.flat(a.model.state_dict().values()) for a in (fresh, alone))
    assert torch.equal(found, expected)
    assert [point.step for point in course.points] == [0, 40, 50]
    last = course.points[-1]
    assert last.smoothness.trace == pytest.approx(measured_sharpness(fresh, train, 3).trace)
    assert last.acc == mean_score(fresh, test)
    assert last.asr == mean_score(fresh, triggered.samples)
    assert last.acc > course.points[0].acc
    rates, curvature, spectra = course.plot().panels()
    assert [curve.name for curve in rates.curves] == ["ACC", "ASR"]
    assert len(curvature.curves[0].x) == 3
    assert [curve.name for curve in spectra.curves] == ["0 updates", "40 updates", "50 updates"]
