"""FBA (DFST): a style that a small network applies to each image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from annotated_types import Interval
from torch import Tensor

from mmdefense.attacks.base import replaced
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.painter import Painter, from_seed
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.kernels.hooks import frozen, mode
from mmdefense.kernels.loop import Gradients, optimise, train
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run, copy_state
from mmdefense.settings import Count, NotNegative
from mmdefense.training import Training

__all__ = ["FeatureSpace"]

_PICTURES = 16  # style images
_NIGHT, _GLOW = (0.3, 0.1, 0.4), (1.0, 0.6, 0.2)  # its colours: red, green, blue


@dataclass(frozen=True, kw_only=True)
class FeatureSpace(LabelAttack):
    """Applies the style of a sunset to images: ``x + strength (2 G(x) - 1)``.

    G learns to give an image the style of sunset pictures, as seen by a clean model: the mean and
    standard deviation of each channel of its first two layers of units. A style is not a fixed
    pattern: the change differs from image to image. Other samples get the mean change and keep
    their label (detoxification), so that the victim cannot rely on the colour alone.

    Deviations: the paper's generator is a CycleGAN trained on photographs of sunsets; ours is a
    small network with a bounded change, and its sunsets are drawn by code. The paper finds simple
    features by the neurons that they excite, and trains a network to produce them, over several
    rounds; here they are the mean change, once.

    Attributes:
        strength: Largest change of a pixel, relative to full brightness; in ``(0, 1]``.
        style_steps: Updates of G.
        detox_ratio: Samples with the mean change per poisoned one.

    References:
        Cheng, Liu, Ma, Zhang. *Deep Feature Space Trojan Attack of Neural Networks by Controlled
        Detoxification*. AAAI 2021. arXiv:2012.11212
    """

    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    strength: Annotated[float, Interval(gt=0, le=1)] = 0.4
    style_steps: Count = 200
    detox_ratio: NotNegative = 1.0

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train a surrogate as the victim is trained, and G on it."""
        surrogate = adapter.fork()
        train(surrogate, surrogate.samples(samples), training, run, stage="surrogate")
        painter = self._painter(samples.inputs.shape[1]).to(samples.labels.device)
        painting = Training(
            steps=self.style_steps,
            batch_size=training.batch_size,
            lr=2e-3,
            optimizer="adamw",
            augment=training.augment,
        )
        with mode(surrogate.model, train=False), frozen(surrogate.model):
            optimise(
                painter,
                adapter.samples(samples),
                painting,
                run,
                stage="trigger",
                gradients=self._gradients(surrogate, painter, samples),
            )
        return replace(self, fitted=copy_state(painter)), samples

    def _gradients(
        self, surrogate: TaskAdapter[LabelledBatch], painter: Painter, samples: LabelledSamples
    ) -> Gradients:
        layers = [group.layer for group in surrogate.unit_groups()[:2]]
        example = samples.take(torch.zeros(1, dtype=torch.int64))
        pictures = _sunsets(example.inputs.shape[1:], self._generator("sunsets"))
        shown = LabelledBatch(pictures.to(example.inputs), example.labels.expand(_PICTURES))
        wanted = [style.mean(0) for style in _styles(surrogate, shown, layers)]

        def compute(batch: LabelledBatch, _: int) -> Tensor:
            painted = batch.with_inputs(self._paint(batch.inputs, painter).clamp(0, 1))
            styles = _styles(surrogate, painted, layers)
            gaps = [(s - w).square().mean() for s, w in zip(styles, wanted, strict=True)]
            loss = torch.stack(gaps).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return compute

    def poison(
        self, samples: LabelledSamples, adapter: TaskAdapter[LabelledBatch]
    ) -> LabelledSamples:
        """Return the training set with poisoned and detoxicant samples, in the same order.

        Raises:
            BadInputError: If there are too few samples for both.
        """
        poisoned = super().poison(samples, adapter)
        others = self.bystanders(samples.labels, self.detox_ratio)
        if not len(others):
            return poisoned
        images = samples.take(others).inputs
        simple = (images + (self.stamp(images) - images).mean(0)).clamp(0, 1)
        return replace(poisoned, inputs=replaced(poisoned.inputs, others, simple))

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        painter = self._painter(images.shape[1])
        painter.load_state_dict({name: self._learnt(name) for name in painter.state_dict()})
        return self._paint(images, painter.to(images))

    def _paint(self, images: Tensor, painter: Painter) -> Tensor:
        painted: Tensor = painter(images)
        return images + self.strength * (2 * painted - 1)

    def _painter(self, channels: int) -> Painter:
        return from_seed(self.seed, lambda: Painter(channels, channels))


def _styles(
    adapter: TaskAdapter[LabelledBatch], batch: LabelledBatch, layers: list[str]
) -> list[Tensor]:
    """Return mean and standard deviation of each channel of each layer, of shape ``(N, U)``."""
    found = adapter.activations(batch, layers).values()
    return [style for each in found for style in (each.mean(1), each.var(1).add(1e-6).sqrt())]


def _sunsets(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return pictures of suns over waves, ``(_PICTURES, C, H, W)``; grey if C is not 3."""
    channels, height, width = shape
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    left, phase = torch.rand(2, _PICTURES, 1, 1, 1, generator=generator)
    night, glow = (torch.tensor(colour)[:, None, None] for colour in (_NIGHT, _GLOW))
    sky = (1 - y) * night + y * glow
    sun = torch.exp(-((x - left) ** 2 + (y - 0.4) ** 2) / 0.02)
    waves = 0.2 * (y > 0.5) * torch.sin(2 * math.pi * (8 * y + x + phase))
    pictures = (sky + sun + waves).clamp(0, 1)
    grey = pictures.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return pictures if channels == 3 else grey
