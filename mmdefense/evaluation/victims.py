"""Victims by description: which data, which net, which attack; trained once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mmdefense import registry
from mmdefense.attacks.base import Attack
from mmdefense.augment import random_shift
from mmdefense.batches import LabelledBatch, LabelledSamples, split
from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import Training, mean_score, train
from mmdefense.kernels.run import Run
from mmdefense.metrics.backdoor import BackdoorMetrics, defense_effectiveness_rating, measure
from mmdefense.protocol import TaskAdapter
from mmdefense.report.record import Rates

__all__ = ["CASES", "Case", "Victim", "named_cases", "train_victim"]

_RESNET = "mmdefense_tasks.victims:SmallResNet(classes={classes}, channels={channels})"
_VIT = (
    "mmdefense_tasks.victims:vit_classifier(classes={classes}, image_size={size}, "
    "channels={channels}, patch=7)"
)


def _resnet_training(steps: int) -> Training:
    return Training(steps=steps, lr=0.1, weight_decay=5e-4, schedule="one-cycle", max_norm=5.0)


def _vit_training(steps: int) -> Training:
    return Training(
        steps=steps,
        lr=2e-3,
        weight_decay=0.05,
        schedule="one-cycle",
        max_norm=1.0,
        optimizer="adamw",
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A victim, described.

    Attributes:
        name: What tables call it.
        data: A name or folder that the task can load, with a train and a test part.
        model: ``module:callable(...)``; ``{classes}``, ``{channels}`` and ``{size}`` (pixels) are
            filled in from the data.
        attack: The name of an attack; none trains a clean model, the control of a grid.
        settings: Of the attack.
        training: How the victim is trained.
        clean: Share of the training set that the defenses are given.
        task: The name of a task.
    """

    name: str
    data: str = "digits"
    model: str = _RESNET
    attack: str | None = "badnets"
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=lambda: _resnet_training(300))
    clean: float = 0.05
    task: str = "image-classification"


@dataclass(frozen=True)
class Victim:
    """A trained victim, and what defenses and judges are given of it.

    Attributes:
        case: Its description.
        adapter: Around the model.
        attack: The attack to stamp with; none for a clean model.
        clean: What a defense is given.
        test: What a judge measures on; no defense sees it.
        before: ACC, ASR and RA of the victim.
    """

    case: Case
    adapter: TaskAdapter[LabelledBatch]
    attack: Attack | None
    clean: LabelledSamples
    test: LabelledSamples
    before: Rates

    def after(self, adapter: TaskAdapter[LabelledBatch]) -> Rates:
        """Return ACC, ASR, RA and DER of a purified model."""
        rates = _rates(adapter, self.attack, self.test)
        if self.attack is None:
            return rates
        der = defense_effectiveness_rating(_metrics(self.before), _metrics(rates))
        return Rates(acc=rates.acc, asr=rates.asr, ra=rates.ra, der=der)


def train_victim(case: Case, run: Run) -> Victim:
    """Train the victim of a case, or take it from the store of ``run`` where it is kept."""
    task = registry.load("tasks", case.task)()
    train_set, test = (_in_memory(task.load(case.data, split=part)) for part in ("train", "test"))
    adapter = registry.adapt(_fresh_model(case, train_set, run))
    planted = replace(train_set, augmentation=random_shift)  # the attacker's usual training
    attack = None
    if case.attack is not None:
        kind = registry.load("attacks", case.attack)
        attack = kind(seed=run.seed, **case.settings).plant(adapter, planted, case.training, run)
    else:
        train(adapter, adapter.samples(planted), case.training, run, stage="victim")
    clean = split(train_set, case.clean, run.seed)[1]
    assert isinstance(clean, LabelledSamples)
    return Victim(case, adapter, attack, clean, test, _rates(adapter, attack, test))


def _in_memory(samples: Any) -> LabelledSamples:
    return samples.in_memory() if hasattr(samples, "in_memory") else samples  # type: ignore[no-any-return]


def _fresh_model(case: Case, samples: LabelledSamples, run: Run) -> nn.Module:
    """Return the net of a case with random weights that depend on the seed alone."""
    channels, size = samples.inputs.shape[1], samples.inputs.shape[-1]
    classes = len(samples.classes) or int(samples.labels.max()) + 1
    arch = case.model.format(classes=classes, channels=channels, size=size)
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.default_generator.manual_seed(run.seed_for("weights"))
        return build_architecture(arch)


def _rates(
    adapter: TaskAdapter[LabelledBatch], attack: Attack | None, test: LabelledSamples
) -> Rates:
    samples = adapter.samples(test)
    if attack is None:
        return Rates(acc=mean_score(adapter, samples))
    found = measure(adapter, samples, attack.triggered(test, round(1 / adapter.chance)))
    return Rates(acc=found.acc, asr=found.asr, ra=found.ra)


def _metrics(rates: Rates) -> BackdoorMetrics:
    assert rates.acc is not None
    assert rates.asr is not None
    assert rates.ra is not None
    return BackdoorMetrics(rates.acc, rates.asr, rates.ra)


CASES: tuple[Case, ...] = (
    Case(name="digits-badnets"),
    Case(name="digits-blended", attack="blended"),
    Case(name="digits-clean", attack=None),
    Case(name="mnist-badnets", data="mnist", training=_resnet_training(700)),
    Case(name="mnist-blended", data="mnist", attack="blended", training=_resnet_training(700)),
    Case(name="mnist-clean", data="mnist", attack=None, training=_resnet_training(700)),
    Case(name="mnist-vit-badnets", data="mnist", model=_VIT, training=_vit_training(1500)),
    Case(
        name="mnist-vit-blended",
        data="mnist",
        model=_VIT,
        attack="blended",
        training=_vit_training(1500),
    ),
)
"""The cases of the README's table, by name."""


def named_cases(names: Sequence[str] | None = None) -> list[Case]:
    """Return the cases of these names, or all.

    Raises:
        BadInputError: If a name is unknown.
    """
    known = {case.name: case for case in CASES}
    if unknown := [name for name in names or () if name not in known]:
        raise BadInputError(f"unknown case {unknown[0]!r}; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(CASES)
