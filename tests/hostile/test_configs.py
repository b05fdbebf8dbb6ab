"""Configuration files of models reach no loader, no module, no hub, and no more memory than sound.

What is refused here is refused before a library sees it, so that it holds in any version of them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mmdefense.checkpoints.models import load_model
from mmdefense.errors import BadInputError
from mmdefense.scanning.configs import parse_config
from mmdefense.scanning.files import scan_files
from mmdefense.scanning.yaml_values import MAX_DEPTH

BIG = 10**9


class Payload:
    """Makes the sentinel when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch sentinel",)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Return folders of sound models, by kind."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    from adapters import language_models
    from mmdefense_tasks.victims import vit_classifier

    root = tmp_path_factory.mktemp("sound")
    vit_classifier(3, 8, hidden=8, layers=1, heads=2).save_pretrained(root / "vit")
    config = TimmWrapperConfig(
        architecture="test_vit", model_args={"img_size": 32, "patch_size": 16}, num_labels=3
    )
    TimmWrapperForImageClassification(config).save_pretrained(root / "timm")
    lora = language_models.build("lora")
    lora.get_base_model().save_pretrained(root / "llama")
    language_models.tokenizer().save_pretrained(root / "llama")
    plain = language_models.build("llama")
    plain.save_pretrained(root / "llama")
    lora.peft_config["default"].base_model_name_or_path = str(root / "llama")
    lora.save_pretrained(root / "lora", save_embedding_layers=False)
    return root


@pytest.fixture
def at_home(monkeypatch, tmp_path):
    """Stand in an empty folder, with a module that makes the sentinel, and without a network."""
    home = tmp_path / "home"
    (home / "ad").mkdir(parents=True)
    (home / "ad" / "__init__.py").write_text("")
    (home / "ad" / "payload.py").write_text("open('sentinel', 'w').close()\n")
    (home / "payload.pth").write_bytes(pickle.dumps(Payload()))
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))

    def connect(*_):
        Path("connected").touch()
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield home
    assert not Path("sentinel").exists()
    assert not Path("connected").exists()
    assert "ad.payload" not in sys.modules


@dataclass(frozen=True)
class Row:
    """What is written into which file of which model, and what is said to it."""

    model: str
    said: dict | list | str | int
    words: str
    rule: str = "config-loader"
    file: str = "config.json"


def adapter(said, words, rule="config-loader"):
    return Row("lora", said, words, rule, "adapter_config.json")


def processor(said, words, rule="config-malformed"):
    return Row("vit", said, words, rule, "preprocessor_config.json")


