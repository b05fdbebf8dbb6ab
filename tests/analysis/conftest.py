"""A tiny net, a few digits of three classes, and a patch that leads to class 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import few
from mmdefense.kernels.loop import train as fit
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_digits

TRAINING = Training(steps=60, batch_size=32, lr=0.1, augment=False)


def few_classes(samples, count):
    return few(samples.subset((samples.labels < 3).nonzero().flatten()), count)


def tiny_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


@pytest.fixture(scope="session")
def data():
    """Train and test samples."""
    train, test = load_digits()
    return few_classes(train, 120), few_classes(test, 60)


@pytest.fixture
def fresh():
    """An adapter around a net with random weights."""
    return adapt(tiny_net(), example=torch.rand(1, 1, 16, 16))


@pytest.fixture(scope="session")
def victims(data):
    """A backdoored and a benign adapter, and the attack."""
    train, _ = data
    backdoored, benign = (adapt(tiny_net(), example=train.inputs[:1]) for _ in range(2))
    attack = BadNets(target=0, ratio=0.2).plant(backdoored, train, TRAINING, Run(0))
    fit(benign, train, TRAINING, Run(0))
    return backdoored, benign, attack


@pytest.fixture
def triggered(victims, data):
    return victims[2].triggered(data[1], victims[0])
