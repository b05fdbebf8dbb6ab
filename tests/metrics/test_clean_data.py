"""What about clean data is named before a purification begins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.data.labelled import LabelledSamples
from mmdefense.data.shifts import blurred, noisy
from mmdefense.metrics.clean_data import doubts, noise_level, sharpness
from mmdefense_adapters.torch_classifier import TorchClassifier


@pytest.fixture
def images():
    """Return smooth pictures with sharp edges: random discs and bars, ``(40, 1, 32, 32)``."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(40, 3, 2, generator=generator) * 32
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"), -1)
    far = (grid - places[:, :, None, None]).norm(dim=-1)
    return (far < 4).any(1)[:, None].float() * 0.8 + 0.1


def told(images, labels) -> str:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 4))
    adapter = TorchClassifier(net, example=torch.rand(1, 1, 32, 32))
    return "; ".join(doubts(adapter, adapter.samples(LabelledSamples(images, labels))))


def test_a_balanced_set_of_sharp_images_is_not_doubted(images):
    assert told(images, torch.arange(40) % 4) == ""


def test_classes_without_and_with_few_samples_are_named(images):
    assert "1 of 4 classes have no clean sample: 3" in told(images, torch.arange(40) % 3)
    few = told(images[:8], torch.arange(8) % 4)
    assert few == "some classes have 2 clean samples; with fewer than 5 defenses often fail"


def test_noise_and_blur_are_seen(images):
    labels, generator = torch.arange(40) % 4, torch.Generator().manual_seed(0)
    assert "look noisy" in told(noisy(images, generator), labels)
    assert "look blurred" in told(blurred(images, sigma=1 / 12), labels)


def test_the_noise_level_is_the_deviation_of_the_noise():
    noise = 0.05 * torch.randn(20, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    assert noise_level(0.5 + noise) == pytest.approx(0.05, rel=0.05)


def test_sharpness_by_hand():
    # A step between two halves of four columns: one of three neighbours differs, rows are alike.
    image = torch.tensor([0.0, 0, 1, 1]).expand(1, 1, 4, 4)
    assert sharpness(image) == pytest.approx((0 + 1 / 3) / 2 / image.var().item())