ROWS = [
    Row("timm", {"model_args": {"checkpoint_path": "payload.pth"}}, "checkpoint_path"),
    Row("timm", {"model_args": {"pretrained_cfg": {"file": "payload.pth"}}}, "file"),
    Row("timm", {"model_args": {"pretrained_cfg": "x"}}, "source of weights"),
    Row("timm", {"model_args": {"pretrained_cfg_overlay": {"url": "https://a.b/c"}}}, "overlay"),
    Row("timm", {"model_args": {"pretrained": True}}, "pretrained"),
    Row("timm", {"model_args": {"cache_dir": "/tmp"}}, "cache_dir"),
    Row("timm", {"model_args": {"pretrained_custom_load": True}}, "custom_load"),
    Row("timm", {"model_args": {"norm_layer": "ad/payload"}}, "norm_layer", "config-malformed"),
    Row("timm", {"model_args": {"layers": [10_000] * 4}}, "40000 layers", "config-size"),
    Row("timm", {"pretrained_cfg": {"hf_hub_id": "evil/model"}}, "hf_hub_id"),
    Row("timm", {"pretrained_cfg": {"file": "payload.pth"}}, "file"),
    Row("timm", {"pretrained_cfg": {"url": "https://a.b/c.pth"}}, "url"),
    Row("timm", {"pretrained_cfg": {"custom_load": True}}, "custom_load"),
    Row("timm", {"architecture": "hf-hub:evil/model"}, "architecture"),
    Row("timm", {"architecture": "local-dir:/tmp/x"}, "architecture"),
    Row("vit", {"attn_implementation": "evil/kernel"}, "kernel"),
    Row("vit", {"transformers_weights": "other.safetensors"}, "other weights"),
    Row("vit", {"_attn_implementation": "evil/kernel"}, "kernel"),
    Row("vit", {"_attn_implementation_internal": "evil/kernel"}, "kernel"),
    Row("vit", {"experts_implementation": "evil/kernel"}, "kernel"),
    Row("vit", {"text_config": {"attn_implementation": "evil/kernel"}}, "text_config"),
    Row("vit", {"attn_implementation": {"": "evil/kernel"}}, "kernel"),
    Row("vit", {"torch_dtype": "load"}, "not a dtype"),
    Row("vit", {"dtype": "hub.load"}, "not a dtype"),
    Row("vit", {"backbone": "evil/model", "use_pretrained_backbone": True}, "backbone"),
    Row("vit", {"backbone_config": {"backbone_kwargs": {"checkpoint_path": "payload.pth"}}},
        "checkpoint_path"),
    Row("vit", {"vision_config": {"model_args": {"checkpoint_path": "payload.pth"}}},
        "checkpoint_path"),
    Row("vit", {"auto_map": {"AutoConfig": "evil/model--configuration.Config"}}, "auto_map",
        "config-remote-code"),
    Row("vit", {"num_hidden_layers": 10**6}, "1000000 layers", "config-size"),
    Row("vit", {"num_labels": BIG, "id2label": None}, "classes", "config-size"),
    Row("vit", {"hidden_size": 10**18}, "any real model", "config-size"),
    Row("vit", {"num_labels": "three"}, "num_labels", "config-malformed"),
    Row("vit", {"hidden_size": "eight"}, "hidden_size", "config-malformed"),
    Row("vit", {"id2label": [1, 2]}, "id2label", "config-malformed"),
    Row("vit", {"id2label": {"a": "b"}}, "id2label", "config-malformed"),
    Row("vit", {"architectures": "ViT"}, "architectures", "config-malformed"),
    Row("vit", {"model_type": ["vit"]}, "model_type", "config-malformed"),
    Row("vit", [1, 2], "a JSON object", "config-malformed"),
    Row("vit", 7, "a JSON object", "config-malformed"),
    Row("vit", '{"a":' * 5000 + "1" + "}" * 5000, "JSON", "config-unreadable"),
    Row("vit", '{"model_type": "\\ud800"}', "JSON", "config-malformed"),
    adapter({"megatron_config": {"a": 1}, "megatron_core": "ad.payload"}, "megatron_config"),
    adapter({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    adapter({"corda_config": {"cache_file": "payload.pth"}}, "corda_config"),
    adapter({"eva_config": {"rho": 2.0}}, "eva_config"),
    adapter({"arrow_config": {"x": 1}}, "arrow_config"),
    adapter({"layer_replication": [[0, 10**6]]}, "layer_replication"),
    adapter({"some_later_field": "ad.payload"}, "some_later_field"),
    adapter({"init_lora_weights": "pissa_niter_1000000000"}, "init_lora_weights"),
    adapter({"auto_mapping": {"base_model_class": "payload", "parent_library": "ad"}},
            "auto_mapping"),
    adapter({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "evil/model"}, "peft_type",
            "config-malformed"),
    adapter({"peft_type": ["LORA"]}, "peft_type", "config-malformed"),
    adapter({"target_modules": r"((\w+|\.)+)+\d!"}, "nested repetition", "config-size"),
    adapter({"target_modules": r"((\w)(|(\w)))+\W\d"}, "takes more than", "config-size"),
    adapter({"target_modules": "(("}, "not a regular expression", "config-size"),
    adapter({"target_modules": ["(a+)+$"]}, "target_modules", "config-malformed"),
    adapter({"layers_pattern": "(a+)+$", "layers_to_transform": [0]}, "layers_pattern",
            "config-malformed"),
    adapter({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern", "config-malformed"),
    adapter({"alpha_pattern": {"(a|a)+": 2}}, "alpha_pattern", "config-malformed"),
    adapter({"modules_to_save": ["(a+)+$"]}, "modules_to_save", "config-malformed"),
    adapter({"modules_to_save": 3}, "modules_to_save", "config-malformed"),
    adapter({"r": "many"}, "r must be", "config-malformed"),
    adapter({"base_model_name_or_path": ["a"]}, "base_model", "config-malformed"),
    adapter({"base_model_name_or_path": 7}, "base_model", "config-malformed"),
    adapter([1], "a JSON object", "config-malformed"),
    processor([1, 2], "a JSON object"),
    processor(7, "a JSON object"),
    processor({"image_mean": "half"}, "image_mean"),
    processor({"image_std": [0.5, "x", 0.5]}, "image_std"),
    processor({"size": {"height": "tall"}}, "size"),
    processor({"size": {"height": BIG, "width": BIG}}, "size"),
    processor({"do_resize": "yes"}, "do_resize"),
    processor({"rescale_factor": [1]}, "rescale_factor"),
    processor({"image_processor_type": 3}, "image_processor_type"),
    processor({"image_processor_type": "GPT2LMHeadModel"}, "image_processor_type"),
    processor({"crop_pct": 1e-9}, "crop_pct"),
    Row("timm", {"pretrained_cfg": {"input_size": [3, BIG, BIG]}}, "input_size",
        "config-malformed"),
    Row("llama", {"tokenizer_class": "AutoModel"}, "tokenizer_class", "config-malformed",
        "tokenizer_config.json"),
    Row("llama", {"vocab_file": "/etc/passwd"}, "outside the folder", file="tokenizer_config.json"),
    Row("llama", [1], "a JSON object", "config-malformed", "tokenizer_config.json"),
    Row("llama", {"eos_token": 3}, "eos_token", "config-malformed", "tokenizer_config.json"),
    Row("llama", {"extra_ids": BIG}, "extra_ids", "config-size", "tokenizer_config.json"),
    Row("llama", {"eos_token_id": "x"}, "eos_token_id", "config-malformed",
        "generation_config.json"),
]  # fmt: skip

# What only building the model shows: refused by the loader, without a finding on the file.
BUILT = [
    Row("vit", {"intermediate_size": 10**8}, "more than"),
    Row("llama", {"vocab_size": 10**9}, "more than"),
    Row("llama", {"num_attention_heads": 1, "head_dim": 10**8}, "more than"),
    Row("timm", {"model_args": {"img_size": 32, "patch_size": 16, "embed_dim": 10**8}}, "more"),
    Row("vit", {"hidden_act": "evil/kernel"}, "hidden_act"),
    adapter({"r": 10**8}, "rank"),
]


def written(sound, place, row):
    folder = place / row.model
    shutil.copytree(sound / row.model, folder)
    path = folder / row.file
    said = row.said
    if isinstance(said, dict):
        held = json.loads(path.read_text()) if path.is_file() else {}
        said = {**held, **said}
    path.write_text(said if isinstance(said, str) else json.dumps(said))
    return folder


@pytest.mark.parametrize("row", ROWS + BUILT, ids=lambda row: f"{row.model}-{row.said!r:.60}")
def test_a_model_is_refused_before_a_library_sees_it(row, sound, at_home, tmp_path, mmdefense):
    folder = written(sound, tmp_path, row)
    (at_home / "data").mkdir()
    outcome = mmdefense("purify", folder, "--data", "data", "-o", "out")
    assert outcome.code == 2, outcome
    assert row.words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.said!r:.60}")
def test_the_scan_names_it(row, sound, at_home, tmp_path):
    found = scan_files(written(sound, tmp_path, row))
    assert row.rule in {finding.id for finding in found}
    level = "medium" if row.rule in {"config-malformed", "config-unreadable"} else "high"
    assert level in {finding.level for finding in found if finding.id == row.rule}


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".json", lambda levels: '{"a":' * levels + "1" + "}" * levels),
        (".toml", lambda levels: "a = " + "[" * (levels - 1) + "1" + "]" * (levels - 1)),
        (".yaml", lambda levels: "[" * levels + "1" + "]" * levels),
    ],
)
def test_as_many_levels_are_read_on_any_version_of_python(suffix, text):
    """Parsers go further or less far by the version; what reads the values must not recurse."""
    assert parse_config(text(MAX_DEPTH).encode(), suffix)
    with pytest.raises(
        BadInputError, match=f"must be {suffix[1:].upper()}: .*more than {MAX_DEPTH} deep"
    ):
        parse_config(text(MAX_DEPTH + 1).encode(), suffix)


