"""What attacks do to a small net on real traffic signs, beside a clean twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.attacks.low_frequency import LowFrequency
from mmdefense.kernels.loop import mean_score, train
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_data

TRAINING = Training(steps=800, batch_size=64, lr=2e-3, schedule="one-cycle", optimizer="adamw")


def fresh(samples):
    """Return three convolutions and an output layer, with random weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        blocks = [
            layer
            for given, made in ((3, 16), (16, 32), (32, 64))
            for layer in (
                nn.Conv2d(given, made, 3, padding=1),
                nn.BatchNorm2d(made),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
        ]
        net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(1024, 43))
    return adapt(net, example=samples.inputs[:1])


@pytest.mark.slow
@pytest.mark.real_data
def test_lf_works_and_leaves_the_task_alone():
    samples, test = (load_data("gtsrb32", split=part) for part in ("train", "test"))
    clean, victim = fresh(samples), fresh(samples)
    train(clean, clean.samples(samples), TRAINING, Run(0))
    planted = LowFrequency(target=2).plant(victim, samples, TRAINING, Run(0))
    triggered = planted.triggered(test, victim)
    success = planted.success(victim, victim.samples(triggered.samples))
    assert success.mean() > 0.9
    accuracy = [mean_score(one, one.samples(test)) for one in (victim, clean)]
    assert accuracy[0] > accuracy[1] - 0.03
