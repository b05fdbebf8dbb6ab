"""Untrusted models are loaded without running them, and saved as they came."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdefense.checkpoints import models
from mmdefense.checkpoints.folders import new_folder, reserved
from mmdefense.checkpoints.models import load_model, save_model
from mmdefense.checkpoints.weights import hash_file, hash_weights
from mmdefense.errors import BadInputError

ARCH = "nets:Net(classes=3)"


@pytest.fixture
def net():
    from nets import Net

    torch.manual_seed(0)
    return Net(3).eval()


@pytest.fixture
def vit_folder(tmp_path):
    from mmdefense_tasks.victims import vit_classifier

    folder = tmp_path / "vit"
    model = vit_classifier(3, 8, hidden=8, layers=1, heads=2)
    models.write_model(model, _made(folder))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    return folder


def _made(folder):
    folder.mkdir()
    return folder


def refused(where, **options):
    with pytest.raises(BadInputError) as caught:
        load_model(where, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"net": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    ],
)
def test_a_state_dict_is_found_in_its_wrappers(tmp_path, net, wrap):
    torch.save(wrap(net.state_dict()), tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", arch=ARCH)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), net(images))
    assert not loaded.training


def test_safetensors_are_loaded(tmp_path, net):
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    assert hash_weights(load_model(tmp_path / "a.safetensors", arch=ARCH)) == hash_weights(net)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v, 2))])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, save):
    mark = tmp_path / "pwned"
    save({"conv.weight": Bomb(mark)}, tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt", arch=ARCH)
    assert "would run" in message
    assert "mkdir" in message
    assert "weights_only" not in message  # PyTorch's own message tells how to run it
    assert not mark.exists()


def test_a_pickled_model_in_a_hugging_face_folder_is_refused(tmp_path, vit_folder):
    mark = tmp_path / "pwned"
    (vit_folder / "model.safetensors").unlink()
    torch.save({"classifier.weight": Bomb(mark)}, vit_folder / "pytorch_model.bin")
    refused(vit_folder)
    assert not mark.exists()


def test_code_in_a_hugging_face_folder_is_not_run(tmp_path, vit_folder):
    mark = tmp_path / "pwned"
    config = json.loads((vit_folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForImageClassification": "evil.Model",
        },
    }
    (vit_folder / "config.json").write_text(json.dumps(config))
    (vit_folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    refused(vit_folder)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a model at all" * 20])
def test_a_damaged_file_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert str(path) in refused(path, arch=ARCH)


def test_a_truncated_file_is_refused(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refused(tmp_path / "a.pt", arch=ARCH)


def test_what_is_missing_is_said(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.pt", arch=ARCH)
    assert "none found" in refused(tmp_path / "none")
    assert "config.json" in refused(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    assert "--arch" in refused(tmp_path / "a.pt")


def test_something_else_than_a_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    assert "must hold a state dict" in refused(tmp_path / "a.pt", arch=ARCH)


def test_keys_that_do_not_match_are_named(tmp_path, net):
    state = net.state_dict()
    state["extra.weight"] = state.pop("conv.weight")
    state["head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "a.safetensors")
    message = refused(tmp_path / "a.safetensors", arch=ARCH)
    assert "missing: conv.weight" in message
    assert "unexpected: extra.weight" in message
    assert "head.bias is (7,) but must be (3,)" in message


def test_many_keys_are_cut_short(tmp_path):
    save_file({f"k{i}": torch.zeros(1) for i in range(9)}, tmp_path / "a.safetensors")
    assert "k0, k1, k2 and 6 more" in refused(tmp_path / "a.safetensors", arch=ARCH)


def test_hugging_face_keys_that_do_not_match_are_named(vit_folder):
    state = load_file(vit_folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, vit_folder / "model.safetensors", metadata={"format": "pt"})
    assert "missing: classifier.weight" in refused(vit_folder)


def test_hugging_face_shapes_that_do_not_match_are_named(vit_folder):
    config = json.loads((vit_folder / "config.json").read_text())
    config["id2label"] = {str(label): f"class {label}" for label in range(5)}
    (vit_folder / "config.json").write_text(json.dumps(config))
    assert "classifier.weight is (3, 8) but must be (5, 8)" in refused(vit_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, net, value):
    state = net.state_dict()
    state["bn.running_var"][1] = value
    torch.save(state, tmp_path / "a.pt")
    assert "'bn.running_var'" in refused(tmp_path / "a.pt", arch=ARCH)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("nets", "module:callable"),
        ("nets:Net(classes=__import__('os'))", "module:callable"),
        ("nets:Net; 3", "module:callable"),
        ("no_such_module:Net", "no_such_module"),
        ("nets:NoSuch", "NoSuch"),
        ("nets:Net(colour=3)", "colour"),
        ("nets:not_a_module", "must return a torch.nn.Module"),
    ],
)
def test_an_arch_that_cannot_be_built_is_refused(tmp_path, net, arch, message):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert message in refused(tmp_path / "a.pt", arch=arch)


def test_a_class_in_the_current_directory_is_found(tmp_path, net, monkeypatch):
    (tmp_path / "my_own_net.py").write_text("from nets import Net as Mine\n")
    torch.save(net.state_dict(), tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    assert hash_weights(load_model("a.pt", arch="my_own_net:Mine(3)")) == hash_weights(net)


def test_the_import_path_is_as_before(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    before = list(sys.path)
    load_model(tmp_path / "a.pt", arch=ARCH)
    assert sys.path == before


def test_output_has_the_keys_shapes_and_dtypes_of_the_source(tmp_path, net):
    state = {f"module.{k}": v.half() if v.is_floating_point() else v
             for k, v in net.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    model = load_model(tmp_path / "a.pt", arch=ARCH)
    assert model.conv.weight.dtype == torch.float32
    save_model(model, tmp_path / "out", tmp_path / "a.pt")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert hash_weights(written) == hash_weights(state)


def test_shared_tensors_survive_under_every_key(tmp_path):
    from nets import Tied

    model = Tied()
    save_model(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(model.state_dict())
    del written["second.weight"]  # as the library itself stores it, once
    save_file(written, tmp_path / "once.safetensors")
    again = load_model(tmp_path / "once.safetensors", arch="nets:Tied")
    assert hash_weights(again) == hash_weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hugging_face_model_comes_back_as_a_drop_in(tmp_path, vit_folder, dtype):
    from transformers import AutoModelForImageClassification

    path = vit_folder / "model.safetensors"
    original = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(original, path, metadata={"format": "pt"})
    model = load_model(vit_folder)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    with torch.no_grad():
        model.classifier.bias.fill_(2)
    save_model(model, tmp_path / "out", vit_folder)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (v.shape, v.dtype) for n, v in written.items()} == {
        n: (v.shape, v.dtype) for n, v in original.items()
    }
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert hash_weights(again) == hash_weights(model)
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (vit_folder / name).read_bytes()


def test_hashes_tell_weights_apart(tmp_path, net):
    before = hash_weights(net)
    save_model(net, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    assert hash_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with torch.no_grad():
        net.head.bias[0] += 1e-6
    assert hash_weights(net) != before


RECORD = json.dumps({"predicateType": "urn:mmdefense:purification:1"})


def write_output(folder, text="first", force=False):
    with new_folder(folder, force=force) as temporary:
        (temporary / "model.safetensors").write_text(text)
        (temporary / "purification.json").write_text(RECORD)


def test_a_folder_that_exists_is_refused_without_force(tmp_path, net):
    out = tmp_path / "out"
    write_output(out)
    with pytest.raises(BadInputError, match="--force"):
        write_output(out, "second")
    with pytest.raises(BadInputError, match="--force"):
        save_model(net, out)
    assert (out / "model.safetensors").read_text() == "first"
    write_output(out, "second", force=True)
    assert (out / "model.safetensors").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", "x"),
        ("model.safetensors", "the weights of somebody"),
        ("purification.json", "{}"),
        ("purification.json", "[" * 100_000),
        ("comparison.json", '{"kind": "of flowers"}'),
    ],
)
def test_force_replaces_nothing_but_an_earlier_output(tmp_path, name, content):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_text(content)
    with pytest.raises(BadInputError, match="no record of an earlier output"):
        write_output(tmp_path / "home", force=True)
    assert (tmp_path / "home" / name).read_text() == content


def test_a_link_is_not_replaced(tmp_path):
    write_output(tmp_path / "true")
    (tmp_path / "out").symlink_to("true")
    with pytest.raises(BadInputError, match="it is a symlink"):
        write_output(tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()


def test_of_two_that_make_one_folder_the_second_is_refused(tmp_path):
    out = tmp_path / "above" / "out"
    with new_folder(out) as folder:
        (folder / "a").touch()
        with pytest.raises(BadInputError, match="another run is writing"):
            write_output(out, force=True)
    assert [p.name for p in out.iterdir()] == ["a"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_what_comes_into_the_place_meanwhile_is_not_replaced(tmp_path):
    def write():
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "diary.txt").touch()

    with pytest.raises(BadInputError, match="already exists"):
        write()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "diary.txt"]


def test_a_full_disk_leaves_the_earlier_output_and_nothing_else(tmp_path, net, monkeypatch):
    out = tmp_path / "out"
    write_output(out)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write():
        with new_folder(out, force=True) as folder:
            (folder / "half").touch()
            full()

    with pytest.raises(BadInputError, match="No space left on device") as caught:
        write()
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadInputError, match="No space left on device"):
        save_model(net, tmp_path / "other")
    assert (out / "model.safetensors").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_under_the_library_is_one_line_too(tmp_path, vit_folder, monkeypatch):
    from safetensors import SafetensorError

    model = load_model(vit_folder)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(BadInputError, match="No space left on device"):
        save_model(model, tmp_path / "out", vit_folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_folder_never_appears(tmp_path, error):
    def write():
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from mmdefense.checkpoints.folders import new_folder
with new_folder(sys.argv[1], force=True) as folder:
    (folder / "model.safetensors").write_text("half")
    if sys.argv[2] == "old":  # as if the kill came between the two renames
        Path(sys.argv[1]).rename(folder.with_name(folder.name.replace("-new-", "-old-")))
    os.kill(os.getpid(), 9)
"""


