from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import hostile
import numpy as np
import pytest
import torch
from hostile import FILES, FOLDERS, TEMPLATES
from safetensors.torch import save_file

from mmdefense.checkpoints.models import load_model
from mmdefense.checkpoints.seals import hash_all
from mmdefense.errors import BadInputError
from mmdefense.findings import reaches
from mmdefense.scanning.files import scan_files

ROWS = [*FILES, *FOLDERS, *TEMPLATES]


def names(rows):
    return [row.name for row in rows]


def said(findings):
    return "\n".join(f"{f.id} {f.subject} {f.value}" for f in findings if f.level != "low")


@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_a_malicious_file_is_named_and_not_run(tmp_path, row):
    sentinel, folder = tmp_path / "sentinel", tmp_path / "model"
    folder.mkdir()
    row.make(folder if row.file == "m" else folder / row.file, sentinel)
    findings = scan_files(folder)
    assert reaches(findings, "medium")
    for word in (*row.words, "" if row.file == "m" else row.file):
        assert word in said(findings)
    assert not sentinel.exists()
    assert hash_all(folder)


@pytest.mark.parametrize("row", FILES, ids=names(FILES))
def test_the_loader_refuses_a_malicious_file_in_one_line(place, mmdefense, row):
    sentinel, path = place.folder / "sentinel", place.folder / row.file
    row.make(path, sentinel)
    outcome = mmdefense(*place.purify(model=path))
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("mmdefense: ")
    assert outcome.err.count("\n") == 1
    assert place.files() == [row.file]  # no sentinel, no output


@pytest.mark.parametrize("row", FOLDERS, ids=names(FOLDERS))
def test_the_loader_refuses_a_malicious_folder_in_one_line(tmp_path, row):
    sentinel, folder = tmp_path / "sentinel", tmp_path / "model"
    folder.mkdir()
    row.make(folder, sentinel)
    with pytest.raises(BadInputError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "row", [row for row in FILES if row.name in {"os.system, protocol 4", "torch zip", "exec"}]
)
def test_the_payloads_are_real(tmp_path, row):
    sentinel, path = tmp_path / "sentinel", tmp_path / row.file
    row.make(path, sentinel)
    if zipfile.is_zipfile(path):
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert sentinel.exists()


@pytest.mark.parametrize("name", ["decoyed memo", "popped decoy", "unreadable for pickletools"])
def test_the_obfuscated_payloads_are_real(tmp_path, name):
    row = next(row for row in FILES if row.name == name)
    row.make(tmp_path / "a", tmp_path / "sentinel")
    pickle.loads((tmp_path / "a").read_bytes())
    assert (tmp_path / "sentinel").exists()


def state():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).state_dict()


def ordinary(folder):
    """Write what training and libraries really leave behind."""
    torch.save(state(), folder / "zip.pt")
    torch.save(state(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state(), "epoch": 3, "lr": 0.1}, folder / "wrapped.ckpt")
    torch.save({n: v.bfloat16() for n, v in state().items()}, folder / "half.bin")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    save_file(state(), folder / "a.safetensors", metadata={"format": "pt"})
    save_file({"empty": torch.zeros(0), "scalar": torch.tensor(1.0)}, folder / "b.safetensors")
    np.save(folder / "a.npy", np.zeros((3, 4)))
    np.savez(folder / "a.npz", a=np.zeros(3), b=np.arange(4))
    np.savez_compressed(folder / "b.npz", a=np.random.default_rng(0).random(5000))
    (folder / "plain.pkl").write_bytes(pickle.dumps(OrderedDict(a=[1, 2.0, "x", None, b"y"])))
    (folder / "words.txt").write_text("cat\nos\nsystem\n.\n(lp0\n")
    (folder / "README.md").write_text("# A model\n")
    words = json.dumps({f"w{i}": i for i in range(100)})
    (folder / "vocab.json.gz").write_bytes(gzip.compress(words.encode()))


def test_what_training_leaves_behind_gives_no_alarm(tmp_path):
    ordinary(tmp_path)
    assert said(scan_files(tmp_path)) == ""


@pytest.mark.parametrize("seed", range(3))
def test_a_large_legacy_file_of_random_storages_gives_no_alarm(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    many = {f"w{i}": torch.randn(64, 64, generator=generator) for i in range(300)}
    torch.save(many, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    torch.save(many, tmp_path / "b.pt")
    raw = {
        f"w{i}": torch.randint(0, 256, (4096,), generator=generator, dtype=torch.uint8)
        for i in range(300)
    }
    for value in raw.values():
        value[:2] = torch.tensor([0x80, 0x02])  # as a pickle starts
    raw["w0"][2:5] = torch.tensor([0x82, 0x07, 0x2E])  # and by chance: an extension, STOP
    torch.save(raw, tmp_path / "c.pt")
    assert said(scan_files(tmp_path)) == ""


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}{% generation %}<|{{ message['role'] }}|>{{ message.content | trim }}"
    "{% endgeneration %}{% endfor %}{% if tools is defined %}import os; {{ tools | tojson }}"
    "{% endif %}{%- set ns = namespace(found=false) %}{% break %}"
)


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_hugging_face_folders_give_no_alarm(tmp_path, shard):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size=shard)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    hostile.config(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    (tmp_path / "model.sig").write_text('{"mediaType": "a signature"}')
    assert said(scan_files(tmp_path)) == ""
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")


def test_links_into_the_hubs_cache_are_its_own_layout(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(state(), blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert said(scan_files(snapshot)) == ""
    assert list(hash_all(snapshot)) == ["model.safetensors"]


def test_what_is_not_looked_into_is_said(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(50))
    (tmp_path / "a.onnx").write_bytes(bytes(50))
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    (tmp_path / "a.bin").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(50))
    found = {f.subject: f.level for f in scan_files(tmp_path) if f.id == "file-not-looked-into"}
    assert found == {"a.gguf": "low", "a.onnx": "low", "a.h5": "medium", "a.bin": "medium"}


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    assert [f.id for f in scan_files(tmp_path)] == ["file-special"]


def test_hashes_are_those_of_sha256sum(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".a").write_bytes(b"x" * 5000)
    assert hash_all(tmp_path) == {"sub/.a": hashlib.sha256(b"x" * 5000).hexdigest()}
    assert hash_all(tmp_path / "sub" / ".a") == {".a": hashlib.sha256(b"x" * 5000).hexdigest()}


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(BadInputError, match="none found"):
        scan_files(tmp_path / "nowhere")
