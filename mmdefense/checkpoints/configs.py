"""Check the configuration files of a model folder before any library reads them.

The values of a configuration become arguments of constructors in ``transformers``, ``timm`` and
``peft``, and some of these load files, import modules or contact the hub. Which ones do depends on
the library's version, so there is one rule for all versions: **what is not known to be harmless is
not passed on.** It is applied in two places, one after the other.

Here, without any library and also for a scan, a file is refused for a field that is known to reach
a loader, for a value of the wrong type, and for a count that the stored weights do not support:

* of ``config.json``, at any depth: implementations of attention that are none of Transformers' own,
  dtypes that are none, arguments of timm (``model_args``, ``backbone_kwargs``) beyond those that
  shape a network, architectures and backbones that are more than a name, and in ``pretrained_cfg``
  where weights come from;
* of ``adapter_config.json``: every field but those of :data:`ADAPTER`, unless it is empty; starts
  that change the base or compute long; names of modules that are patterns, except where
  :func:`matching` bounds the time that they take;
* of the files of processors and tokenizers: values that are no plain settings, and files elsewhere.

In :mod:`mmdefense.checkpoints.private_folder` each library gets a private folder with the fields
that its class declares and the weights, and nothing else that came with the model.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.faults import Fault, leads_outside, refuse
from mmdefense.errors import BadInputError
from mmdefense.files import read_json

__all__ = [
    "ADAPTER",
    "TIMM",
    "TIMM_DATA",
    "check_configs",
    "config_faults",
    "content_faults",
    "is_empty",
    "is_implementation",
    "matching",
]

MOST_LABELS = 1_000_000
"""Classes that a classifier may have. Our choice; the largest public ones have about 22,000."""
MOST_LAYERS = 512
"""Layers that a config may ask for even if fewer tensors are stored. Our choice."""
MOST_PIXELS = 1 << 12
"""Largest side in pixels of a processor's output. Our choice."""
MOST_TOKENS = 100_000
"""Tokens that a tokenizer may add by a number alone. Our choice."""
MATCHING = 1.0
"""Seconds that a pattern may take to match all module names. Our choice."""

_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_IMPLEMENTATIONS = {
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
    *("flex_attention", "grouped_mm", "batched_mm"),
}
_DTYPE = re.compile(
    r"auto|(torch\.)?(float(16|32|64)?|half|double|bfloat16|float8_\w+|u?int(8|16|32|64)|bool)"
)
_NAME = re.compile(r"[\w-][\w.-]{0,199}")
_MODULE = re.compile(r"\w[\w.]{0,199}")
_PATTERN = re.compile(r"\^?(\w|\\?\.|-){1,200}\$?")
_LAYERS = re.compile(
    r"(num|n)_(\w+_)?(layers?|blocks)|(en|de)coder_(layers|depths?)|layers|depths?|blocks"
)
_COUNTED = re.compile(r"(num|n)_\w+|\w+_(size|dim|layers|heads|channels|width)")
_REPEATED_TWICE = re.compile(r"\((?:[^()\\]|\\.)*[|+*{](?:[^()\\]|\\.)*\)[+*{]")
_READERS = re.compile(r"\w{0,99}(Tokenizer|Processor|FeatureExtractor|Backend)\w{0,99}")
_FILE = re.compile(r"\w*_file|\w+_spm|\w*(checkpoint|kernel)_path|hf_hub_id|custom_load")

TIMM = frozenset({
    *("img_size", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "drop_block_rate"),
    *("patch_size", "window_size", "window_ratio", "embed_dim", "embed_dims", "depth", "depths"),
    *("num_heads", "mlp_ratio", "mlp_ratios", "qkv_bias", "qk_norm", "layers", "out_indices"),
    *("features_only", "output_stride", "act_layer", "norm_layer", "dynamic_img_size"),
    *("dynamic_img_pad", "strict_img_size", "always_partition", "class_token", "no_embed_class"),
    *("pre_norm", "final_norm", "fc_norm", "init_values", "ls_init_value", "head_init_scale"),
    *("stem_type", "stem_width", "stem_chs", "cardinality", "base_width", "dims", "channels"),
    *("reg_tokens", "scriptable", "exportable", "head_hidden_size", "conv_mlp", "block_args"),
    *("proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate", "pos_embed"),
    *("weight_init", "replace_stem_pool", "down_kernel_size", "avg_down", "kernel_sizes"),
    *("use_rel_pos", "use_abs_pos", "num_features", "width", "width_mult", "resolution", "bias"),
})  # fmt: skip
"""Arguments of timm that shape a network, and load nothing."""

