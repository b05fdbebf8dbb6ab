"""TrojanNN: a patch optimised to excite selected neurons, then trained into the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.data.batch import Batch
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.hooks import capture, frozen, mode
from mmdefense.kernels.loop import train
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import Count, Positive
from mmdefense.training import Training

__all__ = ["TrojanNN"]

B = TypeVar("B", bound=Batch)


@runtime_checkable
class _HeadAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter that can name its model's output layer."""

    @property
    def head(self) -> str | None:
        """Dotted name of the output layer."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrojanNN(LabelAttack):
    """Trains a clean model, fits a patch to it, then continues training with patched data.

    The units are those of the penultimate layer with the largest sum of absolute weights into the
    output layer; the patch minimises ``sum_u (activation_u - excitation)^2`` over them, by signed
    gradient steps, on a black image. Both training phases use the same settings. The paper
    reconstructs training data from the model and retrains only the layers after the units; here,
    as in BackdoorBench, the attacker has the data and trains all layers.

    Attributes:
        size: Side of the patch in pixels, in the bottom right corner; None takes a quarter of the
            image's side (ours).
        units: Number of neurons to excite.
        excitation: Target activation; far above that of a clean image.
        search_steps: Steps of the patch search; BackdoorBench takes 1000.
        step_size: Change of each pixel per step, relative to full brightness (ours).

    References:
        Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang. *Trojaning Attack on Neural Networks*. NDSS 2018.
    """

    size: Count | None = None
    units: Count = 2
    excitation: float = 100.0
    search_steps: Count = 200
    step_size: Positive = 0.02

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train the victim itself on clean samples, and fit the patch to it.

        Raises:
            UnsupportedError: If the adapter cannot name the model's output layer.
        """
        if not isinstance(adapter, _HeadAdapter) or adapter.head is None:
            raise UnsupportedError(
                f"TrojanNN needs the model's output layer; {type(adapter).__name__} has found none"
            )
        train(adapter, adapter.samples(samples), training, run, stage="clean")
        example = samples.take(torch.zeros(1, dtype=torch.int64))
        patch = run.once("patch", lambda: {"patch": self._search(adapter, example)})
        return replace(self, fitted=patch), samples

    def _search(self, adapter: _HeadAdapter[LabelledBatch], example: LabelledBatch) -> Tensor:
        """Return the patch, shape ``(C, size, size)``, on the CPU."""
        shape = example.inputs.shape[1:]
        side = self.size or max(2, min(shape[-2:]) // 4)
        if side > min(shape[-2:]):
            raise BadInputError(f"size must fit into an image of {tuple(shape[-2:])}, got {side}")
        patch = torch.rand(shape[0], side, side, generator=self._generator("patch"))
        patch = patch.to(example.inputs).requires_grad_()
        units = _heaviest_units(adapter, self.units)
        with mode(adapter.model, train=False), frozen(adapter.model):
            for _ in range(self.search_steps):
                images = _overwrite(torch.zeros_like(example.inputs), patch)
                excited = _head_input(adapter, example.with_inputs(images))[:, units]
                (gradient,) = torch.autograd.grad((excited - self.excitation).square().sum(), patch)
                patch.data.sub_(self.step_size * gradient.sign()).clamp_(0, 1)
        return patch.detach().cpu()

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return _overwrite(images, self._learnt("patch").to(images))


def _heaviest_units(adapter: _HeadAdapter[LabelledBatch], count: int) -> Tensor:
    """Return the inputs of the output layer with the largest sum of absolute weights."""
    head = adapter.model.get_submodule(adapter.head or "")
    assert isinstance(head.weight, nn.Parameter)
    weights = head.weight.detach().flatten(1).abs().sum(0)
    return weights.topk(min(count, len(weights))).indices


def _head_input(adapter: _HeadAdapter[LabelledBatch], batch: LabelledBatch) -> Tensor:
    """Return the input of the output layer, shape ``(N, D)``, with grad."""
    head = adapter.head or ""
    with capture(adapter.model, [head], inputs=True) as given:
        adapter.per_sample_loss(batch)
    return given[head]


def _overwrite(images: Tensor, patch: Tensor) -> Tensor:
    stamped = images.clone()
    stamped[..., -patch.shape[-2] :, -patch.shape[-1] :] = patch
    return stamped
