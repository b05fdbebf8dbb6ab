"""Read state dicts as tensors only; check, hash and write them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from mmdefense.checkpoints.faults import check_file
from mmdefense.checkpoints.pickled import Object, read_pickled
from mmdefense.checkpoints.states import main_weights, sets_of_weights
from mmdefense.errors import BadInputError, one_line
from mmdefense.notes import note

__all__ = [
    "check_finite",
    "hash_file",
    "hash_weights",
    "read_checkpoint",
    "read_state",
    "refused",
    "write_state",
]


_POINTER = b"version https://git-lfs"


def read_checkpoint(path: Path) -> Any:
    """Return what a file holds, as data: nested mappings, lists, numbers, texts and tensors.

    Objects of other classes are skipped, with a note.

    Raises:
        BadInputError: If the file is damaged, or names what can do harm.
        UnsupportedError: If it is a program and no checkpoint.
    """
    check_file(path)
    _check_no_pointer(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # a damaged file fails in many ways
            raise BadInputError(f"model file {path} cannot be read: {one_line(error)}") from error
    held, passed_by = read_pickled(path)
    if isinstance(held, Object):
        raise BadInputError(
            f"model file {path} must hold a state dict (names to tensors), got an object of "
            f"{held.name}, whose code is not run here; save model.state_dict()"
        )
    if passed_by:
        more = f" and {len(passed_by) - 3} more" if len(passed_by) > 3 else ""
        note(f"{path}: skipped objects of {', '.join(passed_by[:3])}{more}, whose code is not run")
    return held


def _check_no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise BadInputError(
                f"model file {path} is a Git LFS pointer, not the weights; run git lfs pull"
            )


def read_state(path: Path, weights: str | None = None) -> dict[str, Tensor]:
    """Return the main state dict of a file, out of what training scripts put round it.

    Args:
        path: The file.
        weights: Where in it the state dict is, where there is more than one.

    Raises:
        BadInputError: If the file is damaged, holds no state dict, or names what can do harm.
        UnsupportedError: If it is a program and no checkpoint.
    """
    held = read_checkpoint(path)
    found = main_weights(sets_of_weights(held), f"model file {path}", weights)
    return {found.prefix + name: value for name, value in found.tensors.items()}


def refused(path: Path, error: BaseException) -> BadInputError:
    """Return the error for a pickle that is more than tensors; PyTorch's own says how to run it."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = (
        f"loading it would run {wanted[1]}" if wanted else ("it is damaged or not a plain pickle")
    )
    return BadInputError(
        f"model {path} was refused and nothing in it executed: {reason}; it must hold tensors "
        "only, as safetensors or torch.save(model.state_dict(), ...) write them"
    )


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


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the names, dtypes, shapes and values of all weights and buffers."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
