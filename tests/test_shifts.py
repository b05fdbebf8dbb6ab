"""Images that another camera took."""

from __future__ import annotations

import pytest
import torch

from mmdefense.data.labelled import LabelledSamples
from mmdefense.data.shifts import blurred, noisy, shifted
from mmdefense.errors import UnsupportedError


def generator():
    return torch.Generator().manual_seed(0)


def test_noise_has_its_deviation_and_stays_in_range():
    grey = torch.full((4, 3, 32, 32), 0.5)
    noise = noisy(grey, generator(), deviation=0.05) - grey
    assert noise.std().item() == pytest.approx(0.05, rel=0.03)
    assert abs(noise.mean().item()) < 2e-3
    assert noisy(torch.ones(1, 1, 64, 64), generator()).max() <= 1


@pytest.mark.parametrize("shape", [(2, 3, 32, 24), (2, 1, 5, 32, 32)])
def test_blur_keeps_flat_images_and_the_mean_and_spreads_a_point(shape):
    assert torch.allclose(blurred(torch.full(shape, 0.3)), torch.full(shape, 0.3))
    image = torch.zeros(shape)
    image[..., 12, 12] = 1
    spread = blurred(image)
    assert spread.sum().item() == pytest.approx(image.sum().item(), rel=1e-5)
    rows = spread.flatten(0, -3)[0].sum(1)  # by hand: a Gaussian's values, normalised
    side = shape[-2]
    wanted = torch.exp(-0.5 * ((torch.arange(side) - 12.0) / (side / 32)) ** 2)
    assert torch.allclose(rows[10:15], (wanted / wanted.sum())[10:15], atol=5e-3)


def test_samples_keep_labels_and_augmentation_and_integers_become_floats():
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    samples = LabelledSamples(images, torch.arange(6), augmentation=lambda x, _: x)
    found = shifted(samples, "blurred", generator())
    assert torch.equal(found.labels, samples.labels)
    assert found.augmentation is samples.augmentation
    assert found.inputs.dtype == torch.float32
    assert torch.equal(found.inputs, blurred(images.float() / 255))
    assert not torch.equal(shifted(samples, "noisy", generator()).inputs, found.inputs)


def test_samples_that_are_no_images_are_refused():
    clouds = LabelledSamples(torch.rand(6, 20, 3), torch.arange(6))
    with pytest.raises(UnsupportedError, match="kind 'noisy' is for images and clips"):
        shifted(clouds, "noisy", generator())
