"""Everything about a model that a call must leave as it was, in a form that can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def condition(model: nn.Module) -> dict[str, Any]:
    """Return hooks, modes, gradients, buffers and weights of ``model``, the values as bytes."""
    return {
        "hooks": [sum(len(getattr(m, kind)) for kind in _HOOKS) for m in model.modules()],
        "modes": [module.training for module in model.modules()],
        "statistics": [getattr(m, "track_running_stats", None) for m in model.modules()],
        "config": getattr(getattr(model, "config", None), "num_denoising", None),
        "loss": getattr(model, "loss_function", None),
        "wanted": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else _bits(p.grad) for p in model.parameters()],
        "forms": [(n, v.shape, v.dtype, v.stride()) for n, v in model.state_dict().items()],
        "values": {name: _bits(value) for name, value in model.state_dict().items()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Assert that nothing has changed, and name what has."""
    changed = [key for key, value in before.items() if after[key] != value]
    assert not changed, f"not as before: {', '.join(changed)}"


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
