"""Models of ``peft``: trainable updates of low rank (LoRA) around a frozen base."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmdefense.errors import UnsupportedError
from mmdefense.protocol import ReadAt, UnitGroup

__all__ = ["base_of", "is_update", "rank_groups"]


def base_of(model: nn.Module) -> Any:
    """Return the model of ``transformers`` that a ``peft`` model wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_update(layer: str) -> bool:
    """Return whether a layer of this name is one of the two factors of an update."""
    return "lora_A" in layer or "lora_B" in layer


def rank_groups(model: nn.Module) -> list[UnitGroup]:
    """Return the ranks of each low-rank update ``B A`` as units: rows of A with columns of B.

    Raises:
        UnsupportedError: If there is none.
    """
    groups = []
    for name, module in model.named_modules():
        down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not isinstance(down, nn.ModuleDict) or not isinstance(up, nn.ModuleDict):
            continue
        for key, layer in down.items():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                lower, upper = f"{name}.lora_A.{key}", f"{name}.lora_B.{key}"
                axes = {f"{lower}.weight": 0, f"{upper}.weight": 1}
                size, flat = layer.weight.shape[0], isinstance(layer, nn.Linear)
                kind, read_at = ("neuron", ReadAt()) if flat else ("filter", ReadAt(axis=1))
                groups.append(UnitGroup(lower, size, axes, kind=kind, read_at=read_at))
    if not groups:
        raise UnsupportedError(
            "a peft model has units where it has low-rank updates (LoRA) of linear layers or "
            "convolutions, and this one has none; use a defense that prunes nothing, such as fip"
        )
    return groups