TIMM_DATA = frozenset({
    *("tag", "input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct"),
    *("crop_mode", "mean", "std", "num_classes", "label_offset", "label_names", "pool_size"),
    *("test_input_size", "test_crop_pct", "test_crop_mode", "first_conv", "classifier"),
    *("custom_load", "license", "origin_url", "paper_name", "paper_ids", "notes", "architecture"),
    *("label_descriptions", "mirror_url", "source"),
})  # fmt: skip
"""Fields of ``pretrained_cfg`` about data and origin, which no weight loader reads."""

_Wanted = tuple[Callable[[Any], bool], str]


def is_empty(value: Any) -> bool:
    """Return whether a value is empty: null, false, or a container of such values."""
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, list):
        return all(is_empty(item) for item in value)
    return value is None or value is False or value == ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1 << 53


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_text(value: Any, form: re.Pattern[str]) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _are(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_plain(value: Any) -> bool:
    """Return whether a value consists of numbers, flags and names, in lists and maps."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or _is_number(value) or _is_text(value, _NAME)


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _is_module(value: Any) -> bool:
    return _is_text(value, _MODULE)


def _by_pattern(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping)
        and all(_is_text(key, _PATTERN) and kind(item) for key, item in value.items())
    )


_FLAG: _Wanted = (lambda value: isinstance(value, bool), "true or false")
_NUMBER: _Wanted = (_is_number, "a number")
_WHOLE: _Wanted = (_is_whole, "a whole number")
_WORD: _Wanted = (lambda value: _is_text(value, _NAME), "a name")
_READER: _Wanted = (
    lambda value: _is_text(value, _READERS),
    "a class of tokenizers, processors or feature extractors",
)
_MODULES: _Wanted = (_are(_is_module), "module names")
_TARGETS: _Wanted = (
    lambda value: _are(_is_module)(value) or (isinstance(value, str) and len(value) <= 2000),
    "module names, or a pattern of at most 2000 characters",
)
_START: _Wanted = (
    lambda value: isinstance(value, bool) or _one_of("gaussian", "orthogonal")(value),
    "true, false, gaussian or orthogonal (other initialisations change the base or are slow)",
)

ADAPTER: Mapping[str, _Wanted] = {
    "peft_type": (
        _one_of("LORA", "ADALORA", "IA3", "LOHA", "LOKR"),
        "one of LORA, ADALORA, IA3, LOHA, LOKR",
    ),
    "task_type": _WORD,
    "inference_mode": _FLAG,
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "feedforward_modules": _TARGETS,
    "modules_to_save": _MODULES,
    "target_parameters": _MODULES,
    "layers_to_transform": (lambda v: _is_whole(v) or _are(_is_whole)(v), "layer indices"),
    "layers_pattern": (lambda v: _is_module(v) or _are(_is_module)(v), "module names"),
    "rank_pattern": (
        _by_pattern(lambda v: _is_whole(v) or _are(lambda one: isinstance(one, bool))(v)),
        "a map of module names to ranks",
    ),
    "alpha_pattern": (_by_pattern(_is_number), "a map of module names to numbers"),
    "init_lora_weights": _START,
    "init_ia3_weights": _FLAG,
    "init_weights": _FLAG,
    "bias": (_one_of("none", "all", "lora_only"), "none, all or lora_only"),
    **dict.fromkeys(("r", "target_r", "init_r", "tinit", "tfinal", "deltaT", "total_step"), _WHOLE),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "alpha", "rank_dropout"), _NUMBER),
    **dict.fromkeys(("module_dropout", "beta1", "beta2", "orth_reg_weight"), _NUMBER),
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"), _FLAG),
    **dict.fromkeys(("use_effective_conv2d", "decompose_both", "rank_dropout_scale"), _FLAG),
    "decompose_factor": _NUMBER,
}
"""The fields of an adapter that are passed to ``peft``, and what each may hold."""

_SAID = {
    "base_model_name_or_path": (lambda v: isinstance(v, str) and len(v) < 4096, "text"),
    "auto_mapping": (
        lambda v: (
            isinstance(v, Mapping)
            and _is_module(v.get("base_model_class"))
            and str(v.get("parent_library")).startswith("transformers.")
            and _is_module(v.get("parent_library"))
        ),
        "a class of the transformers library",
    ),
}
"""Fields of an adapter that are read here and not passed on."""

_LEFT_OUT = {"megatron_core", "peft_version", "revision", "qalora_group_size"}
"""Fields of an adapter that do nothing without another one, which is refused."""


def check_configs(folder: Path) -> None:
    """Refuse a model folder whose configuration files have a fault.

    Raises:
        BadInputError: Naming the first fault.
    """
    for path in sorted(folder.glob("*config.json")):
        if faults := config_faults(path):
            refuse(folder, faults)


def config_faults(path: Path) -> list[Fault]:
    """Return the faults of a configuration file; other files have none.

    Raises:
        BadInputError: If it is no JSON.
    """
    return content_faults(path.name, read_json(path), path.parent) if path.name in _FORMS else []


def content_faults(name: str, content: Any, folder: Path | None) -> list[Fault]:
    """Return the faults in the content of a configuration file; see :func:`config_faults`.

    Args:
        name: Of the file.
        content: The JSON that it holds.
        folder: The folder with the weights, if any.
    """
    form = _FORMS.get(name)
    if form is None:
        return []
    if not isinstance(content, Mapping):
        return [_form(f"{name} must be a JSON object, got {type(content).__name__}")]
    return [Fault(fault.kind, f"{name}: {fault.text}") for fault in form(content, folder)]


def _form(text: str) -> Fault:
    return Fault("form", text)


def _wrong(name: str, value: Any, wanted: str) -> Fault:
    return _form(f"{name} must be {wanted}, got {value!r:.80}")


# --- config.json


def _model_faults(content: Mapping[str, Any], folder: Path | None) -> Iterator[Fault]:
    """Yield the faults of a model's config; configs of other libraries are not checked."""
    is_timm = "architecture" in content and "pretrained_cfg" in content
    if not is_timm and not {"model_type", "architectures"} & set(content):
        return
    yield from _labels_faults(content)
    yield from _fields_faults(content, max(MOST_LAYERS, _stored_tensors(folder)), "")


def _labels_faults(content: Mapping[str, Any]) -> Iterator[Fault]:
    kinds = {
        "model_type": _WORD,
        "architectures": (_are(lambda one: _is_text(one, _NAME)), "class names"),
        "id2label": (_is_label_map, "a map of labels to class names"),
        "label2id": (
            lambda v: isinstance(v, Mapping) and all(map(_is_label, v.values())),
            "a map of class names to labels",
        ),
        "label_names": (_are(lambda one: isinstance(one, str)), "class names"),
    }
    for name, (is_sound, wanted) in kinds.items():
        value = content.get(name)
        if value is not None and not is_sound(value):
            yield _wrong(name, value, wanted)
    for name in ("num_labels", "num_classes"):
        value = content.get(name, 0)
        if _is_number(value) and value > MOST_LABELS:
            yield Fault("size", f"{name} = {value} is more than {MOST_LABELS} classes")


def _is_label_map(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_label(key) and isinstance(item, str | int | float) for key, item in value.items()
    )


def _is_label(value: Any) -> bool:
    return _is_whole(value) or (
        isinstance(value, str) and re.fullmatch(r"\d{1,7}", value) is not None
    )


def _fields_faults(content: Mapping[str, Any], layers: int, where: str) -> Iterator[Fault]:
    for name, value in content.items():
        yield from _field_faults(name, value, layers, where + name)
        if isinstance(value, Mapping) and name not in {"id2label", "label2id", "pretrained_cfg"}:
            yield from _fields_faults(value, layers, f"{where}{name}.")


def _field_faults(name: str, value: Any, layers: int, where: str) -> Iterator[Fault]:
    if is_empty(value):
        return
    if _IMPLEMENTATION.fullmatch(name):
        if not is_implementation(value):
            yield _loader(where, value, "which would fetch and run a kernel of that name")
    elif name in _FIELDS:
        is_sound, why = _FIELDS[name]
        if not is_sound(value):
            yield _loader(where, value, why)
    elif name in {"model_args", "backbone_kwargs"}:
        yield from _timm_faults(value, where)
    elif name == "pretrained_cfg":
        yield from _origin_faults(value, where)
    else:
        yield from _count_faults(name, value, layers, where)


def _loader(where: str, value: Any, why: str) -> Fault:
    return Fault("loader", f"{where} = {value!r:.80}, {why}")


def is_implementation(value: Any) -> bool:
    """Return whether implementations of attention or experts are Transformers' own."""
    if isinstance(value, Mapping):
        return all(map(is_implementation, value.values()))
    return value is None or (isinstance(value, str) and value in _IMPLEMENTATIONS)


def _is_dtype(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_dtype, value.values()))
    return value is None or _is_text(value, _DTYPE)


