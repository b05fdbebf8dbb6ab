"""Models that are right about their own data, and a defense taken apart into its first step."""

from __future__ import annotations

import cloud_models
import detectors
import language_models
import pytest
import torch
import video_models
from cloud_models import POINTS
from commands import CLASSES as CORNERS
from commands import small_images
from models import SIDE, build
from torch import nn
from video_models import FRAMES
from video_models import SIDE as VIDEO_SIDE

from mmdefense.data.detection import DetectionSamples
from mmdefense.data.labelled import LabelledSamples
from mmdefense.kernels.loop import mean_score, train
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training


def unaltered(inputs, generator):
    """An augmentation that a step by hand can do without."""
    return inputs


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


def clips(generator):
    return torch.rand(20, 3, FRAMES, VIDEO_SIDE, VIDEO_SIDE, generator=generator)


def clouds(generator):
    return torch.randn(20, POINTS, 3, generator=generator)


def self_taught_on(inputs, model):
    """Return an adapter around a classifier of clips or clouds, with its own answers as labels."""
    generator = torch.Generator().manual_seed(3)
    inputs = inputs(generator)
    adapter = adapt(model, example=inputs[:1])
    head = adapter.model.get_submodule(adapter.head)
    with torch.no_grad():
        head.bias -= adapter.logits(inputs).mean(0)
        scale = 4 / adapter.logits(inputs).std()
        head.weight *= scale
        head.bias *= scale
        labels = adapter.logits(inputs).argmax(1)
    return adapter, LabelledSamples(inputs, labels)


def detector(name):
    sets = [detectors.images(seed) for seed in range(2, 6)]
    samples = DetectionSamples(
        torch.cat([part.images for part in sets]),
        tuple(boxes for part in sets for boxes in part.boxes),
        tuple(labels for part in sets for labels in part.labels),
    )
    return adapt(detectors.build(name), example=samples.images[:1]), samples


def language_model(name):
    adapter = adapt(language_models.build(name), tokenizer=language_models.tokenizer())
    return adapter, language_models.texts()


OTHERS = {
    "small-video-resnet": lambda name: self_taught_on(clips, video_models.build(name)),
    "pointnet": lambda name: self_taught_on(clouds, cloud_models.build(name)),
    "fcos": detector,
    "llama": language_model,
}


@pytest.fixture(scope="session")
def taught():
    """Return a function of a model's name that gives an adapter, and clean samples.

    A classifier is right about them.
    """
    return lambda name: OTHERS.get(name, self_taught)(name)


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
    return LabelledSamples(images.double() / 255, labels, augmentation=unaltered)


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
