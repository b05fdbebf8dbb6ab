"""Clean data of classes that a victim does not know."""

from __future__ import annotations

import pytest
import torch
from commands import fitted_net, small_images

from mmdefense import registry
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import UnsupportedError
from mmdefense.evaluation.others import foreign_images, labelled_by_the_model
from mmdefense_adapters.torch_classifier import TorchClassifier


@pytest.fixture(autouse=True)
def _afresh():
    foreign_images.cache_clear()
    yield
    foreign_images.cache_clear()


@pytest.fixture
def sets(monkeypatch):
    """Let the task know three sets: its own, one that shares a class, one that shares none."""
    task = registry.load("tasks", "image-classification")
    images, labels = small_images()
    classes = {"own": ("a", "b", "c"), "like": ("c", "d", "e"), "other": ("x", "y", "z")}

    def load(where, *, split="train"):
        return LabelledSamples(images, labels, classes=classes[where])

    monkeypatch.setattr(task, "load", staticmethod(load))
    monkeypatch.setattr(task, "data", staticmethod(lambda: dict.fromkeys(classes, "")))


@pytest.mark.usefixtures("sets")
def test_the_first_data_set_without_a_common_class_is_taken():
    assert foreign_images("image-classification", "own")[0] == "other"


@pytest.mark.usefixtures("sets")
def test_where_there_is_none_that_is_said(monkeypatch):
    task = registry.load("tasks", "image-classification")
    monkeypatch.setattr(task, "data", staticmethod(lambda: {"own": "", "like": ""}))
    with pytest.raises(UnsupportedError, match="needs a data set of other classes than own"):
        foreign_images("image-classification", "own")


def test_points_have_no_images_of_other_classes():
    with pytest.raises(UnsupportedError, match="is for image classification"):
        foreign_images("point-cloud-classification", "surfaces")


def test_the_model_labels_them_and_the_form_of_the_clean_samples_stays():
    images, labels = small_images(30)
    clean = LabelledSamples(images[:6], labels[:6], classes=("a", "b", "c"))
    large = images.repeat_interleave(2, -1).repeat_interleave(2, -2).expand(-1, 3, -1, -1)
    foreign = LabelledSamples(large, torch.zeros(30, dtype=torch.int64), classes=("x",))
    adapter = TorchClassifier(fitted_net())
    found = labelled_by_the_model(adapter, clean, foreign, torch.Generator().manual_seed(0))
    assert (len(found), found.classes) == (6, ("a", "b", "c"))
    assert found.inputs.shape == (6, 1, 8, 8)
    answers = fitted_net()(found.inputs).argmax(1)
    assert torch.equal(found.labels, answers)
    assert len(answers.unique()) > 1
