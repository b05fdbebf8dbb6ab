"""IMC: a patch and a victim that are optimised jointly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mmdefense.attacks.label_attack import LabelAttack, class_count
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import Gradients, autocast, optimise
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import Count, Positive
from mmdefense.training import Training

__all__ = ["IMC"]


@dataclass(frozen=True, kw_only=True)
class IMC(LabelAttack):
    """Minimises one loss over both the weights and the patch; each step updates both.

    The loss is the cross-entropy of a batch, of which the first ``ratio`` carries the patch and the
    attacker's label. The weights are updated by their optimizer; the patch takes a signed gradient
    step of ``step_size``, decayed with the learning rate.

    Deviations: the paper alternates between input and model, with a penalty on the size of the
    perturbation; here, as in the released code, it is a patch of fixed size instead, updated in
    each step rather than once per epoch. Poisoned samples are drawn anew in each batch, so
    ``ratio`` is a fraction of the batch.

    Attributes:
        size: Side of the patch in pixels, in the bottom right corner; None takes an eighth of the
            image's shorter side, at least 2.
        step_size: Initial change of each pixel per step, relative to full brightness (ours).

    References:
        Pang, Shen, Zhang, Ji, Vorobeychik, Luo, Liu, Wang. *A Tale of Evil Twins: Adversarial
        Inputs versus Poisoned Models*. CCS 2020. arXiv:1911.01559
    """

    own_loss: ClassVar[bool] = True

    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    size: Count | None = None
    step_size: Positive = 0.02

    def _train(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> Self:
        """Train patch and classifier jointly."""
        patch = _Patch(self._first(samples.inputs.shape[1:])).to(samples.labels.device)
        optimise(
            nn.ModuleDict({"victim": adapter.model, "trigger": patch}),
            adapter.samples(samples),
            training,
            run,
            stage="victim",
            gradients=self._gradients(adapter, patch, training),
        )
        return replace(self, fitted={"patch": patch.pixels.cpu()})

    def _first(self, shape: torch.Size) -> Tensor:
        """Return random pixels, ``(C, size, size)``."""
        shortest = min(shape[-2:])
        side = self.size or max(2, shortest // 8)
        if side > shortest:
            raise BadInputError(f"size must fit into an image of {shortest} pixels, got {side}")
        return torch.rand(shape[0], side, side, generator=self._generator("patch"))

    def _gradients(
        self, adapter: TaskAdapter[LabelledBatch], patch: _Patch, training: Training
    ) -> Gradients:
        classes = class_count(adapter)

        def compute(batch: LabelledBatch, step: int) -> Tensor:
            count = round(self.ratio * len(batch))
            images, labels = batch.inputs, batch.labels.clone()
            labels[:count] = self.targets(labels[:count], classes)
            pixels = patch.pixels.clone().requires_grad_()
            poisoned = torch.cat([_overwrite(images[:count], pixels), images[count:]])
            with autocast(images.device):
                loss = adapter.per_sample_loss(LabelledBatch(poisoned, labels)).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            if pixels.grad is not None:
                left = training.lr_at(step) / training.lr if training.lr else 0.0
                moved = pixels.detach() - self.step_size * left * pixels.grad.sign()
                patch.pixels.copy_(moved.clamp(0, 1))
            return loss

        return compute

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return _overwrite(images, self._learnt("patch").to(images))


class _Patch(nn.Module):
    """Pixels that are saved in training checkpoints, but not updated by its optimizer."""

    pixels: Tensor

    def __init__(self, pixels: Tensor) -> None:
        super().__init__()
        self.register_buffer("pixels", pixels)


def _overwrite(images: Tensor, patch: Tensor) -> Tensor:
    stamped = images.clone()
    stamped[..., -patch.shape[-2] :, -patch.shape[-1] :] = patch
    return stamped
