"""SSBA: a hidden bit string, encoded in a residual that differs for each image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.painter import Painter, from_seed
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.kernels.loop import Gradients, optimise
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run, copy_state
from mmdefense.settings import Count
from mmdefense.training import Training

__all__ = ["SSBA"]


@dataclass(frozen=True, kw_only=True)
class SSBA(LabelAttack):
    """Hides bits in an image: ``x + epsilon B(x) E(x, bits)``, with E in ``[-1, 1]``; also ISSBA.

    An encoder E and a decoder, which reads the bits back, are trained jointly on images with random
    bits, with the decoder's cross-entropy. B is the local contrast of the image, in ``[0, 1]``,
    because a change is least visible in busy regions. The trigger is one bit string, drawn from
    ``seed``, for all poisoned images; each image gets a different residual.

    Deviations: a small encoder and decoder, trained on the attacker's own training images, replace
    StegaStamp (Tancik et al. 2020), which hides 100 bits. B and the bound ``epsilon`` replace its
    perceptual loss, its penalty on the residual and its critic. Images are not distorted before
    their bits are decoded.

    Attributes:
        epsilon: Largest change of a pixel, relative to full brightness; in ``(0, 1]``.
        bits: Length of the bit string.
        encoder_steps: Updates of encoder and decoder.

    References:
        Li, Li, Wu, Li, He, Lyu. *Invisible Backdoor Attack with Sample-Specific Triggers*. ICCV
        2021. arXiv:2012.03816
    """

    epsilon: Annotated[float, Interval(gt=0, le=1)] = 16 / 255
    bits: Count = 8
    encoder_steps: Count = 300

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train encoder and decoder."""
        coder = self._coder(samples.inputs.shape[1]).to(samples.labels.device)
        optimise(
            coder,
            adapter.samples(samples),
            Training(
                steps=self.encoder_steps,
                batch_size=training.batch_size,
                lr=1e-2,
                schedule="one-cycle",
                optimizer="adamw",
            ),
            run,
            stage="encoder",
            gradients=self._coder_gradients(coder, run),
        )
        return replace(self, fitted=copy_state(coder)), samples

    def _coder_gradients(self, coder: _Coder, run: Run) -> Gradients:
        def compute(batch: LabelledBatch, step: int) -> Tensor:
            images, generator = batch.inputs, run.generator(f"bits/{step}")
            bits = torch.randint(2, (len(images), self.bits), generator=generator).to(images)
            residual = coder.residual(images, bits)
            read = coder.decoder((images + self.epsilon * residual).clamp(0, 1))
            loss = F.binary_cross_entropy_with_logits(read, bits)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return compute

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        coder = self._coder(images.shape[1])
        coder.load_state_dict({name: self._learnt(name) for name in coder.state_dict()})
        string = torch.randint(2, (1, self.bits), generator=self._generator("string"))
        hidden = string.expand(len(images), -1).to(images)
        return images + self.epsilon * coder.to(images).residual(images, hidden)

    def _coder(self, channels: int) -> _Coder:
        return from_seed(self.seed, lambda: _Coder(channels, self.bits))


class _Coder(nn.Module):
    """The encoder, which gets the bits as coarse extra channels of the image, and the decoder."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.spread = nn.Linear(bits, channels * 8 * 8)
        self.painter = Painter(2 * channels, channels)
        self.decoder = nn.Sequential(
            *_halved(channels, 32),
            *_halved(32, 64),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, bits),
        )

    def residual(self, images: Tensor, bits: Tensor) -> Tensor:
        """Return the residual for bits ``(N, bits)``, shape ``(N, C, H, W)``, in ``[-1, 1]``."""
        coarse = self.spread(2 * bits - 1).view(len(bits), images.shape[1], 8, 8)
        seen = torch.cat([images, F.interpolate(coarse, images.shape[-2:])], 1)
        painted: Tensor = self.painter(seen)
        return _busy(images) * (2 * painted - 1)


def _busy(images: Tensor) -> Tensor:
    """Return the local standard deviation of the brightness, divided by the image's largest."""
    grey = F.pad(images.mean(1, keepdim=True), (2, 2, 2, 2), mode="replicate")
    mean, square = F.avg_pool2d(grey, 5, 1), F.avg_pool2d(grey.square(), 5, 1)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return deviation / deviation.amax((2, 3), keepdim=True).clamp(min=1e-3)


def _halved(given: int, made: int) -> list[nn.Module]:
    return [nn.Conv2d(given, made, 3, stride=2, padding=1), nn.GroupNorm(4, made), nn.ReLU()]
