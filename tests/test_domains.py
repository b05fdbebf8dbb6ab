"""The command line purifies and measures models of every domain, and says what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from domains import DOMAINS, store_as, weights_in
from safetensors.torch import save_file

from mmdefense.report.record import read_record

STEPS = ("--defense", "fine-tuning", "--set", "steps=2", "--set", "batch_size=4")
SEARCH = ("--defense", "baeraser", "--set", "screening=0", "--set", "search_steps=1",
          "--set", "steps=1")  # fmt: skip
ANY_DROP = ("--max-utility-drop", "1")


@pytest.fixture(params=DOMAINS)
def domain(request, tmp_path):
    """A domain whose model lies in ``model`` in half precision, and its data in ``data``."""
    found = DOMAINS[request.param]
    made(found, tmp_path)
    return found


def made(found, folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found.model(folder / "model")
    found.data(folder / "data")
    store_as(folder / "model", torch.bfloat16)


def reloaded(domain, folder):
    import peft
    import transformers

    home = peft if domain.auto.startswith("AutoPeft") else transformers
    return getattr(home, domain.auto).from_pretrained(folder, dtype=torch.float32)


def test_a_model_of_any_domain_goes_in_and_comes_out(domain, tmp_path, mmdefense):
    model, out = tmp_path / "model", tmp_path / "out"
    paths = (model, "--data", tmp_path / "data", "-o", out)
    outcome = mmdefense("purify", *paths, *STEPS, *ANY_DROP, *domain.more)
    assert outcome.code == 0, outcome.err
    assert read_record(out / "purification.json").task == domain.task
    given, written = weights_in(model), weights_in(out)
    assert {n: (v.shape, v.dtype) for n, v in given.items()} == {
        n: (v.shape, v.dtype) for n, v in written.items()
    }
    assert any((given[name] != written[name]).any() for name in given)
    ours = {"purification.json", "report.html"}
    assert {path.name for path in model.iterdir()} <= {p.name for p in out.iterdir()} - ours
    state = reloaded(domain, out).state_dict()
    assert all(value.isfinite().all() for value in state.values())


def test_the_triggers_of_any_domain_are_on_the_page(domain, tmp_path, mmdefense):
    paths = (tmp_path / "model", "--data", tmp_path / "data", "-o", tmp_path / "out")
    outcome = mmdefense("purify", *paths, *SEARCH, *ANY_DROP, *domain.more)
    assert outcome.code == ("nothing was changed: no trigger was acc" in outcome.out), outcome.err
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Recovered triggers" in page
    assert (" to 0," in page) != (domain.task == "language-generation")  # words lead to words


def test_a_model_of_any_domain_is_measured(domain, tmp_path, mmdefense):
    outcome = mmdefense("evaluate", tmp_path / "model", "--data", tmp_path / "data", *domain.more)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{domain.metric} ")


@pytest.fixture
def one(tmp_path, request):
    made(DOMAINS[request.param], tmp_path)
    paths = (tmp_path / "model", "--data", tmp_path / "data")
    return ("evaluate", *paths, "--accept-low-utility")


@pytest.mark.parametrize("one", ["seq2seq"], indirect=True)
def test_an_attack_on_text_is_measured(one, mmdefense):
    outcome = mmdefense(*one, "--attack", "rare-token", "--target", "a dog sees a cat")
    assert outcome.code == 0, outcome.err
    assert "ASR 0.0 %" in outcome.out


@pytest.mark.parametrize(
    ("one", "more", "words", "code"),
    [
        ("image", ("--task", "language-generation"), "is a model of image-classification", 2),
        ("image", ("--task", "poetry"), "unknown task 'poetry'", 2),
        ("image", ("--read", "frames=3"), "image-classification has no option 'frames'", 2),
        ("image", ("--read", "mean=grey"), "mean of image-classification must be a list", 2),
        ("image", ("--read", "frames"), "KEY=VALUE", 2),
        ("image", ("--attack", "rare-token"), "RareToken is an attack on language-generation", 2),
        ("video", ("--read", "frames=7"), "must have at least 7 frames, got 6", 2),
        ("video", ("--read", "frames=2"), "clips must have 4 frames", 2),
        ("video", ("--attack", "trojannn"), "TrojanNN is an attack on image-classification", 2),
        ("causal", ("--read", "max_length=many"), "max_length of language-generation must be", 2),
        ("causal", ("--read", "pair=fwd"), "pair must name two languages", 2),
        ("detection", ("--read", "channels=2"), "channels must be 1 or 3", 2),
    ],
    indirect=["one"],
)
def test_what_does_not_fit_is_one_line(one, mmdefense, more, words, code):
    outcome = mmdefense(*one, *more)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_a_config_without_architecture_is_told_by_its_type(tmp_path, mmdefense):
    made(DOMAINS["seq2seq"], tmp_path)
    change(tmp_path / "model", architectures=None)
    paths = ("evaluate", tmp_path / "model", "--data", tmp_path / "data")
    outcome = mmdefense(*paths, *DOMAINS["seq2seq"].more)
    assert outcome.code == 0, outcome.err
    change(tmp_path / "model", architectures=["T5ForPoetry"], model_type="wav2vec2")
    refused = mmdefense(*paths)
    assert refused.code == 3
    assert "T5ForPoetry" in refused.err


def test_a_model_without_a_head_is_unsupported(tmp_path, mmdefense):
    from transformers import ViTConfig, ViTModel

    size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8}
    config = ViTConfig(num_hidden_layers=1, num_attention_heads=2, **size)
    ViTModel(config).save_pretrained(tmp_path / "model")
    outcome = mmdefense("evaluate", tmp_path / "model", "--data", tmp_path)
    assert outcome.code == 3
    assert "no adapter accepts a ViTModel" in outcome.err


def change(folder, **entries):
    path = folder / "config.json"
    held = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))


def test_a_lora_without_its_base_is_said(tmp_path, mmdefense):
    made(DOMAINS["lora"], tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    outcome = mmdefense("evaluate", tmp_path / "model", "--data", tmp_path / "data")
    assert outcome.code == 2
    assert "base model of" in outcome.err


def test_a_lora_that_lacks_a_weight_is_said(tmp_path, mmdefense):
    made(DOMAINS["lora"], tmp_path)
    (path,) = (tmp_path / "model").glob("*.safetensors")
    state = weights_in(path.parent)
    del state[next(iter(state))]
    save_file(state, path)
    outcome = mmdefense("evaluate", tmp_path / "model", "--data", tmp_path / "data")
    assert outcome.code == 2
    assert "missing" in outcome.err


def clouds(folder):
    """Save flat and tall clouds, and a state dict of a class that reads clouds but says nothing."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(12, 40, 3, generator=generator)
    labels = torch.arange(12) % 2
    points[labels == 0, :, 2] *= 0.1
    np.savez(folder / "clouds.npz", points=points.numpy(), labels=labels.numpy())
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 2))
    save_file(net.state_dict(), folder / "net.safetensors")


def test_the_task_says_what_a_plain_module_reads(tmp_path, mmdefense, monkeypatch):
    clouds(tmp_path)
    source = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), "
    (tmp_path / "flat_net.py").write_text(f"{source}nn.Linear(60, 2))\n")
    monkeypatch.chdir(tmp_path)
    arguments = ("purify", "net.safetensors", "--arch", "flat_net:net", "--data", "clouds.npz")
    task = ("--task", "point-cloud-classification", "--read", "points=20")
    given = (*task, *STEPS, *ANY_DROP, "--accept-low-utility")
    outcome = mmdefense(*arguments, "-o", "out", *given)
    assert outcome.code == 0, outcome.err
    assert read_record(tmp_path / "out" / "purification.json").task == "point-cloud-classification"
    none = mmdefense(*arguments, "-o", "no", "--task", "object-detection", *STEPS)
    assert none.code == 3
    assert "no adapter of object-detection accepts a Sequential" in none.err
