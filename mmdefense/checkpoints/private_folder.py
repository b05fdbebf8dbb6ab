"""Give a library a private copy of a model folder, with only what its classes declare.

The weights are linked into it. Of the configuration files it holds the fields that :mod:`configs
<mmdefense.checkpoints.configs>` accepts and the library's class declares, in the installed version;
numbers and flags pass as well, since earlier versions wrote more of them. Weight initialisation is
switched off. While a library reads, the hub is unreachable, and a network with more values than the
files can hold is stopped while it is built, on the meta device.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from mmdefense.checkpoints.configs import ADAPTER, TIMM, TIMM_DATA, is_empty, matching
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.files import read_json

__all__ = ["bounded", "offline", "private_adapter", "private_model"]

MOST_SPARE = 1 << 26
"""Values that a model may have beyond its files: buffers, missing heads. Our choice."""

_CONFIG, _GENERATION, _ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
_OWN_IMPLEMENTATIONS = {"eager", "sdpa"}
_PATHS = {
    "_name_or_path",
    "name_or_path",
    "auto_map",
    "_commit_hash",
    "pretrained_model_name_or_path",
}
_OLD = {
    *("torch_dtype", "rope_scaling", "rope_parameters", "num_labels", "output_attentions"),
    *("label_names", "backbone", "use_timm_backbone", "dilation", "layer_types"),
}
"""Fields with text that classes take without declaring them."""
_LABELS = {"id2label", "label2id", "label_names"}
_WRITES = {
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("bad_words_ids", "repetition_penalty", "no_repeat_ngram_size", "sep_token_id"),
}
"""Generation settings that are kept; the adapters decide length and search."""
_SEARCHES = {
    *("penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty", "constraints"),
    *("force_words_ids", "custom_generate", "num_return_sequences", "num_beams"),
}
"""Generation modes that fetch code from the hub, or multiply the work."""
_PATH = re.compile(r"[/\\]|:")


@contextmanager
def private_model(folder: Path, weights: Sequence[Path]) -> Iterator[Path]:
    """Yield a private folder with a model's weights, and what its class declares of its config.

    Raises:
        BadInputError: If a text in the config points to a file or a repository.
        UnsupportedError: If the weights are quantised.
    """
    with _private(folder, weights) as place:
        config = _cleaned(read_json(folder / _CONFIG))
        _write(place / _CONFIG, config)
        path = folder / _GENERATION
        if path.is_file():
            held = read_json(path)
            kept = {
                name: held[name] for name in sorted(_WRITES & set(held)) if _is_count(held[name])
            }
            _write(place / _GENERATION, kept)
        yield place


@contextmanager
def private_adapter(folder: Path, weights: Sequence[Path], base: nn.Module) -> Iterator[Path]:
    """Yield a private folder with the weights of an update, and its config with modules by name.

    Raises:
        BadInputError: If a pattern takes too long, or it asks for more values than can be stored.
    """
    config = {
        name: value
        for name, value in read_json(folder / _ADAPTER).items()
        if name in ADAPTER and value is not None
    }
    names = [name for name, _ in base.named_modules()]
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = config.get(name)
        if isinstance(value, str) and value != "all-linear":
            config[name] = "|".join(map(re.escape, matching(value, names))) or "(?!)"
    size = sum(path.stat().st_size for path in weights)
    _check_rank(folder, config, base, size)
    with _private(folder, weights) as place:
        _write(place / _ADAPTER, {"base_model_name_or_path": "", **config})
        yield place


def _check_rank(folder: Path, config: Mapping[str, Any], base: nn.Module, size: int) -> None:
    """Refuse an update whose factors would hold more values than the base and the files."""
    ranks = [config.get(name, 0) for name in ("r", "target_r", "init_r")]
    ranks += [rank for rank in config.get("rank_pattern", {}).values() if isinstance(rank, int)]
    sides = sum(sum(p.shape[:2]) for p in base.parameters() if p.ndim > 1)
    most = 4 * sum(p.numel() for p in base.parameters()) + size + MOST_SPARE
    rank = max(ranks)
    if rank * sides > most:
        raise BadInputError(
            f"model {folder}: {_ADAPTER} asks for rank {rank}, and updates of that rank hold "
            "more values than the base model and the files together"
        )


@contextmanager
def _private(folder: Path, weights: Sequence[Path]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mmdefense-") as root:
        place = Path(root, folder.resolve().name or "model")
        place.mkdir()
        for path in [*weights, *folder.glob("*.index.json")]:
            link = place / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield place


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


# --- what a class declares


def _cleaned(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a model's config that is passed on."""
    if not is_empty(content.get("quantization_config")):
        raise UnsupportedError(
            "its weights are quantised (quantization_config) and cannot be trained or read in "
            "float32; use the unquantised model"
        )
    held = dict(content)
    if "model_type" not in held and {"architecture", "pretrained_cfg"} <= set(held):
        held["model_type"] = "timm_wrapper"
    return _declared_part(held, _kind(held, None), "")


