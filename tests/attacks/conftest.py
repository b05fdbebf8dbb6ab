from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from mmdefense.data.batch import split
from mmdefense.data.labelled import LabelledSamples
from mmdefense_adapters.torch_classifier import TorchClassifier

CLASSES = 10


@pytest.fixture(scope="session")
def digits() -> tuple[LabelledSamples, LabelledSamples]:
    """Train and test part of the handwritten digits, as 16 x 16 images."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=16, mode="bilinear")
    return split(LabelledSamples(images, torch.tensor(data.target)), 0.2, seed=0)


@pytest.fixture
def victim() -> TorchClassifier:
    """An untrained net for the digits, wrapped."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
        )  # fmt: skip
    return TorchClassifier(net)


@pytest.fixture
def images() -> LabelledSamples:
    """Forty colour images of ten classes, four of each."""
    generator = torch.Generator().manual_seed(0)
    return LabelledSamples(
        torch.rand(40, 3, 16, 14, generator=generator), torch.arange(40) % CLASSES
    )
