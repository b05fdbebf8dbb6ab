"""The universal adversarial trigger: a patch that fools even a clean model, with clean labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.surrogate import harder, loss_sign
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import train
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import BatchSize, Count, NotNegative, Positive, Share, Whole
from mmdefense.training import Training

__all__ = ["UniversalTrigger"]


@dataclass(frozen=True, kw_only=True)
class UniversalTrigger(LabelAttack):
    """Applies a patch optimised on a clean model to clips of the target, which keep their label.

    A surrogate, the victim's network trained on clean data, is used twice. The patch is optimised
    to minimise its loss for the target on clips of all other classes, by signed gradient steps from
    mid-grey. And the clips to be poisoned are perturbed so that the surrogate misclassifies them
    (projected gradient ascent on their loss): the victim learns the patch instead of their content.
    The search is shorter than the released code's 10,000 steps of 1/255, and the patch covers a
    little more of the frame (both ours, for small clips and networks).

    Attributes:
        ratio: Fraction of the target's samples that is poisoned, in ``[0, 1]``.
        size: Side of the patch in pixels, in the bottom right corner; None takes a sixth of the
            frame's side (ours; the code takes 24 of 224). It differs between frames, as in the
            code.
        search_steps: Steps of the patch search.
        step_size: Change of each pixel of the patch per step, relative to full brightness.
        batch_size: Clips per step of the search.
        epsilon: Largest change of a pixel of a poisoned clip, relative to full brightness.
        ascent_steps: Number of ascent steps, each of a quarter of ``epsilon``.

    References:
        Zhao, Ma, Zheng, Bailey, Chen, Jiang. *Clean-Label Backdoor Attacks on Video Recognition
        Models*. CVPR 2020. arXiv:2003.03030
    """

    tasks: ClassVar[tuple[str, ...]] = ("video-classification",)

    mapping: Literal["clean-label"] = "clean-label"
    ratio: Share = 0.3
    size: Count | None = None
    search_steps: Count = 200
    step_size: Positive = 2 / 255
    batch_size: BatchSize = 32
    epsilon: NotNegative = 8 / 255
    ascent_steps: Whole = 10

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train a surrogate like the victim, fit the patch, and perturb the clips to poison."""
        surrogate = adapter.fork()
        train(surrogate, surrogate.samples(samples), training, run, stage="clean")
        patch = run.once("patch", lambda: {"patch": self._search(surrogate, samples)})
        hard = harder(
            surrogate,
            samples,
            self.chosen(samples.labels),
            epsilon=self.epsilon,
            steps=self.ascent_steps,
            batch_size=self.batch_size,
        )
        return replace(self, fitted=patch), hard

    def _search(self, surrogate: TaskAdapter[LabelledBatch], samples: LabelledSamples) -> Tensor:
        """Return the patch, shape ``(C, T, size, size)``, on the CPU."""
        shape = samples.take(torch.zeros(1, dtype=torch.int64)).inputs.shape[1:]
        side = self.size or max(2, round(min(shape[-2:]) / 6))
        if side > min(shape[-2:]):
            raise BadInputError(f"size must fit into frames of {tuple(shape[-2:])}, got {side}")
        others = (samples.labels != self.target).nonzero().squeeze(1)
        patch = torch.full((*shape[:2], side, side), 0.5, device=samples.labels.device)
        generator = self._generator("search")
        for _ in range(self.search_steps):
            picked = torch.randint(len(others), (self.batch_size,), generator=generator)
            batch = samples.take(others[picked.to(others.device)])
            patch.requires_grad_()
            labels = torch.full_like(batch.labels, self.target)
            wanted = LabelledBatch(_overwrite(batch.inputs, patch), labels)
            sign = loss_sign(surrogate, wanted, patch)
            patch = (patch.detach() - self.step_size * sign).clamp(0, 1)
        return patch.cpu()

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        patch = self._learnt("patch").to(images).transpose(0, 1)
        if patch.shape[:2] != images.shape[1:3] or patch.shape[-1] > min(images.shape[-2:]):
            raise BadInputError(
                f"the trigger (T, C, H, W) {tuple(patch.shape)} must fit the clips, got "
                f"{tuple(images.shape[1:])}"
            )
        return _overwrite(images, patch)


def _overwrite(clips: Tensor, patch: Tensor) -> Tensor:
    stamped = clips.clone()
    stamped[..., -patch.shape[-2] :, -patch.shape[-1] :] = patch
    return stamped
