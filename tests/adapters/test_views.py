"""Samples are mirrored where the model is as right about mirrored ones, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdefense.data.detection import DetectionBatch, mirrored
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses.base import viewed
from mmdefense.errors import UnsupportedError
from mmdefense.registry import adapt


class Sides(nn.Module):
    """Says which side is brighter, or whether the upper half is."""

    def __init__(self, *, left_right: bool) -> None:
        super().__init__()
        self.left_right, self.scale = left_right, nn.Parameter(torch.ones(()))

    def forward(self, images):
        first, second = images.mean(1).chunk(2, dim=2 if self.left_right else 1)
        return self.scale * torch.stack([first.mean((1, 2)), second.mean((1, 2))], 1)


def halves(*, left_right):
    """Return images with a bright half, on either side, or above or below."""
    images, labels = torch.zeros(64, 1, 8, 8), torch.arange(64) % 2
    for image, label in zip(images, labels.tolist(), strict=True):
        rows = slice(None) if left_right else slice(4 * label, 4 * label + 4)
        columns = slice(4 * label, 4 * label + 4) if left_right else slice(None)
        image[:, rows, columns] = 1
    return LabelledSamples(images, labels)


@pytest.mark.parametrize("left_right", [True, False])
@pytest.mark.parametrize("views", ["standard", "insertions"])
def test_images_are_mirrored_where_left_and_right_do_not_matter(left_right, views):
    adapter = adapt(Sides(left_right=left_right))
    samples = adapter.samples(halves(left_right=left_right))
    found = adapter.viewed(samples, views)
    assert found.augmentation.keywords["flip"] is (not left_right)


def test_an_augmentation_of_the_users_own_is_kept_as_standard_views():
    def own(images, generator):
        return images + 1

    adapter = adapt(Sides(left_right=True))
    samples = LabelledSamples(*_pair(), augmentation=own)
    assert adapter.viewed(adapter.samples(samples), "standard").augmentation is own
    assert adapter.viewed(adapter.samples(samples), "insertions").augmentation is not own
    assert adapter.viewed(adapter.samples(samples), "none").augmentation is None


class Own:
    """Samples of a user's own class."""

    def __init__(self, held) -> None:
        self.held = held

    def __getattr__(self, name):
        if name == "augmentation":
            raise AttributeError(name)
        return getattr(self.held, name)

    def __len__(self) -> int:
        return len(self.held)


@pytest.mark.parametrize("views", ["none", "insertions"])
def test_views_that_cannot_be_had_are_refused_in_one_line(views):
    adapter = adapt(Sides(left_right=True))
    own = Own(adapter.samples(halves(left_right=True)))
    with pytest.raises(UnsupportedError, match=f"views='{views}' needs samples with the field"):
        viewed(adapter, own, views)
    with pytest.raises(UnsupportedError, match="needs an adapter with viewed"):
        viewed(SimpleNamespace(), own, views)
    assert viewed(adapter, own, "standard") is own
    assert viewed(SimpleNamespace(), own, "standard") is own


def _pair():
    whole = halves(left_right=True)
    return whole.inputs, whole.labels


def test_a_mirrored_box_follows_its_object():
    image = torch.zeros(1, 1, 4, 10)
    image[..., 1:3, 2:5] = 1
    batch = DetectionBatch(image, (torch.tensor([[2.0, 1.0, 5.0, 3.0]]),), (torch.tensor([0]),))
    turned = mirrored(batch)
    x1, y1, x2, y2 = turned.boxes[0][0].int().tolist()
    assert (x1, y1, x2, y2) == (5, 1, 8, 3)
    assert turned.images[0, 0, y1:y2, x1:x2].min() == 1
    assert turned.images.sum() == image.sum()
    again = mirrored(turned)
    assert torch.equal(again.boxes[0], batch.boxes[0])