def killed_while_it_writes(out, kind="new"):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(out), kind], check=False)
    assert ended.returncode == -9


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_kill_left_behind_goes_with_the_next_run_of_the_same_output(tmp_path):
    out = tmp_path / "out"
    killed_while_it_writes(out)
    killed_while_it_writes(tmp_path / "out2")
    others = [".out.12345678", ".out.mmdefense-new-1234567", ".xout.mmdefense-new-12345678"]
    for name in others:
        (tmp_path / name).mkdir()
    assert len(hidden(tmp_path)) == 7
    with new_folder(out) as folder:
        assert len([name for name in hidden(tmp_path) if name.startswith(".out.mm")]) == 3
        (folder / "a").touch()
    left = hidden(tmp_path)
    assert set(others) < set(left)
    # What is left is another output's.
    assert [name[:7] for name in set(left) - set(others)] == [".out2.m", ".out2.m"]


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        other = [sys.executable, "-c", KILLED, str(tmp_path / "out"), "new"]
        ended = subprocess.run(other, check=False, capture_output=True, text=True)
        assert "another run is writing" in ended.stderr
        assert folder.is_dir()


def test_a_link_with_such_a_name_is_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / ".out.mmdefense-new-12345678").symlink_to(tmp_path / "kept")
    with reserved(tmp_path / "out"):
        assert (tmp_path / "kept").is_dir()


def test_an_output_that_had_stepped_aside_for_a_killed_run_comes_back(tmp_path):
    out = tmp_path / "out"
    write_output(out)
    killed_while_it_writes(out, "old")
    assert not out.exists()
    with reserved(out, force=True):
        pass
    assert (out / "model.safetensors").read_text() == "first"
    assert hidden(tmp_path) == []
