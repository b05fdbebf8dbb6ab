"""Load untrusted models without running what they contain; save them whole or not at all.

A model is a Hugging Face folder (or hub id), or a file with a state dict plus the name of the class
that it belongs to. Weights are read as tensors only; code comes from installed libraries, or from
the class that the user names, never from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.checkpoints.folders import new_folder
from mmdefense.checkpoints.weights import (
    check_finite,
    check_keys,
    read_state,
    refused,
    strip_prefix,
    write_state,
)
from mmdefense.errors import BadInputError, UnsupportedError, one_line

__all__ = [
    "class_names",
    "hash_files",
    "load_model",
    "load_processor",
    "save_model",
    "write_model",
]

WEIGHTS = "model.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SIDE_FILES = ("*.json", "*.txt", "*.md")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def load_model(where: str | Path, *, arch: str | None = None) -> nn.Module:
    """Return an untrusted model on the CPU, in float32 and eval mode.

    Args:
        where: A Hugging Face folder or hub id, or a state dict (safetensors, or a PyTorch file).
        arch: For a state dict, ``"module:callable"`` or ``"module:callable(classes=10)"``, which
            returns the model that the weights belong to; the current directory is importable.

    Raises:
        BadInputError: If there is no model, it cannot be read, loading it would execute something,
            its keys or shapes do not match, or a weight is not finite.
        UnsupportedError: If a library that it needs is not installed.
    """
    if _is_state_file(where):
        model = _load_state_model(Path(where), arch)
    else:
        model = _load_hugging_face(_hugging_face_folder(where))
    check_finite(model.state_dict(), where)
    return model.eval()


def _is_state_file(where: str | Path) -> bool:
    return Path(where).is_file() or Path(where).suffix in _WEIGHT_SUFFIXES


def _hugging_face_folder(where: str | Path) -> Path:
    """Return the local folder of ``where``, downloaded if it is a hub id."""
    folder = Path(where)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        raise BadInputError(
            f"model folder {where} must hold a config.json, as Hugging Face writes it; for a state "
            "dict give the file itself and --arch module:callable"
        )
    if not _HUB_ID.fullmatch(str(where)) or folder.parent.exists():
        raise BadInputError(
            f"model {str(where)!r} must be a file, a folder or a hub id; none found"
        )
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise _needs_hugging_face(error) from error
    try:
        found = Path(snapshot_download(str(where), allow_patterns=[*_SIDE_FILES, "*.safetensors"]))
        if not list(found.glob("*.safetensors")):
            found = Path(
                snapshot_download(str(where), allow_patterns=[*_SIDE_FILES, "pytorch_model*.bin"])
            )
    except Exception as error:  # the client raises many kinds: network, missing, gated
        raise BadInputError(
            f"model {str(where)!r} is no file or folder here, and the hub did not give it: "
            f"{one_line(error)}"
        ) from error
    return found


def _needs_hugging_face(error: ModuleNotFoundError) -> UnsupportedError:
    return UnsupportedError(
        f"a Hugging Face model needs the package {error.name!r}; "
        "pip install 'mmdefense[huggingface]'"
    )


def _load_hugging_face(folder: Path) -> nn.Module:
    try:
        from transformers import AutoModelForImageClassification
    except ModuleNotFoundError as error:
        raise _needs_hugging_face(error) from error
    try:
        with _quiet_transformers():
            model, info = AutoModelForImageClassification.from_pretrained(
                str(folder),
                trust_remote_code=False,
                weights_only=True,
                local_files_only=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except pickle.UnpicklingError as error:
        raise refused(folder, error) from error
    except Exception as error:  # transformers raises many kinds: config, weights, shapes
        raise BadInputError(f"model {folder} cannot be read: {one_line(error)}") from error
    check_keys(
        sorted(info["missing_keys"]),
        sorted(info["unexpected_keys"]),
        [
            f"{name} is {tuple(found)} but must be {tuple(wanted)}"
            for name, found, wanted in sorted(info["mismatched_keys"])
        ],
        f"{folder} do not fit its config.json",
    )
    loaded: nn.Module = model
    return loaded


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep progress bars and load reports off the terminal; what matters is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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


def load_processor(where: str | Path) -> dict[str, Any] | None:
    """Return the settings of a Hugging Face model's image processor; none where it has none.

    They say how the model's inputs are scaled and resized; image adapters take them as
    ``processor=``.

    Raises:
        BadInputError: If the settings are not JSON.
    """
    if _is_state_file(where):
        return None
    path = _hugging_face_folder(where) / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path} must be JSON: {one_line(error)}") from error
    return settings


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's classes in order, or nothing where it does not tell them."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, Mapping):
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    placeholders = tuple(f"LABEL_{index}" for index in range(len(ordered)))
    return () if ordered == placeholders else ordered


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
        _write_hugging_face(model, folder, source)
        return
    state = model.state_dict()
    if source is not None:
        state = _as_stored(state, read_state(Path(source)))
    write_state(state, folder / WEIGHTS)


def _as_stored(state: Mapping[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` under the keys and in the dtypes of the ``stored`` one."""
    original, prefix = strip_prefix(stored)
    return {prefix + name: state[name].to(value.dtype) for name, value in original.items()}


def _write_hugging_face(model: Any, folder: Path, source: str | Path | None) -> None:
    """Let the library write its own key names, then restore what it changed on loading."""
    try:
        with _quiet_transformers():
            model.save_pretrained(folder)
    except SafetensorError as error:  # it reports a full disk as its own error
        raise OSError(0, one_line(error)) from error
    if source is None:
        return
    origin = _hugging_face_folder(source)
    dtypes = _stored_dtypes(origin)
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if any(value.dtype != dtypes.get(name, value.dtype) for name, value in state.items()):
            like = {name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items()}
            write_state(like, path)
    for path in (path for pattern in _SIDE_FILES for path in origin.glob(pattern)):
        if not path.name.endswith(".index.json"):  # it names shards that are not written again
            shutil.copyfile(path, folder / path.name)


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the dtype of each stored weight of a Hugging Face folder."""
    files = _weight_files(folder)
    return {name: value.dtype for path in files for name, value in read_state(path).items()}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def hash_files(where: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a model by name, as ``sha256sum`` prints it."""
    files = [Path(where)] if _is_state_file(where) else _weight_files(_hugging_face_folder(where))
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
