"""Half-precision models: trained in float32 and returned in their original dtypes.

An update is often smaller than the resolution of a bfloat16 weight (one part in 256), so that any
number of such updates in bfloat16 would have no effect.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["half_types", "in_float32", "rounded", "typed_like"]

A = TypeVar("A", bound=Any)

_HALVES = (torch.bfloat16, torch.float16)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def half_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of half-precision weights, by name in the state dict."""
    state = model.state_dict()
    return {name: value.dtype for name, value in state.items() if value.dtype in _HALVES}


def in_float32(adapter: A) -> A:
    """Return ``adapter``, or a float32 fork of it if its model has half-precision weights."""
    if not any(value.dtype in _HALVES for _, value in _tensors(adapter.model)):
        return adapter
    fork: A = adapter.fork()
    for _, value in _tensors(fork.model):
        if value.dtype in _HALVES:
            value.data = value.data.float()
    return fork


def rounded(state: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return a state with its values rounded to ``types``, but stored in its own dtypes."""
    return {
        name: value.to(types[name]).to(value.dtype) if name in types else value
        for name, value in state.items()
    }


def typed_like(model: nn.Module, given: nn.Module) -> nn.Module:
    """Return ``model``, or a copy in the dtypes of ``given`` if they differ."""
    types = {name: value.dtype for name, value in _tensors(given)}
    if all(value.dtype == types[name] for name, value in _tensors(model)):
        return model
    converted = copy.deepcopy(model)
    for name, value in _tensors(converted):
        value.data = value.data.to(types[name])
    return converted
