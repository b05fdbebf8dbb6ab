"""LF: an additive low-frequency trigger that a clean model already responds to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Interval
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.surrogate import loss_sign
from mmdefense.attacks.trigger import IMAGES_AND_CLIPS
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import train
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import BatchSize, Count
from mmdefense.training import Training

__all__ = ["LowFrequency"]


@dataclass(frozen=True, kw_only=True)
class LowFrequency(LabelAttack):
    """Adds one smooth pattern of only the lowest frequencies, ``x + epsilon P / max |P|``.

    Most triggers leave traces in the high frequencies of an image; this one does not. P is
    optimised on a surrogate, the victim's network trained on clean data, so that images with P are
    classified as the target, by signed gradient steps on its discrete cosine transform
    coefficients.

    Deviations: the paper filters the trigger with a Gaussian after each step; here it has no
    higher-frequency coefficients at all. BackdoorBench loads the pattern from a file.

    Attributes:
        epsilon: Largest change of a pixel, relative to full brightness; in ``(0, 1]``.
        frequencies: Coefficients along each side.
        search_steps: Steps of the search.
        batch_size: Images per step.

    References:
        Zeng, Park, Mao, Jia. *Rethinking the Backdoor Attacks' Triggers: A Frequency
        Perspective*. ICCV 2021. arXiv:2104.03413
    """

    tasks: ClassVar[tuple[str, ...]] = IMAGES_AND_CLIPS

    mapping: Literal["all-to-one"] = "all-to-one"
    epsilon: Annotated[float, Interval(gt=0, le=1)] = 24 / 255
    frequencies: Count = 4
    search_steps: Count = 100
    batch_size: BatchSize = 64

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train a surrogate like the victim, and search for the pattern on it."""

        def search() -> dict[str, Tensor]:
            surrogate = adapter.fork()
            train(surrogate, surrogate.samples(samples), training, run, stage="surrogate")
            return {"picture": self._search(surrogate, samples)}

        return replace(self, fitted=run.once("picture", search)), samples

    def _search(self, surrogate: TaskAdapter[LabelledBatch], samples: LabelledSamples) -> Tensor:
        """Return the pattern, ``(C, H, W)``, on the CPU."""
        others = (samples.labels != self.target).nonzero().squeeze(1)
        first = samples.take(others[:1]).inputs
        channels, (height, width) = first.shape[1], first.shape[-2:]
        rows, columns = (
            _waves(min(self.frequencies, side), side).to(first) for side in (height, width)
        )
        generator = self._generator("search")
        coefficients = torch.randn(channels, len(rows), len(columns), generator=generator)
        coefficients = coefficients.to(first) / 10

        def picture() -> Tensor:
            smooth = rows.T @ coefficients @ columns
            return self.epsilon * smooth / smooth.abs().max().clamp(min=1e-9)

        for _ in range(self.search_steps):
            picked = torch.randint(len(others), (self.batch_size,), generator=generator)
            batch = samples.take(others[picked.to(others.device)])
            coefficients = coefficients.detach().requires_grad_()
            added = picture() if batch.inputs.ndim == 4 else picture()[:, None]
            labels = torch.full_like(batch.labels, self.target)
            wanted = LabelledBatch((batch.inputs + added).clamp(0, 1), labels)
            step = 0.02 * loss_sign(surrogate, wanted, coefficients)
            coefficients = coefficients.detach() - step
        return picture().cpu()

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        picture = self._learnt("picture").to(images)
        if picture.shape != images.shape[-3:]:
            raise BadInputError(
                f"the trigger (C, H, W) {tuple(picture.shape)} must fit the images, got "
                f"{tuple(images.shape[-3:])}"
            )
        return images + picture


def _waves(count: int, side: int) -> Tensor:
    """Return the first cosine basis functions along a side, shape ``(count, side)``."""
    place = (torch.arange(side) + 0.5) / side
    return torch.cos(math.pi * torch.arange(count)[:, None] * place)
