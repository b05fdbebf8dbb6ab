"""State dicts: read as tensors and nothing else, checked, hashed and written."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from mmdefense.checkpoints.faults import check_file
from mmdefense.errors import BadInputError, one_line

__all__ = [
    "check_finite",
    "check_keys",
    "hash_weights",
    "read_state",
    "refused",
    "strip_prefix",
    "write_state",
]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a file, out of the wrappers that training scripts put round it.

    Raises:
        BadInputError: If the file is damaged, holds no state dict, or would run code.
    """
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it then refuses; the refusal is one line
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refused(path, error) from error
    except Exception as error:  # a damaged file fails in many ways
        if "weights_only" in str(error):  # an older format, which cannot be read as tensors alone
            raise refused(path, error) from error
        raise BadInputError(f"model file {path} cannot be read: {one_line(error)}") from error
    for name in _WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise BadInputError(
            f"model file {path} must hold a state dict (names to tensors), got a "
            f"{type(held).__name__}; save model.state_dict()"
        )
    return dict(held)


def refused(path: Path, error: BaseException) -> BadInputError:
    """Return the error for a pickle that is more than tensors; PyTorch's own says how to run it."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = f"loading it would run {wanted[1]}" if wanted else "it is damaged or no plain pickle"
    return BadInputError(
        f"model {path} was refused and nothing in it executed: {reason}; it must hold tensors "
        "only, as safetensors or torch.save(model.state_dict(), ...) write them"
    )


def strip_prefix(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the state without the prefix that a wrapper module gave all keys, and that prefix."""
    prefix = ""
    while added := next((p for p in _PREFIXES if state and _all_start(state, prefix + p)), None):
        prefix += added
    return {key.removeprefix(prefix): value for key, value in state.items()}, prefix


def _all_start(state: Mapping[str, Tensor], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in state)


def check_keys(missing: list[str], unexpected: list[str], shapes: list[str], subject: str) -> None:
    """Refuse weights that do not fit, naming the first few of each kind.

    Args:
        missing: Keys that the model has and the weights have not.
        unexpected: Keys that the weights have and the model has not.
        shapes: Descriptions of keys of another shape.
        subject: Whose weights fit what; a phrase for the message.

    Raises:
        BadInputError: If there is any.
    """
    kinds = (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes))
    parts = [f"{label}: {_some(names)}" for label, names in kinds if names]
    if parts:
        raise BadInputError(f"the weights of {subject}; {'; '.join(parts)}")


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def check_finite(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse weights that hold NaN or Inf.

    Raises:
        BadInputError: Naming the first such tensor.
    """
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise BadInputError(
                f"weight {name!r} of model {where} must be finite, got NaN or Inf in {count} of "
                f"{value.numel()} values"
            )


def write_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors under its own keys.

    Raises:
        OSError: If the file cannot be written.
    """
    # Clones, for safetensors refuses tensors that share storage; the keys are what must survive.
    content = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    path.write_bytes(to_safetensors(content, metadata={"format": "pt"}))


def hash_weights(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the names, dtypes, shapes and values of all weights and buffers."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