def _is_source(value: Any) -> bool:
    return not isinstance(value, str) or _is_text(value, _NAME)


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("dtype", "torch_dtype"), (_is_dtype, "which is not a dtype")),
    **dict.fromkeys(
        ("architecture", "backbone"),
        (_is_source, "which points to a repository or a file and is not a name"),
    ),
    "transformers_weights": (
        is_empty,
        "which makes Transformers load other weights than those checked here",
    ),
}


def _timm_faults(value: Any, where: str) -> Iterator[Fault]:
    if not isinstance(value, Mapping):
        yield _wrong(where, value, "a map of argument names to values")
        return
    for name, item in value.items():
        if name == "pretrained_cfg":
            yield from _origin_faults(item, f"{where}.{name}")
        elif name not in TIMM and not is_empty(item):
            yield _loader(f"{where}.{name}", item, "which is not an argument that shapes a network")
        elif not _is_plain(item):
            yield _wrong(f"{where}.{name}", item, "numbers and names")


def _origin_faults(value: Any, where: str) -> Iterator[Fault]:
    if not isinstance(value, Mapping):
        yield _loader(where, value, "which would be used as a source of weights")
        return
    for name, item in value.items():
        is_source = name not in TIMM_DATA or name in {"custom_load", "source"}
        if is_source and not is_empty(item):
            yield _loader(f"{where}.{name}", item, "which sets where weights are loaded from")
        elif name in _PROCESSOR and item is not None and not _PROCESSOR[name][0](item):
            yield _wrong(f"{where}.{name}", item, _PROCESSOR[name][1])


