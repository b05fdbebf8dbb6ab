"""Load untrusted models without running what they contain; save them whole or not at all.

A model is a Hugging Face folder (or hub id), or a file with a state dict plus the name of the class
that it belongs to. Weights are read as tensors only; code comes from installed libraries, or from
the class that the user names, never from the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.checkpoints.folders import new_folder
from mmdefense.checkpoints.huggingface import (
    base_folder,
    load_folder,
    local_folder,
    side_files,
    weight_files,
    write_folder,
)
from mmdefense.checkpoints.weights import (
    check_finite,
    check_keys,
    read_state,
    strip_prefix,
    write_state,
)
from mmdefense.errors import BadInputError

__all__ = ["hash_files", "hash_inputs", "load_model", "save_model", "write_model"]

WEIGHTS = "model.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def load_model(where: str | Path, *, arch: str | None = None, task: str | None = None) -> nn.Module:
    """Return an untrusted model on the CPU, in float32 and eval mode.

    Args:
        where: A Hugging Face folder or hub id, whole or PEFT; or a state dict (safetensors, or a
            PyTorch file).
        arch: For a state dict, ``"module:callable"`` or ``"module:callable(classes=10)"``, which
            returns the model that the weights belong to; the current directory is importable.
        task: The name of a task, which decides where a Hugging Face config names no architecture.

    Raises:
        BadInputError: If there is no model, it cannot be read, loading it would execute something,
            its keys or shapes do not match, or a weight is not finite.
        UnsupportedError: If a library that it needs is not installed.
    """
    if _is_state_file(where):
        model = _load_state_model(Path(where), arch)
    else:
        model = load_folder(local_folder(where), task)
    check_finite(model.state_dict(), where)
    return model.eval()


def _is_state_file(where: str | Path) -> bool:
    return Path(where).is_file() or Path(where).suffix in _WEIGHT_SUFFIXES


def _load_state_model(path: Path, arch: str | None) -> nn.Module:
    if not path.is_file():
        raise BadInputError(f"model file {path} does not exist")
    if arch is None:
        raise BadInputError(
            f"{path} holds weights only; name the class that they belong to: --arch module:callable"
        )
    state, prefix = strip_prefix(read_state(path))
    model = build_architecture(arch)
    expected = model.state_dict()
    given = {value.data_ptr() for key, value in expected.items() if key in state}
    missing = [
        key
        for key, value in expected.items()
        if key not in state
        and not key.endswith("num_batches_tracked")
        and value.data_ptr() not in given  # a shared tensor, stored once
    ]
    unexpected = [prefix + k for k in state if k not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)} but must be {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    check_keys(missing, unexpected, shapes, f"{path} do not fit {arch}")
    model.load_state_dict(state, strict=False)
    return model.float()


def save_model(
    model: nn.Module, folder: str | Path, source: str | Path | None = None, *, force: bool = False
) -> None:
    """Write ``model`` to a new folder as safetensors, whole or not at all.

    Args:
        model: What to write.
        folder: The folder to make.
        source: Where the model was loaded from; the written weights have its keys, shapes and
            dtypes, and for a Hugging Face model its other files stand beside them.
        force: Whether an earlier output at ``folder`` is replaced.

    Raises:
        BadInputError: If the folder exists, or cannot be written, for example on a full disk.
    """
    with new_folder(folder, force=force) as temporary:
        write_model(model, temporary, source)


def write_model(model: nn.Module, folder: Path, source: str | Path | None = None) -> None:
    """Write the files of ``model`` into a folder that exists; see :func:`save_model`.

    Raises:
        OSError: If a file cannot be written.
    """
    if hasattr(model, "save_pretrained") and not (source and _is_state_file(source)):
        write_folder(model, folder, None if source is None else local_folder(source))
        return
    state = model.state_dict()
    if source is not None:
        state = _as_stored(state, read_state(Path(source)))
    write_state(state, folder / WEIGHTS)


def _as_stored(state: Mapping[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` under the keys and in the dtypes of the ``stored`` one."""
    original, prefix = strip_prefix(stored)
    return {prefix + name: state[name].to(value.dtype) for name, value in original.items()}


def hash_files(where: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a model by name, as ``sha256sum`` prints it."""
    files = [Path(where)] if _is_state_file(where) else weight_files(local_folder(where))
    return {path.name: _sha256(path) for path in files}


def hash_inputs(where: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each file that is read of a model or handed on with it, by name.

    The files of the base that a LoRA folder is an update of are named ``base/...``.
    """
    if _is_state_file(where):
        return hash_files(where)
    folder = local_folder(where)
    hashes = _hashed(folder)
    if (folder / "adapter_config.json").is_file():
        base = _hashed(base_folder(folder))
        hashes |= {f"base/{name}": value for name, value in base.items()}
    return hashes


def _hashed(folder: Path) -> dict[str, str]:
    files = [*weight_files(folder), *side_files(folder)]
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