def _kind(content: Mapping[str, Any], otherwise: Any) -> Any:
    """Return the class of a config; ``otherwise`` where it names none that is known."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    if isinstance(otherwise, type) and issubclass(otherwise, PreTrainedConfig):
        return otherwise
    try:
        return CONFIG_MAPPING[content.get("model_type")]
    except KeyError:
        return None


def _declared_part(content: Mapping[str, Any], kind: Any, where: str) -> dict[str, Any]:
    known, parts = _declared(kind), getattr(kind, "sub_configs", None) or {}
    kept: dict[str, Any] = {}
    for name, value in _with_backbone(content).items():
        if isinstance(value, Mapping) and (name in parts or "model_type" in value):
            inner = _kind(value, parts.get(name))
            kept[name] = _declared_part(value, inner, f"{where}{name}.")
        elif name == "use_pretrained_backbone":
            kept[name] = False
        elif name in {"model_args", "backbone_kwargs", "pretrained_cfg"}:
            kept[name] = _arguments(name, value)
        elif _is_allowed(name, value, known, kind, where):
            kept[name] = value
    return kept


def _with_backbone(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config in which a backbone of timm has a config of its own.

    If one is named with arguments, the library would ask the hub for a repository of that name.
    """
    name, given = content.get("backbone"), content.get("backbone_kwargs")
    rest = {key: value for key, value in content.items() if key != "backbone_kwargs"}
    if not isinstance(name, str) or not isinstance(given, Mapping) or is_empty(given):
        return content if isinstance(given, Mapping) else rest
    if not is_empty(content.get("backbone_config")) or content.get("use_timm_backbone") is False:
        return content
    taken = {key: given[key] for key in ("out_indices", "output_stride") if key in given}
    own = {"model_type": "timm_backbone", "num_channels": given.get("in_chans", 3), **taken}
    return {**rest, "backbone": None, "backbone_config": {**own, "backbone": name}}


def _arguments(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return None
    known = TIMM_DATA if name == "pretrained_cfg" else TIMM
    return {key: item for key, item in value.items() if key in known}


def _is_allowed(name: str, value: Any, known: set[str], kind: Any, where: str) -> bool:
    """Return whether a field that is not a nested config is passed to the library.

    Raises:
        BadInputError: If it is text that points to a file or a repository.
    """
    if name in _PATHS | _SEARCHES | {"quantization_config"}:
        return False
    if name.endswith(("_implementation", "_implementation_internal")):
        return value in _OWN_IMPLEMENTATIONS if isinstance(value, str) else False
    if name in known | _OLD | {"model_type", "architectures"}:
        if name not in _LABELS and (text := _leading(value)):
            raise BadInputError(
                f"{where}{name} of {_CONFIG} must not point to a file or a repository, got {text!r}"
            )
        return True
    return _is_count(value) and not name.startswith("_") and not hasattr(kind, name)


def _leading(value: Any) -> str:
    """Return a text in a value that may be a path, an address or a repository; or nothing."""
    if isinstance(value, Mapping):
        return next((text for item in value.values() if (text := _leading(item))), "")
    if isinstance(value, list):
        return next((text for item in value if (text := _leading(item))), "")
    return value[:80] if isinstance(value, str) and _PATH.search(value) else ""


def _is_count(value: Any) -> bool:
    """Return whether a value consists of numbers and flags only."""
    if isinstance(value, Mapping):
        return all(map(_is_count, value.values()))
    if isinstance(value, list):
        return all(map(_is_count, value))
    return value is None or isinstance(value, int | float)


def _declared(kind: Any) -> set[str]:
    """Return the fields that a class of configs, of this version of the library, declares."""
    if kind is None:
        return set()
    names = set(getattr(kind, "attribute_map", {}))
    for base in kind.__mro__:
        names |= set(inspect.signature(base.__init__).parameters)
    if is_dataclass(kind):
        names |= {field.name for field in fields(kind)}
    return names - {"self", "args", "kwargs"}


# --- while a library reads


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub client off the network."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def bounded(weights: Sequence[Path]) -> Iterator[None]:
    """Stop a network that grows beyond what these files can hold, while it is built without memory.

    Raises:
        BadInputError: If it does.
    """
    size = sum(path.stat().st_size for path in weights)
    most, count = size + MOST_SPARE, 0

    def counted(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
        nonlocal count
        if value is None or value.device.type != "meta":
            return
        count += value.numel()
        if count > most:
            raise BadInputError(
                f"its configuration asks for more than {most} values, but its weight files have "
                f"{size} bytes"
            )

    with ExitStack() as stack:
        for register in (
            hooks.register_module_parameter_registration_hook,
            hooks.register_module_buffer_registration_hook,
        ):
            stack.callback(register(counted).remove)
        yield