def _count_faults(name: str, value: Any, layers: int, where: str) -> Iterator[Fault]:
    whole = [one for one in _flat(value) if _is_number(one)]
    if _LAYERS.fullmatch(name) and sum(whole) > layers:
        text = f"{where} asks for {sum(whole)} layers, more than {layers}"
        yield Fault("size", f"{text} and more than the stored tensors allow")
    elif any(isinstance(one, int) and abs(one) > 1 << 53 for one in _flat(value)):
        yield Fault("size", f"{where} is larger than in any real model")
    elif _COUNTED.fullmatch(name) and isinstance(value, str):
        yield _wrong(where, value, "a number")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif not isinstance(value, Mapping):
        yield value


def _stored_tensors(folder: Path | None) -> int:
    """Return about how many tensors the safetensors of a folder hold, without trusting them."""
    size = 0
    for path in filter(Path.is_file, folder.glob("*.safetensors") if folder else ()):
        with path.open("rb") as file:
            claimed = int.from_bytes(file.read(8), "little")
        size += min(claimed, path.stat().st_size) // 64  # an entry of the header takes more
    return size


# --- adapter_config.json


def _adapter_faults(content: Mapping[str, Any], folder: Path | None) -> Iterator[Fault]:
    for name, value in content.items():
        if is_empty(value) or name in _LEFT_OUT:
            continue
        is_sound, wanted = ADAPTER.get(name) or _SAID.get(name) or (None, "")
        if is_sound is None:
            yield _loader(name, value, "which is not passed to peft")
        elif not is_sound(value):
            kind = "loader" if name in {"auto_mapping", "init_lora_weights"} else "form"
            yield Fault(kind, _wrong(name, value, wanted).text)  # type: ignore[arg-type]
        elif name.endswith("_modules") and isinstance(value, str):
            yield from _pattern_faults(name, value)


