"""A tiny net in float64, with a convolution, BatchNorm and linear layers, and a tiny ViT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.data.labelled import LabelledSamples
from mmdefense_adapters.huggingface_image import HFImageClassifier
from mmdefense_adapters.torch_classifier import TorchClassifier

CLASSES = 3


def tiny_net(seed: int = 0) -> nn.Sequential:
    """133 weights; the statistics of BatchNorm are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 3, 2, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 4),
            nn.Tanh(),
            nn.Linear(4, CLASSES),
        ).double()
        nn.init.uniform_(net[1].running_mean, -0.5, 0.5)
        nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net.eval()


@pytest.fixture
def build():
    """Return a function of a seed that gives an adapter around a tiny net."""
    return lambda seed=0: TorchClassifier(tiny_net(seed), example=torch.rand(1, 1, 6, 6).double())


@pytest.fixture
def adapter(build):
    return build()


@pytest.fixture
def parameters(adapter):
    return list(adapter.model.parameters())


@pytest.fixture
def samples():
    return draw_samples(7)


@pytest.fixture
def draw():
    """Return a function of a size that gives random samples."""
    return draw_samples


def draw_samples(size: int) -> LabelledSamples:
    generator = torch.Generator().manual_seed(size)
    inputs = torch.rand(size, 1, 6, 6, generator=generator, dtype=torch.float64)
    return LabelledSamples(inputs, torch.randint(0, CLASSES, (size,), generator=generator))


@pytest.fixture
def separable():
    """40 samples that a net learns in some steps: the class is where the bright spot lies."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % CLASSES
    inputs = torch.rand(40, 1, 6, 6, generator=generator, dtype=torch.float64) / 4
    inputs[torch.arange(40), 0, 2 * labels, 2 * labels] += 1
    return LabelledSamples(inputs, labels)


@pytest.fixture
def vit():
    """An adapter around a ViT whose attention is the fused operation of PyTorch, in float64."""
    from mmdefense_tasks.victims import vit_classifier

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vit_classifier(CLASSES, 6, 1, patch=3, hidden=4, layers=1, heads=2)
    assert model.config._attn_implementation == "sdpa"
    return HFImageClassifier(model.double().eval(), example=torch.rand(1, 1, 6, 6).double())
