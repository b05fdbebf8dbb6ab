"""Input-aware (Dynamic): per-image triggers from networks trained jointly with the victim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from mmdefense.attacks.label_attack import LabelAttack, class_count
from mmdefense.attacks.painter import Painter, from_seed
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.hooks import frozen
from mmdefense.kernels.loop import Gradients, autocast, optimise
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run, copy_state
from mmdefense.settings import Count, NotNegative, Whole
from mmdefense.training import Training

__all__ = ["InputAware"]


@dataclass(frozen=True, kw_only=True)
class InputAware(LabelAttack):
    """Applies ``x + (G(x) - x) M(x)``, with a pattern G and a mask M that depend on the image.

    First M alone learns to be small and diverse: ``100 mean relu(M - density) + L_div(M)``. Then
    G and the classifier are trained jointly: cross-entropy on a batch of poisoned samples, equally
    many cross samples, which carry the trigger of another image and keep their true label, and
    clean samples, plus ``diversity L_div(G)``, where
    ``L_div(T) = mean |x1 - x2| / (|T(x1) - T(x2)| + eps)`` with root-mean-square distances.

    Deviations: poisoned samples are drawn anew in each batch, as in the released code, so
    ``ratio`` is a fraction of the batch; a cross sample carries the trigger of an image from the
    same batch. The networks have two scales and GroupNorm, so that a trigger never depends on the
    rest of its batch, and no norm after the last layer. One optimizer updates G and the
    classifier. ``eps`` is 1e-3 (1e-7 there), so that the first steps, in which all triggers are
    nearly equal, do not diverge.

    Attributes:
        density: Mask values up to this are not penalised.
        mask_weight: Weight of the mask's excess over ``density``.
        diversity: Weight of ``L_div`` in both training phases.
        mask_steps: Updates of M; BackdoorBench takes 25 epochs.
        width: Channels of the networks at full resolution.

    References:
        Nguyen, Tran. *Input-Aware Dynamic Backdoor Attack*. NeurIPS 2020. arXiv:2010.08138
    """

    own_loss: ClassVar[bool] = True

    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    density: Annotated[float, Interval(ge=0, lt=1)] = 0.032
    mask_weight: NotNegative = 100.0
    diversity: NotNegative = 1.0
    mask_steps: Whole = 300
    width: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio <= 0.5:
            raise BadInputError(
                f"ratio must leave room for as many cross samples, at most 0.5, got {self.ratio}"
            )
        if self.width < 4 or self.width % 4:
            raise BadInputError(f"width must be a multiple of 4, got {self.width}")

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train the mask; the pattern keeps its random initialisation."""
        nets = self._nets(samples.inputs.shape[1]).to(samples.labels.device)
        optimise(
            nets,
            adapter.samples(samples),
            replace(training, steps=self.mask_steps, lr=1e-2, optimizer="adamw"),
            run,
            stage="mask",
            gradients=self._mask_gradients(nets),
            parameters=list(nets.mask.parameters()),
        )
        return replace(self, fitted=copy_state(nets)), samples

    def _train(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> Self:
        """Train pattern and classifier jointly."""
        nets = self._fitted_nets(samples.inputs.shape[1]).to(samples.labels.device)
        with frozen(nets.mask):
            optimise(
                nn.ModuleDict({"victim": adapter.model, "trigger": nets}),
                adapter.samples(samples),
                training,
                run,
                stage="victim",
                gradients=self._joint_gradients(adapter, nets, class_count(adapter)),
            )
        return replace(self, fitted=copy_state(nets))

    def _mask_gradients(self, nets: _TriggerNets) -> Gradients:
        def compute(batch: LabelledBatch, _: int) -> Tensor:
            masks = nets.strength(batch.inputs)
            loss = self.mask_weight * F.relu(masks - self.density).mean()
            loss = loss + self.diversity * _diversity(batch.inputs, masks)
            torch.autograd.backward(loss)
            return loss

        return compute

    def _joint_gradients(
        self, adapter: TaskAdapter[LabelledBatch], nets: _TriggerNets, classes: int
    ) -> Gradients:
        def compute(batch: LabelledBatch, _: int) -> Tensor:
            count = min(round(self.ratio * len(batch)), len(batch) // 2)
            images, labels = batch.inputs, batch.labels.clone()
            first, second, rest = images[:count], images[count : 2 * count], images[2 * count :]
            labels[:count] = self.targets(labels[:count], classes)
            patterns, masks = nets.pattern(first), nets.strength(first)
            crossed = torch.cat([_mix(first, patterns, masks), _mix(second, patterns, masks), rest])
            with autocast(images.device):
                loss = adapter.per_sample_loss(LabelledBatch(crossed, labels)).mean()
            total = loss + self.diversity * _diversity(first, patterns) if count else loss
            torch.autograd.backward(total)
            return loss

        return compute

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        nets = self._fitted_nets(images.shape[1]).to(images)
        return _mix(images, nets.pattern(images), nets.strength(images))

    def _fitted_nets(self, channels: int) -> _TriggerNets:
        nets = self._nets(channels)
        nets.load_state_dict({name: self._learnt(name) for name in nets.state_dict()})
        return nets

    def _nets(self, channels: int) -> _TriggerNets:
        return from_seed(self.seed, lambda: _TriggerNets(channels, self.width))


class _TriggerNets(nn.Module):
    """The pattern net G, ``C`` channels to ``C``, and the mask net M, ``C`` channels to one."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.pattern = Painter(channels, channels, width)
        self.mask = Painter(channels, 1, width)

    def strength(self, images: Tensor) -> Tensor:
        """Return the mask pushed towards 0 and 1, shape ``(N, 1, H, W)``."""
        return (torch.tanh(20 * self.mask(images) - 10) + 1) / 2


def _mix(images: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    return images + (patterns - images) * masks


def _diversity(images: Tensor, painted: Tensor) -> Tensor:
    """Return the ratio of distances between neighbouring images to those of their patterns."""
    apart = (images - images.roll(1, 0)).square().flatten(1).mean(1).sqrt()
    # the square root has no finite gradient at zero, where two patterns are equal
    painted_apart = (painted - painted.roll(1, 0)).square().flatten(1).mean(1).add(1e-12).sqrt()
    return (apart / (painted_apart + 1e-3)).mean()