def _pattern_faults(name: str, pattern: str) -> Iterator[Fault]:
    if found := _REPEATED_TWICE.search(pattern):
        text = f"{name} has nested repetition, {found[0][:80]!r}"
        yield Fault(
            "size", f"{text}, which may take forever to match; list the module names instead"
        )
        return
    try:
        list(matching(pattern, ["a" * 64, "model.layers.0.self_attn.q_proj" + ".a" * 16]))
    except BadInputError as error:
        yield Fault("size", f"{name}: {error}")


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern matches completely, within a time limit.

    Raises:
        BadInputError: If it is not a valid pattern, or takes longer.
    """
    import regex  # transformers brings it; unlike re, it can stop

    end = time.monotonic() + MATCHING
    try:
        compiled = regex.compile(pattern)
        return [
            name
            for name in names
            if compiled.fullmatch(name, timeout=max(1e-3, end - time.monotonic()))
        ]
    except TimeoutError:
        raise BadInputError(
            f"the pattern {pattern[:80]!r} takes more than {MATCHING:g} s to match module names; "
            "list them instead"
        ) from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise BadInputError(
            f"the pattern {pattern[:80]!r} is not a regular expression: {error}"
        ) from error


# --- processors, tokenizers and generation


def _plain_faults(content: Mapping[str, Any], _: Path | None) -> Iterator[Fault]:
    for name, value in content.items():
        is_token = name.endswith(("_token_id", "_token_ids")) and not is_empty(value)
        if is_token and not (_is_number(value) or _are(_is_number)(value)):
            yield _wrong(name, value, "token ids")


_SIDES = ("size", "crop_size", "pad_size", "max_image_size", "input_size", "test_input_size")


def _are_pixels(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(one is None or _are_pixels(one) for one in value.values())
    if isinstance(value, list):
        return len(value) <= 3 and all(map(_are_pixels, value))
    return _is_number(value) and 0 < value <= MOST_PIXELS


_PIXELS: _Wanted = (_are_pixels, f"a size of at most {MOST_PIXELS} pixels a side")
_PROCESSOR: Mapping[str, _Wanted] = {
    **dict.fromkeys(_SIDES, _PIXELS),
    **dict.fromkeys(
        ("image_mean", "image_std", "mean", "std"),
        (
            lambda v: _is_number(v) or (_are(_is_number)(v) and len(v) <= 64),
            "one number per channel",
        ),
    ),
    **dict.fromkeys(("rescale_factor", "resample", "size_divisor"), _NUMBER),
    **dict.fromkeys(
        ("crop_pct", "test_crop_pct"),
        (lambda v: _is_number(v) and 0.05 <= v <= 20, "a number from 0.05 to 20"),
    ),
    **dict.fromkeys(
        ("image_processor_type", "feature_extractor_type", "video_processor_type"), _READER
    ),
    **dict.fromkeys(("processor_class", "tokenizer_class"), _READER),
}


def _processor_faults(content: Mapping[str, Any], _: Path | None) -> Iterator[Fault]:
    for name, value in content.items():
        is_sound, wanted = _PROCESSOR.get(name) or (_FLAG if name.startswith("do_") else (None, ""))
        if value is None or name in {"chat_template", "pretrained_cfg", "auto_map"}:
            continue
        if name == "size" and "merge_size" in content:
            continue  # there it is the number of pixels of the image
        if isinstance(value, Mapping) and name in {"image_processor", "video_processor"}:
            yield from _processor_faults(value, _)
        elif is_sound is not None and not is_sound(value):
            yield _wrong(name, value, wanted)
        elif _FILE.fullmatch(name) and not is_empty(value):
            yield _loader(name, value, "which points to a file")


def _tokenizer_faults(content: Mapping[str, Any], folder: Path | None) -> Iterator[Fault]:
    for name, value in content.items():
        if is_empty(value) or name == "special_tokens_map_file":
            continue
        if _FILE.fullmatch(name):
            if _is_elsewhere(str(value)):
                yield _loader(name, value, "which points to a file outside the folder")
        elif name in {"tokenizer_class", "processor_class"} and not _READER[0](value):
            yield _wrong(name, value, _READER[1])
        elif name == "model_max_length" and not isinstance(value, int | float):
            yield _wrong(name, value, "a number")
        elif name == "extra_ids" and not (_is_whole(value) and value < MOST_TOKENS):
            yield Fault("size", f"{name} = {value!r:.80} must be below {MOST_TOKENS}")
        elif name == "sp_model_kwargs" and "model_file" in value:
            yield _loader(name, value, "which points to a file")
        elif re.fullmatch(r"(bos|eos|unk|sep|pad|cls|mask)_token", name) and not _is_token(value):
            yield _wrong(name, value, "a token")


def _is_elsewhere(name: str) -> bool:
    """Return whether a name points outside the folder, to a place that exists or may exist."""
    return "://" in name or (leads_outside(name) and os.path.exists(name)) or ".." in name


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Mapping) and isinstance(value.get("content"), str)
    )


_FORMS: Mapping[str, Callable[[Mapping[str, Any], Path | None], Iterator[Fault]]] = {
    "config.json": _model_faults,
    "adapter_config.json": _adapter_faults,
    "generation_config.json": _plain_faults,
    "tokenizer_config.json": _tokenizer_faults,
    "preprocessor_config.json": _processor_faults,
    "processor_config.json": _processor_faults,
    "video_preprocessor_config.json": _processor_faults,
}
