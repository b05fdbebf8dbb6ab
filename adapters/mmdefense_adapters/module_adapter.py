"""The base class of all adapters: traces the model to find units, features and output layer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.data.batch import Batch
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.hooks import capture, watch_modules
from mmdefense.protocol import ReadAt, UnitGroup
from mmdefense_adapters.peft_models import base_of, is_update, rank_groups
from mmdefense_adapters.units import capture_heads, find_units

__all__ = ["ModuleAdapter", "usable"]

B = TypeVar("B", bound=Batch)


_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def usable(model: nn.Module) -> nn.Module:
    """Return ``model`` if its weights can be read and trained.

    Raises:
        UnsupportedError: If it is scripted, exported or quantised, or has no weights.
    """
    kind = type(model).__name__
    exported = isinstance(model, torch.fx.GraphModule) and "train" in vars(model)
    if isinstance(model, torch.jit.ScriptModule) or exported:
        raise UnsupportedError(
            f"a {kind} ({'torch.export' if exported else 'TorchScript'}) is not supported, "
            "because its layers cannot be hooked or trained; give the module that it was made "
            "from, with the same weights"
        )
    if any(type(module).__module__.startswith(_QUANTISED) for module in model.modules()):
        raise UnsupportedError(
            f"the model {kind} is quantised, and its integer weights cannot be trained; give the "
            "model in floating point, and quantise the purified one"
        )
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise UnsupportedError(f"the model {kind} has no weights in floating point")
    return model


class ModuleAdapter(ABC, Generic[B]):
    """An adapter around any module; a subclass defines the forward pass and the loss.

    The units and the output layer are found from one forward pass on ``example``.
    """

    priority: ClassVar[int] = 0
    task: ClassVar[str]
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "sgd"
    generic: ClassVar[bool] = False
    """Whether this class itself, not a subclass, accepts any module of its task."""

    model: nn.Module
    example: B | None

    @abstractmethod
    def answer(self, batch: B) -> Tensor:
        """Return the model's output for a batch, as one tensor with grad."""

    def _example(self) -> B:
        if self.example is None:
            raise BadInputError(
                "the adapter has seen no input yet; call samples() first, or pass example="
            )
        return self.example

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @cached_property
    def layer_norm(self) -> bool:
        """Whether most norm layers normalise per token, not per batch, as in transformers.

        Determined from their class names: many families define their own norm.
        """
        kinds = [type(module).__name__ for module in self.model.modules()]
        tokens = sum("LayerNorm" in kind or "RMSNorm" in kind for kind in kinds)
        return tokens > sum("BatchNorm" in kind for kind in kinds)

    def fork(self) -> Self:
        """Return an adapter around a deep copy of the model."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        return twin

    def unit_groups(self) -> Sequence[UnitGroup]:
        """Return filters, linear rows and attention heads, input side first; not the outputs.

        For a LoRA model, the ranks of its updates.

        Raises:
            UnsupportedError: If it is a ``peft`` model without such updates.
        """
        return rank_groups(self.model) if self._wrapped else self._units[0]

    @property
    def _wrapped(self) -> bool:
        """Whether ``peft`` has put trainable updates around a frozen base."""
        return base_of(self.model) is not self.model

    @property
    def head(self) -> str | None:
        """Name of the output layer; None if not found."""
        return self._units[1]

    @cached_property
    def _units(self) -> tuple[list[UnitGroup], str | None]:
        groups, head = find_units(self.model, lambda: self.answer(self._example()))
        return groups, None if head is not None and is_update(head) else head

    def head_group(self) -> UnitGroup:
        """Return the inputs of the output layer as units on the input axis of its weight.

        Raises:
            UnsupportedError: If the model does not end in a linear layer, or the layer is part of a
                base that must not change.
        """
        weight, _ = self.head_weights()
        if self._wrapped and not weight.requires_grad:
            raise UnsupportedError(
                "the last layer of this peft model belongs to its base, which is not changed; "
                "prune the updates instead: --set layers=all"
            )
        layer, axes = self.head or "", {f"{self.head}.weight": 1}
        return UnitGroup(layer, weight.shape[1], axes, kind="neuron", read_at=ReadAt(side="input"))

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(K, D)`` and bias ``(K,)`` of the output layer.

        Raises:
            UnsupportedError: If the model does not end in a linear layer.
        """
        layer = self.model.get_submodule(self.head) if self.head is not None else None
        if not isinstance(layer, nn.Linear):
            raise UnsupportedError(
                "the model does not end in a linear layer, so its features cannot be pruned from "
                "one pass; prune every unit group instead: --set layers=all"
            )
        return layer.weight, layer.bias

    def class_layers(self) -> Sequence[str]:
        """Return the output layer, a linear one or a convolution.

        Raises:
            UnsupportedError: If it could not be found.
        """
        if self.head is None:
            raise UnsupportedError(
                "the output layer could not be found, so the classifier cannot be replaced; use "
                "another defense, such as ft-sam"
            )
        return [self.head]

    def embedding(self, batch: B) -> Tensor:
        """Return the input of the output layer, shape ``(N, D)``."""
        if self.head is None:
            raise UnsupportedError("the output layer could not be found, so there is no embedding")
        with torch.no_grad(), capture(self.model, [self.head], inputs=True) as inputs:
            self.answer(batch)
        return inputs[self.head].flatten(1)

    def head_inputs(self, batch: B) -> Tensor:
        """Return the input of the output layer, one row per sample: the embedding."""
        return self.embedding(batch)

    def activations(self, batch: B, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the activations of the units of each layer, ``(N, L, U * width)``, with grad.

        A layer whose rows are proposals has as many positions as the image with the most proposals;
        the others are zero-padded.
        """
        runs: dict[str, list[Tensor]] = {name: [] for name in layers}
        # A copy: the model may later add a residual to this tensor in place.
        with self._watched(layers, lambda name, values: runs[name].append(values.clone())):
            self.answer(batch)
        return {
            name: torch.cat([self._by_sample(run, batch) for run in found], 1)
            for name, found in runs.items()
        }

    @torch.no_grad()
    def features(self, batch: B, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return pooled activations: after BatchNorm and ReLU for rows, magnitude for heads."""
        groups = self._groups_by_layer
        runs: dict[str, list[Tensor]] = {name: [] for name in layers}

        def pool(name: str, values: Tensor) -> None:
            sizes = _sizes(values, groups[name], self.model)
            runs[name].append(self._pool_at(name, sizes, batch))

        with self._watched(layers, pool):
            self.answer(batch)
        # A layer that runs several times, as over pyramid levels, is averaged over its runs.
        return {name: torch.stack(found).mean(0) for name, found in runs.items()}

    @property
    def _groups_by_layer(self) -> dict[str, UnitGroup]:
        return {group.layer: group for group in self.unit_groups()}

    @contextmanager
    def _watched(
        self, layers: Sequence[str], take: Callable[[str, Tensor], None]
    ) -> Iterator[None]:
        """Call ``take`` with each layer's name and its units' activations, in each run, units last.

        It is called immediately, while the values are valid and without keeping them in memory: a
        model may modify its input tensor in place.
        """
        groups = self._groups_by_layer
        heads = [name for name in layers if groups[name].read_at.side == "input"]
        rows: dict[nn.Module, UnitGroup] = {
            self.model.get_submodule(groups[name].read_at.layer or name): groups[name]
            for name in layers
            if name not in heads
        }

        def read(module: nn.Module, _: Any, output: Tensor) -> None:
            take(rows[module].layer, output.movedim(rows[module].read_at.axis, -1))

        with watch_modules(list(rows), read), capture_heads(self.model, heads, take):
            yield

    def _by_sample(self, values: Tensor, batch: B) -> Tensor:
        """Reshape ``(..., C)`` to ``(N, L, C)``; the positions of a sample are contiguous."""
        return values.reshape(len(batch), -1, values.shape[-1])

    def _pool_at(self, layer: str, values: Tensor, batch: B) -> Tensor:
        """Average a layer's ``(..., U)`` values over the relevant positions of each sample: all."""
        return self._pool(values, batch)

    def _pool(self, values: Tensor, batch: B) -> Tensor:
        """Average ``(..., U)`` over the positions of each sample, which are contiguous."""
        count = len(batch)
        return values.reshape(count, -1, values.shape[-1]).mean(1)


def _sizes(values: Tensor, group: UnitGroup, model: nn.Module) -> Tensor:
    """Return the activation of each unit, ``(..., U)``: rectified, or a head's magnitude."""
    if group.read_at.side == "output":
        return F.relu(values)
    ((name, axis),) = group.axes.items()
    return _head_sizes(values, model.get_parameter(name).movedim(axis, 1), group)


def _head_sizes(mixed: Tensor, weight: Tensor, group: UnitGroup) -> Tensor:
    """Return the size of what each head adds to its block's output, ``(..., heads)``.

    It is the root mean square over the D outputs of ``W_h z_h``; using the Gram matrix of ``W_h``,
    the products are not stored.
    """
    split = mixed.reshape(*mixed.shape[:-1], group.size, group.width)
    columns = weight.reshape(-1, group.size, group.width)
    gram = torch.einsum("ohi,ohj->hij", columns, columns) / len(weight)
    square = torch.einsum("...hi,hij,...hj->...h", split, gram, split)
    return square.clamp(min=0).sqrt()
