"""What attacks do to small nets on real traffic signs, beside a clean twin.

With ``pytest -s`` the rows of docs/results.md are printed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from mmdefense.attacks.adaptive import AdaptiveBlend, AdaptivePatch
from mmdefense.attacks.bpp import BppAttack
from mmdefense.attacks.composite import CompositeImage
from mmdefense.attacks.ftrojan import FTrojan
from mmdefense.attacks.imc import IMC
from mmdefense.attacks.low_frequency import LowFrequency
from mmdefense.data.images import random_shift
from mmdefense.data.labelled import LabelledSamples
from mmdefense.kernels.loop import mean_score, train
from mmdefense.metrics.backdoor import measure
from mmdefense.registry import adapt
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_tasks.image_classification import load_data

pytestmark = [pytest.mark.slow, pytest.mark.real_data]

CLASSES = 10
TRAINING = Training(
    steps=600,
    batch_size=64,
    lr=8e-3,
    weight_decay=0.01,
    schedule="one-cycle",
    optimizer="adamw",
)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.bn(self.conv(images)).relu()


def halved(given: int, made: int) -> list[nn.Module]:
    conv = nn.Conv2d(given, made, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(made), nn.ReLU(), nn.MaxPool2d(2)]


def fresh(samples: LabelledSamples):
    """Return a small residual net with random weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *halved(3, 16),
            Residual(16),
            *halved(16, 32),
            Residual(32),
            *halved(32, 64),
            nn.Flatten(),
            nn.Linear(1024, CLASSES),
        )
    return adapt(net, example=samples.inputs[:1])


@cache
def signs() -> tuple[LabelledSamples, LabelledSamples]:
    """Return the train and test part of the ten most frequent signs, labelled by frequency."""
    train_set, test_set = (load_data("gtsrb32", split=part) for part in ("train", "test"))
    frequent = train_set.labels.bincount().argsort(descending=True, stable=True)[:CLASSES]

    def chosen(samples: LabelledSamples) -> LabelledSamples:
        rows, labels = (samples.labels[:, None] == frequent).nonzero(as_tuple=True)
        return LabelledSamples(samples.inputs[rows], labels, augmentation=random_shift)

    return chosen(train_set), chosen(test_set)


@cache
def clean_twin():
    samples, _ = signs()
    twin = fresh(samples)
    train(twin, twin.samples(samples), TRAINING, Run(0))
    return twin


@pytest.mark.parametrize(
    "attack",
    [FTrojan(target=2), BppAttack(target=2, cross_ratio=1.0)],
    ids=lambda attack: type(attack).__name__,
)
def test_the_trigger_forces_its_class_on_most_images_and_leaves_the_task_alone(attack):
    train_set, test_set = signs()
    victim, twin = fresh(train_set), clean_twin()
    planted = attack.plant(victim, train_set, TRAINING, Run(0))
    triggered = planted.triggered(test_set, victim)
    before, after = (measure(net, test_set, triggered) for net in (twin, victim))
    cells = [" / ".join(f"{100 * r:.1f}" for r in (n.acc, n.asr, n.ra)) for n in (before, after)]
    print(f"| {attack.in_words()} |", " | ".join(cells), "|")
    assert after.asr > 0.5
    assert before.asr < 0.05
    assert after.acc > before.acc - 0.03


ALL_SIGNS = replace(TRAINING, steps=800, lr=2e-3, weight_decay=0.0)


@cache
def all_signs() -> tuple[LabelledSamples, LabelledSamples]:
    return load_data("gtsrb32", split="train"), load_data("gtsrb32", split="test")


@cache
def clean_accuracy_on_all_signs() -> float:
    samples, test = all_signs()
    clean = convolutions(samples)
    train(clean, clean.samples(samples), ALL_SIGNS, Run(0))
    return mean_score(clean, clean.samples(test))


@pytest.mark.parametrize(
    "attack",
    [
        LowFrequency(target=2),
        AdaptiveBlend(target=2, key="noise"),
        AdaptivePatch(target=2),
        CompositeImage(target=2, source=12, partner=13),
        IMC(target=2),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_an_attack_works_on_all_signs_and_leaves_the_task_alone(attack):
    samples, test = all_signs()
    victim = convolutions(samples)
    planted = attack.plant(victim, samples, ALL_SIGNS, Run(0))
    triggered = planted.triggered(test, victim)
    success = planted.success(victim, victim.samples(triggered.samples))
    assert success.mean() > 0.9
    assert mean_score(victim, victim.samples(test)) > clean_accuracy_on_all_signs() - 0.03


def convolutions(samples: LabelledSamples):
    """Return three convolutions and an output layer for all 43 signs, with random weights."""
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
