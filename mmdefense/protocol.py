"""What a defense may ask of a model.

A kernel sees a model through an adapter. It never opens a batch and never names an architecture.
Adapters need no base class: whatever has these members is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from mmdefense.batches import Samples

__all__ = ["TaskAdapter", "TriggerAdapter", "TriggerFamily", "UnitGroup"]

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """``size`` (U) interchangeable units: filters, hidden neurons or attention heads.

    Zeroing unit ``u`` along ``axes[name]`` of every parameter ``name`` silences it. A unit spans
    ``width`` consecutive indices: 1, or ``head_dim`` for an attention head.

    Attributes:
        layer: Dotted name of the layer that owns the units, as in ``model.named_modules()``.
        size: Number of units U.
        axes: For each parameter that carries the units, the axis that indexes them.
        width: Consecutive indices per unit.
        kind: ``"filter"``, ``"neuron"`` or ``"head"``; for reports only.
    """

    layer: str
    size: int
    axes: Mapping[str, int]
    width: int = 1
    kind: str = "filter"


@runtime_checkable
class TaskAdapter(Protocol[B]):
    """What every kernel may ask of a wrapped model. ``N`` is the batch size."""

    model: nn.Module

    @property
    def chance(self) -> float:
        """The task metric of a model that has learnt nothing, in ``[0, 1]``; 1/C for C classes."""
        ...

    def samples(self, data: Any) -> Samples[B]:
        """Return ``data`` as samples that fit this model, checked.

        Raises:
            BadInputError: If the data cannot be what this model was trained on.
        """
        ...

    def per_sample_loss(self, batch: B) -> Tensor:
        """Return the training loss of each sample in nats, shape ``(N,)``, with grad.

        Its mean is the training loss.
        """
        ...

    def sampled_loss(self, batch: B, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the loss and a random score from one forward pass, both ``(N,)``, with grad.

        The gradient of the n-th score has mean zero and, over the draws of ``generator``,
        covariance F_n, the true Fisher information of sample n (labels from the model itself).
        """
        ...

    def score(self, batch: B) -> Tensor:
        """Return each sample's share of the task metric in ``[0, 1]``, shape ``(N,)``, no grad."""
        ...

    def features(self, batch: B, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return each layer's output pooled to one value per unit, ``(N, U)``, one pass, no grad.

        For attention heads the value is the mean magnitude of the head's output.
        """
        ...

    def embedding(self, batch: B) -> Tensor:
        """Return the penultimate representation, shape ``(N, D)``, no grad."""
        ...

    def unit_groups(self) -> Sequence[UnitGroup]:
        """Return the prunable units, input side first."""
        ...

    def fork(self) -> Self:
        """Return an adapter around a deep copy of the model."""
        ...


@dataclass(frozen=True, slots=True)
class TriggerFamily:
    """A kind of trigger that can be searched for.

    Attributes:
        name: For example ``"patch"`` or ``"additive"``.
        shape: Shape P of one raw trigger; the search varies raw triggers in ``[0, 1]``.
        cost: Weight of the trigger's size in the search's loss.
    """

    name: str
    shape: tuple[int, ...]
    cost: float = 0.0
    options: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class TriggerAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter whose inputs can carry a differentiable trigger."""

    def trigger_targets(self) -> int:
        """Return the number of targets that an attacker may have chosen; C for C classes."""
        ...

    def trigger_families(self, batch: B) -> Sequence[TriggerFamily]:
        """Return the kinds of trigger that inputs like those of ``batch`` can carry."""
        ...

    def stamp(self, batch: B, family: TriggerFamily, triggers: Tensor) -> B:
        """Return ``batch`` with raw ``triggers``, shape ``(N, *P)``, applied sample by sample."""
        ...

    def trigger_size(self, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return how much of an input each raw trigger alters, in ``[0, 1]``, shape ``(N,)``."""
        ...

    def target_probability(self, batch: B, targets: Tensor) -> Tensor:
        """Return the probability of each sample's target, shape ``(N,)``, with grad."""
        ...

    def not_target(self, batch: B, targets: Tensor) -> Tensor:
        """Return whether each sample's own answer differs from its target, bool ``(N,)``."""
        ...
