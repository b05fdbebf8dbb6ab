"""Load and write Hugging Face models, whole or PEFT, from folders and hub ids.

The class is the one that ``config.json`` names, of the installed library; a folder's own code is
never run.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmdefense import registry
from mmdefense.checkpoints.configs import check_configs, config_faults
from mmdefense.checkpoints.faults import (
    check_folder,
    leads_outside,
    link_faults,
    refuse,
)
from mmdefense.checkpoints.layout import rewrite
from mmdefense.checkpoints.outputs import is_record
from mmdefense.checkpoints.private_folder import bounded, offline, private_adapter, private_model
from mmdefense.checkpoints.states import check_keys
from mmdefense.checkpoints.weights import read_state, refused
from mmdefense.errors import BadInputError, UnsupportedError, one_line, printable
from mmdefense.files import open_plain, read_json
from mmdefense.libraries import missing, needed
from mmdefense.protocol import traits

__all__ = [
    "base_folder",
    "download",
    "load_folder",
    "local_folder",
    "named_base",
    "side_files",
    "weight_files",
    "write_folder",
]

_CONFIG, _PEFT_CONFIG = "config.json", "adapter_config.json"
_MODEL, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
_TEXTS = ("*.json", "*.txt", "*.md", "LICENSE*", "NOTICE*")
_TOKENIZERS = ("*.jinja", "*.model", "*.spm", "*.tiktoken", "*.vocab", "*.bpe")
_SIDE_FILES = (*_TEXTS, *_TOKENIZERS, "additional_chat_templates/*.jinja")
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
_READERS = ("tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_folder(where: str | Path) -> Path:
    """Return the local folder of a model, downloaded if ``where`` is a hub id.

    Raises:
        BadInputError: If it is neither, or the download fails.
        UnsupportedError: If the library is not installed.
    """
    folder = Path(where)
    if folder.is_dir():
        if any((folder / name).is_file() for name in (_CONFIG, _PEFT_CONFIG)):
            return folder
        raise BadInputError(
            f"model folder {where} must hold a config.json in the Hugging Face format; for a "
            "state dict, give the file itself and --arch module:callable"
        )
    found = download(where, [*_SIDE_FILES, "*.safetensors"])
    if not list(found.glob("*.safetensors")):
        found = download(where, [*_SIDE_FILES, *_PICKLES])
    return found


def download(where: str | Path, patterns: list[str] | None = None) -> Path:
    """Download the files of a hub id and return their folder; none of them is opened.

    Args:
        where: A hub id.
        patterns: Which files; by default all of them.

    Raises:
        BadInputError: If it is not a hub id, or the download fails.
        UnsupportedError: If the library is not installed.
    """
    if not _HUB_ID.fullmatch(str(where)) or Path(where).parent.exists():
        raise BadInputError(
            f"model {str(where)!r} must be a file, a folder or a hub id; none found"
        )
    with needed("a Hugging Face model"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(where), allow_patterns=patterns))
    except Exception as error:  # the client raises many kinds: network, missing, gated
        raise BadInputError(
            f"model {str(where)!r} is not a local file or folder, and could not be fetched from "
            f"the hub: {one_line(error)}"
        ) from error


@dataclass(frozen=True)
class _Update:
    """What a PEFT folder says about the model that it was trained on.

    Attributes:
        kind: Name of its class; empty where the folder does not say.
        saved: Names of the modules that were trained in full, whose weights the folder holds.
        labels: Number of classes by these; none where they have none.
    """

    kind: str = ""
    saved: tuple[str, ...] = ()
    labels: int | None = None

    def holds(self, name: str) -> bool:
        """Return whether the folder has the weight of that name."""
        return any(f".{part}." in f".{name}" for part in self.saved)


def load_folder(folder: Path, task: str | None = None, update: _Update | None = None) -> nn.Module:
    """Return the model of a folder on the CPU, in float32.

    Args:
        folder: As :func:`local_folder` returns it.
        task: The name of a task, which decides where the config names no architecture.
        update: Of a PEFT folder on top: its class is taken, and weights that it holds may be
            missing or of another shape.

    Raises:
        BadInputError: If it cannot be read, loading it would execute something, or its keys or
            shapes do not match.
        UnsupportedError: If a library is not installed, or has no such model.
    """
    check_folder(folder)
    check_configs(folder)
    if (folder / _PEFT_CONFIG).is_file():
        return _load_peft(folder, task)
    weights = weight_files(folder)
    with _in_one_line(folder), _quiet(), offline(), private_model(folder, weights) as private:
        kind, config = _kind_and_config(folder, private, task)
        own = kind
        if update is not None:
            kind = _kind_named(update.kind) or kind
            config.num_labels = update.labels or config.num_labels
        with bounded(weights):
            model, info = kind.from_pretrained(
                str(private),
                config=config,
                trust_remote_code=False,
                weights_only=True,
                local_files_only=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
        model.name_or_path = model.config.name_or_path = str(folder)
    held = update or _Update()
    check_keys(
        sorted(name for name in info["missing_keys"] if not held.holds(name)),
        sorted(info["unexpected_keys"] if kind is own else ()),  # else of the other class's head
        [
            f"{name} is {tuple(found)} but must be {tuple(wanted)}"
            for name, found, wanted in sorted(info["mismatched_keys"])
            if not held.holds(name)
        ],
        f"{folder} do not match its config.json",
    )
    loaded: nn.Module = model
    return loaded


@contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise into one line."""
    try:
        yield
    except (BadInputError, UnsupportedError):
        raise
    except ImportError as error:
        raise missing(f"model {folder}", error) from error
    except pickle.UnpicklingError as error:
        raise refused(folder, error) from error
    except Exception as error:  # they raise many kinds: config, weights, shapes
        raise BadInputError(f"model {folder} cannot be read: {one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
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


def _kind_and_config(folder: Path, private: Path, task: str | None) -> tuple[Any, Any]:
    """Return the class of ``transformers`` that a config asks for, and its config."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(private), trust_remote_code=False, local_files_only=True
    )
    for name in getattr(config, "architectures", None) or ():
        if kind := _kind_named(name):
            return kind, config
    return _kind_by_task(config, folder, task), config


def _kind_named(name: str) -> Any:
    """Return the model class of ``transformers`` of that name, or none."""
    import transformers

    kind = getattr(transformers, name, None) if name else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if is_model else None


def _kind_by_task(config: Any, folder: Path, task: str | None) -> Any:
    """Return the one ``AutoModelFor...`` of the adapters that knows a config."""
    import transformers

    doors = {
        its.auto_class: its.task
        for its in map(traits, registry.installed("adapters"))
        if its.auto_class and its.task and task in {None, its.task}
    }
    found = [name for name in doors if type(config) in getattr(transformers, name)._model_mapping]
    if len(found) == 1:
        return getattr(transformers, found[0])
    named = ", ".join(getattr(config, "architectures", None) or ()) or "no architecture"
    about = f"{folder}/config.json names {named}, of model type {config.model_type!r}"
    if found:
        tasks = ", ".join(dict.fromkeys(doors[name] for name in found))
        raise BadInputError(
            f"{about}, which fits {' and '.join(found)}; give --task ({tasks}), or name one "
            "under 'architectures' in the config"
        )
    raise UnsupportedError(
        f"{about}, for which this version of transformers has no model"
        + (f" in {task}" if task else "")
    )


def _load_peft(folder: Path, task: str | None) -> nn.Module:
    """Return a PEFT model, its updates trainable, around the frozen base that it names."""
    base: Any = load_folder(base_folder(folder), task, _update_of(folder))
    if any((folder / name).is_file() for name in _READERS):
        base.name_or_path = str(folder)  # its own is the one that it was trained with
    with (
        _in_one_line(folder),
        _quiet(),
        offline(),
        private_adapter(folder, weight_files(folder), base) as private,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # missing keys are refused below, by name
        from peft import PeftModel, get_peft_model_state_dict

        model: nn.Module = PeftModel.from_pretrained(base, str(private), is_trainable=True)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    stored = _stored(folder).keys()
    known = {name.replace(".default.", ".") for name in model.state_dict()}
    check_keys(
        sorted(expected - stored),
        sorted(stored - expected - known),
        [],
        f"{folder} do not match its {_PEFT_CONFIG}",
    )
    return model


def _update_of(folder: Path) -> _Update:
    """Return what a PEFT folder, whose config was checked, says about its base."""
    config = read_json(folder / _PEFT_CONFIG)
    kind = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    update = _Update(kind, tuple(config.get("modules_to_save") or ()))
    if "Classification" not in kind:
        return update
    heads = [
        value
        for name, value in _stored(folder).items()
        if name.endswith("weight") and value.ndim == 2 and update.holds(name)
    ]
    return replace(update, labels=len(heads[-1])) if len(heads) == 1 else update


def base_folder(folder: Path) -> Path:
    """Return the folder of the model that a PEFT folder is an update of; nothing is downloaded.

    It is a folder, or a hub id in the local cache: a model's files must not choose what is
    downloaded.

    Raises:
        BadInputError: If it names none, or that is not there.
        UnsupportedError: If that is an update itself.
    """
    path = folder / _PEFT_CONFIG
    if faults := config_faults(path):
        refuse(folder, faults)
    base = read_json(path).get("base_model_name_or_path")
    if not base:
        raise BadInputError(f"{path} does not name its base model; set base_model_name_or_path")
    try:
        found = local_folder(base) if Path(base).is_dir() else _cached(base)
    except (BadInputError, OSError, ValueError) as error:
        raise BadInputError(f"base model of {folder}: {one_line(error)}") from error
    if (found / _PEFT_CONFIG).is_file():
        raise UnsupportedError(
            f"the base {base} of {folder} is a PEFT model itself; merge it into its own base first"
        )
    return found


def named_base(where: str | Path) -> Path | None:
    """Return where the base of a PEFT folder lies on this disk, if it names one that does."""
    path = Path(where) / _PEFT_CONFIG
    if not os.path.isfile(path):
        return None
    try:
        config = read_json(path)
    except BadInputError:
        return None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return Path(base) if isinstance(base, str) and os.path.exists(base) else None


def _cached(base: str) -> Path:
    """Return where a hub id lies in the local cache.

    Raises:
        BadInputError: If it is none, or is not there.
        UnsupportedError: If the library is not installed.
    """
    name = printable(base)
    if not _HUB_ID.fullmatch(base):
        raise BadInputError(f"{name!r} must be a folder or a hub id; none found")
    with needed("a Hugging Face model"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(base, local_files_only=True))
    except Exception as error:  # the client raises many kinds
        raise BadInputError(
            f"{name!r} is neither a folder nor in the local cache, and is not downloaded just "
            f"because a model names it; if you trust it, run `hf download {name}` first"
        ) from error


def write_folder(model: Any, folder: Path, origin: Path | None) -> None:
    """Write a model as its library does; then give it the keys, dtypes and files of ``origin``.

    Args:
        model: What to write.
        folder: Where to.
        origin: Where it came from.

    Raises:
        OSError: If a file cannot be written.
    """
    # peft would ask the hub whether embeddings were resized; what was stored is put back below.
    options = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
    try:
        with _quiet():
            model.save_pretrained(folder, **options)
    except SafetensorError as error:  # it reports a full disk as its own error
        raise OSError(0, one_line(error)) from error
    if origin is None:
        return
    kept = rewrite(model, folder, weight_files(origin))
    for path in side_files(origin):
        # an index lists the files that it came with
        if kept or not path.name.endswith(".index.json"):
            target = folder / path.relative_to(origin)
            target.parent.mkdir(exist_ok=True)
            with open_plain(path) as given, target.open("wb") as copy:
                shutil.copyfileobj(given, copy)


def side_files(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to the model besides its weights, in order.

    Not among them: code, an index of pickles (which are never written), and what would be taken for
    one of our records, since it does not describe this output.
    """
    found = {path for pattern in _SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(
        path
        for path in found
        if not (path.name.endswith(".bin.index.json") or is_record(path.name))
        and not link_faults(path, folder)
    )


def _stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: value for path in weight_files(folder) for name, value in read_state(path).items()
    }


def weight_files(folder: Path) -> list[Path]:
    """Return the files that the library reads the weights of a folder from, in its order.

    That is one safetensors file, else the shards that an index names, else any safetensors, else
    pickles. Other files of weights that a repository may hold, such as those of another library,
    are not among them.

    Raises:
        BadInputError: If the index cannot be read, or names a file outside the folder or none.
    """
    single = _ADAPTER if (folder / _PEFT_CONFIG).is_file() else _MODEL
    if (folder / single).is_file():
        return [folder / single]
    sharded = folder / f"{single}.index.json"
    if sharded.is_file():
        return _shards(sharded)
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    return sorted(folder.glob("*.safetensors")) or pickles


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise BadInputError(f"{index} must have a weight_map from tensors to file names")
    for name in (names := sorted(set(shards.values()))):
        if leads_outside(name) or not (index.parent / name).is_file():
            raise BadInputError(f"{index} names {name!r}, which is not a file in the folder")
    return [index.parent / name for name in names]
