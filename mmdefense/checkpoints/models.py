"""Load untrusted models without running what they contain; save them completely or not at all.

A model is a Hugging Face folder (or hub id), or a file with a state dict plus the name of the class
that it belongs to. Weights are read as tensors only; code comes from installed libraries, or from
the class that the user names, never from the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.checkpoints.backdoorbench import result_in
from mmdefense.checkpoints.folders import new_folder
from mmdefense.checkpoints.huggingface import (
    base_folder,
    load_folder,
    local_folder,
    side_files,
    weight_files,
    write_folder,
)
from mmdefense.checkpoints.states import that_fit
from mmdefense.checkpoints.weights import check_finite, read_checkpoint, write_state
from mmdefense.errors import BadInputError
from mmdefense.libraries import needed
from mmdefense.notes import note
from mmdefense.sandbox import Channel, Network, in_child, inside, total_size

__all__ = [
    "input_files",
    "load_model",
    "model_places",
    "save_model",
    "weight_names",
    "write_model",
]

WEIGHTS = "model.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def load_model(
    where: str | Path,
    *,
    arch: str | None = None,
    task: str | None = None,
    weights: str | None = None,
) -> nn.Module:
    """Return an untrusted model on the CPU, in float32 and eval mode.

    Args:
        where: A Hugging Face folder or hub id, whole or PEFT; or a state dict (safetensors, or a
            PyTorch file), alone or in a training checkpoint.
        arch: For a state dict, ``"module:callable"`` or ``"module:callable(classes=10)"``, which
            returns the model that the weights belong to; the current directory is importable. A
            result of BackdoorBench names its own.
        task: The name of a task, which decides where a Hugging Face config names no architecture.
        weights: Where in a checkpoint the weights are, where more than one set of them fits: the
            keys that lead to them, joined by dots, such as ``"state_dict_ema"``.

    Raises:
        BadInputError: If there is no model, it cannot be read, loading it would execute something,
            its keys or shapes do not match, or a weight is not finite.
        UnsupportedError: If a library that it needs is not installed, or the file is a program,
            such as TorchScript.
    """
    if not _is_state_file(where) and weights is not None:
        raise BadInputError(
            f"weights {weights!r} has no effect on {where}, which is not a single file; "
            "leave it out"
        )
    place = Path(where) if _is_state_file(where) else local_folder(where)

    def load() -> nn.Module:
        if _is_state_file(place):
            model = _load_state_model(place, arch, weights)
        else:
            model = load_folder(place, task)
        _own_memory(model)
        check_finite(model.state_dict(), where)
        return model.eval()

    _rehearse(load, place, of_the_user=arch is not None)
    return load()


def _rehearse(load: Callable[[], nn.Module], place: Path, *, of_the_user: bool) -> None:
    """Load a model in a child process first, so that one that floods or crashes does so there.

    Args:
        load: Loads it.
        place: Its file or folder.
        of_the_user: Whether the user's own code is run too, which may use the network.

    Raises:
        MMDefenseError: As loading it here would, or since it goes beyond the bounds.
    """
    if inside() or not place.exists():
        return
    folders = [place]
    if place.is_dir():
        with needed("a Hugging Face model"):  # here, so that it is loaded once
            import transformers.modeling_utils  # noqa: F401
        if (place / "adapter_config.json").is_file():
            folders.append(base_folder(place))
    size = sum(total_size(folder) for folder in folders)

    def rehearsed(_: Channel) -> None:
        load()

    network: Network = "always" if of_the_user else "never"
    in_child(rehearsed, what=f"loading {place}", size=size, network=network, quiet=True)


def _own_memory(model: nn.Module) -> None:
    """Copy weights that may still be mapped from a file, so that they stay as they were read."""
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()


def _is_state_file(where: str | Path) -> bool:
    return Path(where).is_file() or Path(where).suffix in _WEIGHT_SUFFIXES


def _load_state_model(path: Path, arch: str | None, weights: str | None) -> nn.Module:
    if not path.is_file():
        fault = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise BadInputError(f"model file {path} {fault}")
    held = read_checkpoint(path)
    result = result_in(held)
    if result is not None:
        note(f"{path} is {result.description}")
    arch = arch or (result.arch if result else None)
    if arch is None:
        about = f"says that it is {result.description}" if result else "holds weights only"
        raise BadInputError(f"{path} {about}; name the model class: --arch module:callable")
    model = build_architecture(arch)
    found = that_fit(held, model.state_dict(), str(path), arch, weights)
    model.load_state_dict(found.tensors, strict=False)
    return model.float()


def save_model(
    model: nn.Module,
    folder: str | Path,
    source: str | Path | None = None,
    *,
    weights: str | None = None,
) -> None:
    """Write ``model`` to a new folder as safetensors, whole or not at all.

    Args:
        model: What to write.
        folder: The folder to make.
        source: Where the model was loaded from; the written weights have its keys, shapes and
            dtypes, and for a Hugging Face model its other files stand beside them. Of a training
            checkpoint, the state dict alone is written.
        weights: As it was loaded; see :func:`load_model`.

    Raises:
        BadInputError: If the folder exists, is or holds or lies in the source, or cannot be
            written, for example on a full disk.
    """
    with new_folder(folder, inputs=[] if source is None else [source]) as temporary:
        write_model(model, temporary, source, weights=weights)


def write_model(
    model: nn.Module,
    folder: Path,
    source: str | Path | None = None,
    *,
    weights: str | None = None,
) -> None:
    """Write the files of ``model`` into a folder that exists; see :func:`save_model`.

    Args:
        model: What to write.
        folder: Where to.
        source: Where the model was loaded from.
        weights: As it was loaded.

    Raises:
        OSError: If a file cannot be written.
    """
    if hasattr(model, "save_pretrained") and not (source and _is_state_file(source)):
        write_folder(model, folder, None if source is None else local_folder(source))
        return
    state = model.state_dict()
    if source is not None:
        state = _as_stored(state, Path(source), weights)
    write_state(state, folder / WEIGHTS)


def _as_stored(state: Mapping[str, Tensor], source: Path, weights: str | None) -> dict[str, Tensor]:
    """Return ``state`` under the keys and in the dtypes of the set of weights that it came from.

    The rest of the same set is kept unchanged.
    """
    found = that_fit(read_checkpoint(source), state, str(source), "the model", weights)
    if found.name:
        note(
            f"only the state dict {found.name} of {source} is written, as {WEIGHTS} with the "
            "same keys; the rest of the checkpoint is not"
        )
    own = {found.prefix + name: state[name].to(old.dtype) for name, old in found.tensors.items()}
    return {**(found.others or {}), **own}


def weight_names(where: str | Path) -> list[str]:
    """Return the names of the weight files of a model, as :func:`input_files` has them."""
    if _is_state_file(where):
        return [Path(where).name]
    folder = local_folder(where)
    return [path.relative_to(folder).as_posix() for path in weight_files(folder)]


def model_places(where: str | Path) -> dict[str, Path]:
    """Return the file or the folder of a model, and the folder of the base that it is an update of.

    Its keys are the prefixes of the file names: nothing, and ``base/``.
    """
    if _is_state_file(where):
        return {"": Path(where)}
    folder = local_folder(where)
    base = base_folder(folder) if (folder / "adapter_config.json").is_file() else None
    return {"": folder} if base is None else {"": folder, "base/": base}


def input_files(where: str | Path) -> dict[str, Path]:
    """Return each file of a model that is read or passed on, by name.

    Those of the base that a LoRA folder is an update of are named ``base/...``.
    """
    if _is_state_file(where):
        return {Path(where).name: Path(where)}
    return {
        prefix + path.relative_to(folder).as_posix(): path
        for prefix, folder in model_places(where).items()
        for path in (*weight_files(folder), *side_files(folder))
    }
