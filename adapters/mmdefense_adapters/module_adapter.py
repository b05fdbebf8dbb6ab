"""What all adapters share: units, features and the output layer, found by tracing the model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.data.batch import Batch
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.hooks import capture, watch_modules
from mmdefense.protocol import UnitGroup
from mmdefense_adapters.peft_models import base_of, is_update, rank_groups
from mmdefense_adapters.units import capture_heads, find_units

__all__ = ["ModuleAdapter", "usable"]

B = TypeVar("B", bound=Batch)


_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def usable(model: nn.Module) -> nn.Module:
    """Return ``model``, whose weights can be read and trained.

    Raises:
        UnsupportedError: If it is scripted, exported or quantised, or has no weights.
    """
    kind = type(model).__name__
    exported = isinstance(model, torch.fx.GraphModule) and "train" in vars(model)
    if isinstance(model, torch.jit.ScriptModule) or exported:
        raise UnsupportedError(
            f"a {kind} ({'torch.export' if exported else 'TorchScript'}) is not supported, for its "
            "layers cannot be watched or trained; give the module that it was made from, with the "
            "same weights"
        )
    if any(type(module).__module__.startswith(_QUANTISED) for module in model.modules()):
        raise UnsupportedError(
            f"the model {kind} is quantised, and its integer weights cannot be trained; give the "
            "model in floating point, and quantise the result"
        )
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise UnsupportedError(f"the model {kind} has no weights in floating point")
    return model


class ModuleAdapter(ABC, Generic[B]):
    """An adapter around any module; a subclass says how a batch is answered and what it costs.

    The units, and which layer is the output layer, are found from one forward pass on ``example``.
    """

    priority: ClassVar[int] = 0
    task: ClassVar[str]
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "sgd"
    generic: ClassVar[bool] = False
    """Whether this very class, not one that inherits from it, serves any module of its task."""

    model: nn.Module
    example: B | None

    @abstractmethod
    def answer(self, batch: B) -> Tensor:
        """Return what the model answers to a batch, as one tensor with grad."""

    def _example(self) -> B:
        if self.example is None:
            raise BadInputError(
                "the adapter has seen no input yet; call samples() first, or pass example="
            )
        return self.example

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @cached_property
    def layer_norm(self) -> bool:
        """Whether more layers normalise each token by itself than by batch, as in transformers.

        By the names of their classes: many families bring a norm of their own.
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

        Of a LoRA model, the ranks of its updates.

        Raises:
            UnsupportedError: If that is a ``peft`` model without such updates.
        """
        return rank_groups(self.model) if self._wrapped else self._units[0]

    @property
    def _wrapped(self) -> bool:
        """Whether ``peft`` has put trainable updates around a frozen base."""
        return base_of(self.model) is not self.model

    @property
    def head(self) -> str | None:
        """Name of the output layer, where it can be found."""
        return self._units[1]

    @cached_property
    def _units(self) -> tuple[list[UnitGroup], str | None]:
        groups, head = find_units(self.model, lambda: self.answer(self._example()))
        return groups, None if head is not None and is_update(head) else head

    def head_group(self) -> UnitGroup:
        """Return the inputs of the output layer as units on the input axis of its weight.

        Raises:
            UnsupportedError: If the model does not end in a linear layer, or that is part of a base
                that must stay as it is.
        """
        weight, _ = self.head_weights()
        if self._wrapped and not weight.requires_grad:
            raise UnsupportedError(
                "the last layer of this peft model is part of its base, which is not touched; "
                "prune the updates instead: --set layers=all"
            )
        return UnitGroup(
            self.head or "", weight.shape[1], {f"{self.head}.weight": 1}, kind="neuron"
        )

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

    def embedding(self, batch: B) -> Tensor:
        """Return the input of the output layer, shape ``(N, D)``."""
        if self.head is None:
            raise UnsupportedError("the output layer could not be found, so there is no embedding")
        with torch.no_grad(), capture(self.model, [self.head], inputs=True) as inputs:
            self.answer(batch)
        return inputs[self.head].flatten(1)

    def head_inputs(self, batch: B) -> Tensor:
        """Return the input of the output layer, one row a sample: the embedding."""
        return self.embedding(batch)

    @torch.no_grad()
    def features(self, batch: B, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return pooled activations: after BatchNorm and ReLU for rows, magnitude for heads."""
        groups = {group.layer: group for group in self.unit_groups()}
        heads = [name for name in layers if groups[name].kind == "head"]
        rows = {
            self.model.get_submodule(_read_at(groups[name])): groups[name]
            for name in layers
            if name not in heads
        }
        runs: dict[str, list[Tensor]] = defaultdict(list)

        def pool(module: nn.Module, _: Any, output: Tensor) -> None:
            # At once: the model may go on to add a shortcut to this very tensor in place.
            values = _per_unit(output, rows[module])
            layer = rows[module].layer
            runs[layer].append(self._pool_at(layer, values, batch))

        with (
            watch_modules(list(rows), pool),
            capture_heads(self.model, heads) as mixed,
        ):
            self.answer(batch)
        # A layer that runs several times, as over the levels of a pyramid, counts each run alike.
        pooled = {name: torch.stack(parts).mean(0) for name, parts in runs.items()}
        for name in heads:
            axis = groups[name].axes[f"{name}.weight"]
            weight = self.model.get_parameter(f"{name}.weight").movedim(axis, 1)
            sizes = _head_sizes(mixed[name], weight, groups[name])
            pooled[name] = self._pool_at(name, sizes, batch)
        return pooled

    def _pool_at(self, layer: str, values: Tensor, batch: B) -> Tensor:
        """Average the ``(..., U)`` values of a layer over what counts of each sample: all of it."""
        return self._pool(values, batch)

    def _pool(self, values: Tensor, batch: B) -> Tensor:
        """Average ``(..., U)`` over the positions of each sample, which lie side by side."""
        count = len(batch)
        return values.reshape(count, -1, values.shape[-1]).mean(1)


def _read_at(group: UnitGroup) -> str:
    """Return the layer whose output speaks for a group: its BatchNorm, where it has one."""
    return list(group.axes)[-1].rpartition(".")[0]


def _per_unit(output: Tensor, group: UnitGroup) -> Tensor:
    """Rectify, with the units last: they are axis 1 of a convolution's output."""
    if group.kind == "filter":
        output = output.movedim(1, -1)
    return F.relu(output)


def _head_sizes(mixed: Tensor, weight: Tensor, group: UnitGroup) -> Tensor:
    """Return the size of what each head adds to its block's output, ``(..., heads)``.

    It is the root mean square over the D outputs of ``W_h z_h``; by the Gram matrix of ``W_h`` no
    product is held in memory.
    """
    split = mixed.reshape(*mixed.shape[:-1], group.size, group.width)
    columns = weight.reshape(-1, group.size, group.width)
    gram = torch.einsum("ohi,ohj->hij", columns, columns) / len(weight)
    square = torch.einsum("...hi,hij,...hj->...h", split, gram, split)
    return square.clamp(min=0).sqrt()