@pytest.mark.parametrize("kind", ["vit", "timm", "llama", "lora"])
def test_a_sound_folder_is_loaded_and_nothing_is_said(kind, sound, at_home):
    model = load_model(sound / kind)
    assert getattr(model, "name_or_path", str(sound / kind)).startswith(str(sound))
    assert {finding.id for finding in scan_files(sound / kind)} <= {"adapter-base"}


def test_an_adapter_whose_modules_are_a_pattern_is_the_same_as_by_name(sound, at_home, tmp_path):
    pattern = {"target_modules": r".*\.(q_proj|v_proj|up_proj)"}
    folder = written(sound, tmp_path, adapter(pattern, ""))
    before, after = (load_model(place).state_dict() for place in (sound / "lora", folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("command", ["scan", "purify"])
def test_the_base_of_an_adapter_is_not_fetched(command, sound, at_home, tmp_path, mmdefense):
    named = {"base_model_name_or_path": "evil/model"}
    folder = written(sound, tmp_path, adapter(named, ""))
    (at_home / "data").mkdir()
    if command == "purify":
        outcome = mmdefense("purify", folder, "--data", "data", "-o", "out")
        assert outcome.code == 2
        assert "hf download evil/model" in outcome.err
    else:
        found = {one.id: one for one in scan_files(folder)}
        assert "hf download evil/model" in str(found["adapter-base"].value)


def test_the_base_of_an_adapter_is_scanned_too(sound, at_home, tmp_path):
    base = written(sound, tmp_path, Row("llama", {"attn_implementation": "evil/kernel"}, ""))
    folder = written(sound, tmp_path, adapter({"base_model_name_or_path": str(base)}, ""))
    found = {one.subject: one.id for one in scan_files(folder)}
    assert found["base/config.json"] == "config-loader"


def test_a_quantised_model_is_not_supported(sound, at_home, tmp_path, mmdefense):
    said = {"quantization_config": {"quant_method": "gptq", "bits": 4, "dataset": "c4"}}
    folder = written(sound, tmp_path, Row("llama", said, ""))
    (at_home / "data").mkdir()
    outcome = mmdefense("purify", folder, "--data", "data", "-o", "out")
    assert outcome.code == 3
    assert "quantised" in outcome.err
    assert "config-loader" not in {finding.id for finding in scan_files(folder)}


def test_how_a_model_writes_is_kept_as_far_as_it_fetches_nothing(sound, at_home, tmp_path):
    said = {"penalty_alpha": 0.6, "top_k": 4, "custom_generate": "evil/model", "eos_token_id": 2}
    row = Row("llama", said, "", file="generation_config.json")
    model = load_model(written(sound, tmp_path, row))
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.penalty_alpha is None
    assert not hasattr(model.generation_config, "custom_generate")


def test_fields_that_a_class_does_not_declare_are_not_handed_on(sound, at_home, tmp_path):
    said = {"loader_of_a_later_version": "ad.payload", "extra_files": ["payload.pth"], "seen": 3}
    model = load_model(written(sound, tmp_path, Row("vit", said, "")))
    assert not hasattr(model.config, "loader_of_a_later_version")
    assert getattr(model.config, "extra_files", ()) in ((), [])
    assert model.config.seen == 3


@pytest.mark.parametrize("given", [None, {"in_chans": 3, "out_indices": [1, 2, 3, 4]}])
def test_a_detector_that_names_its_backbone_as_earlier_versions_did(given, at_home, tmp_path):
    from transformers import DetrConfig, DetrForObjectDetection, TimmBackboneConfig

    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    config = DetrConfig(
        backbone_config=TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4]),
        use_timm_backbone=False,
        encoder_layers=1,
        decoder_layers=1,
        num_labels=3,
        **sizes,
    )
    DetrForObjectDetection(config).save_pretrained(tmp_path / "detr")
    path = tmp_path / "detr" / "config.json"
    held = json.loads(path.read_text())
    del held["backbone_config"]
    held |= {"backbone": "resnet10t", "use_timm_backbone": True, "use_pretrained_backbone": True}
    path.write_text(json.dumps({**held, "backbone_kwargs": given}))
    assert isinstance(load_model(tmp_path / "detr"), DetrForObjectDetection)


def test_a_part_of_a_pipeline_that_is_a_function_of_the_system_is_high(tmp_path):
    parts = {"unet": ["os", "system"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    found = [(one.level, one.id) for one in scan_files(tmp_path)]
    assert found == [("high", "config-builds-objects")]
