"""Models that are right about their own data, and a defense taken apart into its first step."""

from __future__ import annotations

import pytest
import torch
from commands import CLASSES as CORNERS
from commands import small_images
from models import SIDE, build
from torch import nn

from mmdefense.data.labelled import LabelledSamples
from mmdefense.kernels.loop import mean_score, train
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training


def self_taught(name, size=40):
    """Return an adapter around a random model, and images that it classifies without an error.

    The head is shifted so that every class is answered, and the labels are its own answers.
    """
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(size, 3, SIDE, SIDE, generator=generator)
    images *= torch.rand(size, 3, 1, 1, generator=generator)  # or a random net sees them all alike
    adapter = adapt(build(name), example=images[:1])
    head = adapter.model.get_submodule(adapter.head)
    with torch.no_grad():
        head.bias -= adapter.logits(images).mean(0)
        # The head is scaled so that the answers are as sure as those of a trained model.
        scale = 4 / adapter.logits(images).std()
        head.weight *= scale
        head.bias *= scale
        labels = adapter.logits(images).argmax(1)
    return adapter, LabelledSamples(images, labels)


@pytest.fixture(scope="session")
def taught():
    """Return a function of a model's name that gives an adapter, and samples it is right about."""
    return self_taught


def small_net(seed=0):
    """Return a net of 187 weights in float64, with BatchNorm, for 8 x 8 images of 3 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(27, 4),
            nn.Tanh(),
            nn.Linear(4, CORNERS),
        ).double()
        nn.init.uniform_(net[1].running_mean, -0.5, 0.5)
        nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net.eval()


@pytest.fixture
def adapter():
    return adapt(small_net(), example=torch.zeros(1, 1, 8, 8, dtype=torch.float64))


@pytest.fixture(scope="session")
def corners():
    """30 images in float64 with one bright quarter that tells their class."""
    images, labels = small_images()
    return LabelledSamples(images.double() / 255, labels)


@pytest.fixture(scope="session")
def _learnt_once(corners):
    adapter = adapt(small_net(), example=corners.inputs[:1])
    train(adapter, corners, Training(steps=80, batch_size=30, lr=0.2), Run())
    assert mean_score(adapter, corners) == 1
    return adapter


@pytest.fixture
def learnt(_learnt_once):
    """An adapter around a net that has learnt the corners."""
    return _learnt_once.fork()
