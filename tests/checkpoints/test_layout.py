"""A purified folder has the files, names, types and shards of the given one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from domains import causal_model, image_model, lora_model, seq2seq_model, text_data
from safetensors.torch import load_file, save_file

from mmdefense.checkpoints.huggingface import weight_files
from mmdefense.checkpoints.models import load_model, save_model
from mmdefense.cli.app import main

OFF = ("steps=0", "eta_f=0.0", "eta_r=0.0", "trace='none'")
LOGITS = """
import sys
sys.modules["mmdefense"] = None  # an import of it would raise
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
given, out = (AutoModelForCausalLM.from_pretrained(folder) for folder in sys.argv[1:])
assert given.dtype == out.dtype
batch = AutoTokenizer.from_pretrained(sys.argv[2])("the cat sees a dog", return_tensors="pt")
with torch.no_grad():
    assert torch.equal(given(**batch).logits, out(**batch).logits)
assert out.lm_head.weight.data_ptr() == out.transformer.wte.weight.data_ptr()
assert given.generation_config.to_dict() == out.generation_config.to_dict()
print(out.dtype)
"""


def sharded(folder, dtype=torch.float32):
    """Store a model in several files, as large ones are."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        causal_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="3KB")
    assert len(weight_files(folder)) > 1
    return folder


def layout(folder):
    """Return names, types and shapes of the stored tensors of each file."""
    return {
        path.name: {name: (value.dtype, value.shape) for name, value in load_file(path).items()}
        for path in folder.glob("*.safetensors")
    }


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_purification_of_no_strength_returns_the_same_model(dtype, tmp_path, monkeypatch):
    given, out = sharded(tmp_path / "given", dtype), tmp_path / "out"
    text_data(tmp_path / "data")
    settings = [word for setting in OFF for word in ("--set", setting)]
    paths = [str(given), "--data", str(tmp_path / "data"), "-o", str(out)]
    more = ["--read", "pair=fwd,bwd", "--accept-low-utility", "--defense", "fip", *settings]
    words = ["purify", *paths, *more]
    monkeypatch.setattr(sys, "argv", ["mmdefense", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1  # nothing was changed
    for path in given.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert layout(given) == layout(out)
    for path in given.iterdir():
        if path.suffix != ".safetensors" and path.name != "README.md":
            assert (out / path.name).read_bytes() == path.read_bytes()
    if dtype == torch.bfloat16:  # once, for a fresh process takes seconds
        run = [sys.executable, "-c", LOGITS, str(given), str(out)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(dtype)


@pytest.mark.parametrize("make", [image_model, causal_model, seq2seq_model, lora_model])
def test_weights_that_moved_lie_where_the_given_ones_lay(make, tmp_path):
    given, out = tmp_path / "given", tmp_path / "out"
    make(given)
    save_model(moved(load_model(given)), out, given)
    assert layout(given) == layout(out)
    (path,) = weight_files(given)
    before, after = load_file(path), load_file(out / path.name)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_shards_that_moved_are_read_again(tmp_path):
    given, out = sharded(tmp_path / "given", torch.bfloat16), tmp_path / "out"
    model = moved(load_model(given))
    save_model(model, out, given)
    assert layout(given) == layout(out)
    again = load_model(out).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value.to(torch.bfloat16).float())


def test_a_tied_weight_that_was_stored_twice_is_stored_twice(tmp_path):
    causal_model(tmp_path / "given")
    path = tmp_path / "given" / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_file(state, path, metadata={"format": "pt"})
    save_model(moved(load_model(tmp_path / "given")), tmp_path / "out", tmp_path / "given")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["transformer.wte.weight"])
    assert not torch.equal(written["lm_head.weight"], state["lm_head.weight"])


def test_names_without_the_prefix_of_the_body_stay(tmp_path):
    causal_model(tmp_path / "given")
    path = tmp_path / "given" / "model.safetensors"
    state = {n.removeprefix("transformer."): v for n, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    save_model(moved(load_model(tmp_path / "given")), tmp_path / "out", tmp_path / "given")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(not torch.equal(written[name], state[name]) for name in state)


def test_weights_of_another_library_are_not_copied(tmp_path):
    """They hold the model as it was before it was purified."""
    causal_model(tmp_path / "given")
    save_file(
        {"tok_embeddings.weight": torch.zeros(3)}, tmp_path / "given/consolidated.safetensors"
    )
    save_model(load_model(tmp_path / "given"), tmp_path / "out", tmp_path / "given")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_pickles_come_out_as_safetensors_of_their_types(tmp_path):
    sharded(tmp_path / "given", torch.bfloat16)
    state = {n: v for p in weight_files(tmp_path / "given") for n, v in load_file(p).items()}
    for path in (tmp_path / "given").glob("*.safetensors*"):
        path.unlink()
    torch.save(state, tmp_path / "given" / "pytorch_model.bin")
    (tmp_path / "given" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(state, "pytorch_model.bin")})
    )
    save_model(moved(load_model(tmp_path / "given")), tmp_path / "out", tmp_path / "given")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.dtype for name, value in written.items()} == dict.fromkeys(
        state, torch.bfloat16
    )
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_licence_and_templates_go_along(tmp_path):
    causal_model(tmp_path / "given")
    for name in ("LICENSE", "NOTICE.txt", "additional_chat_templates/tool_use.jinja"):
        path = tmp_path / "given" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    save_model(load_model(tmp_path / "given"), tmp_path / "out", tmp_path / "given")
    for name in ("LICENSE", "NOTICE.txt", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "out" / name).read_text() == name
