"""Small files that ask for much: each ends in one line, within bounds."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch
from commands import Net, fitted_state
from floods import bounded
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the bounds are those of Linux")


def safetensors(header, data=b"0" * 4):
    content = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(content)) + content + data


def tensor(**changed):
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}


HEADERS = {
    "3 million axes": lambda: {"a": tensor(shape=[1] * 3_000_000)},
    "3 million large axes": lambda: {"a": tensor(shape=[2**60] * 3_000_000)},
    "300,000 bad tensors": lambda: {f"t{i}": tensor(dtype="X") for i in range(300_000)},
    "300,000 tensors": lambda: {
        f"t{i}": tensor(dtype="U8", data_offsets=[i, i + 1]) for i in range(300_000)
    },
    "101,000 tensors": lambda: {
        f"t{i}": tensor(dtype="U8", data_offsets=[i, i + 1]) for i in range(101_000)
    },
    "90,000 bad tensors": lambda: {f"t{i}": tensor(shape=[2]) for i in range(90_000)},
    "a type that is a list": lambda: {"a": tensor(dtype=["F32"])},
    "a type that is a map": lambda: {"a": tensor(dtype={"F32": 1})},
    "a size beyond all": lambda: {"a": tensor(shape=[10**4000, 10**4000])},
    "deep": lambda: b"[" * 2_000_000,
}


def in_zip(content):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")

    return write


def saved(make):
    return lambda path: torch.save(make(), path)


PICKLES = {
    "a bytearray of 6 GB": in_zip(b"\x80\x05\x96" + struct.pack("<Q", 6 * 10**9) + b"abc."),
    "bytes of 6 GB": in_zip(b"\x80\x04\x8e" + struct.pack("<Q", 6 * 10**9) + b"abc."),
    "a text of 6 GB": in_zip(b"\x80\x04\x8d" + struct.pack("<Q", 6 * 10**9) + b"abc."),
    "a number of 2 GB": in_zip(b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc."),
    "a memo of 4 billion": in_zip(b"\x80\x04}r\xff\xff\xff\xff."),
    "a memo of 100 million": in_zip(b"\x80\x04}r\xff\xff\xff\x05."),
    "1e11 values of one": saved(lambda: {"fc.weight": torch.zeros(1).expand(10**5, 10**6)}),
    "8 GB of one value": saved(lambda: {"fc.weight": torch.zeros(1).expand(2000, 10**6)}),
    "100 axes": saved(lambda: {"fc.weight": torch.zeros(1).view([1] * 100)}),
}


def assert_bounded(ended, *codes):
    """Check that the bounds of the readers themselves held, and not those of the child alone."""
    said = ended.out + ended.err
    assert ended.code in codes, said
    assert len(said) < 10_000
    assert "MMDEFENSE_READ" not in said
    assert "was killed" not in said
    assert "internal error" not in said


SLOW = {"300,000 bad tensors", "300,000 tensors", "90,000 bad tensors", "a type that is a map"}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(make, marks=[pytest.mark.slow] if name in SLOW else [], id=name)
        for name, make in HEADERS.items()
    ],
)
def test_a_header_that_floods(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header()))
    scanned = bounded(tmp_path, "scan", path)
    assert_bounded(scanned, 1)
    assert "safetensors-header" in "".join(scanned.out.split())
    refused = bounded(tmp_path, "evaluate", path, "--data", tmp_path, "--arch", "commands:Net")
    assert_bounded(refused, 2)
    assert refused.err.startswith(f"mmdefense: model {path} ")
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize("write", PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_floods(tmp_path, write):
    path = tmp_path / "model.bin"
    write(path)
    assert_bounded(bounded(tmp_path, "scan", path), 0, 1)
    assert_bounded(bounded(tmp_path, "scan", path, "--fail-on", "medium"), 1)
    refused = bounded(tmp_path, "evaluate", path, "--data", tmp_path, "--arch", "commands:Net")
    assert_bounded(refused, 2)
    assert refused.err.count("\n") == 1


ODD = {
    "meta": lambda: torch.empty(3, 3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "CSR": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "complex": lambda: torch.eye(3, dtype=torch.complex64),
    "float8": lambda: torch.eye(3).to(torch.float8_e4m3fn),
    "bool": lambda: torch.eye(3) > 0,
    "no axes": lambda: torch.tensor(1.0),
    "40 axes": lambda: torch.zeros([1] * 40),
    "no values": lambda: torch.zeros(2, 0, 3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_tensors_of_every_kind(place, mmdefense, make):
    path = place.folder / "odd.bin"
    torch.save({"fc.weight": make(), "b": torch.eye(2)}, path)
    assert mmdefense("scan", path).code == 0
    outcome = mmdefense("evaluate", path, "--data", place.data, "--arch", "commands:Net")
    assert outcome.code == 2
    assert outcome.err.startswith(("mmdefense: the weights of", "mmdefense: model file"))


@pytest.mark.parametrize("name", [1, None, ("a", 1), 1.5, "\udc80", "a\ud800.weight", "", "a\nb"])
def test_names_of_every_kind(place, mmdefense, name):
    path = place.folder / "odd.bin"
    state = {name: torch.eye(3), **dict(torch.load(place_model(place)))}
    torch.save(state, path)
    for form in ("text", "json", "sarif", "html"):
        assert mmdefense("scan", path, "--format", form).code == 0
    outcome = mmdefense("evaluate", path, "--data", place.data, "--arch", "commands:Net")
    assert outcome.code in {0, 2}
    assert "internal error" not in outcome.err


def place_model(place):
    path = place.folder / "fitted.bin"
    torch.save(fitted_state(), path)
    return path


class WithEmpty(Net):
    def __init__(self):
        super().__init__()
        self.empty = torch.nn.Parameter(torch.zeros(2, 0, 3))


def test_a_tensor_without_values_is_sound(place, mmdefense):
    save_file({"empty": torch.zeros(2, 0, 3), **fitted_state()}, place.model)
    outcome = mmdefense("scan", place.model)
    assert (outcome.code, outcome.err) == (0, "")
    outcome = mmdefense(*place.purify("--arch", "test_floods:WithEmpty"))
    assert (outcome.code, load_file(place.out / "model.safetensors")["empty"].shape) == (
        0,
        (2, 0, 3),
    )


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.txt", "model.safetensors"])
def test_a_pipe_in_a_folder(tmp_path, mmdefense, name):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    os.mkfifo(tmp_path / name)
    scanned = mmdefense("scan", tmp_path)
    assert scanned.code == 1
    assert "file-special" in scanned.out
    refused = mmdefense("evaluate", tmp_path, "--data", tmp_path)
    assert refused.code == 2
    assert name in refused.err
    assert "regular file" in refused.err or "a pipe" in refused.err


def test_findings_of_one_file_are_counted_beyond_the_first(tmp_path, mmdefense):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({f"t{i}": tensor(shape=[2]) for i in range(1000)}))
    found = json.loads(mmdefense("scan", path, "--format", "json").out)["findings"]
    assert len(found) == 101
    assert found[-1]["value"] == "900 more of high level"
    assert found[-1]["level"] == "high"


def test_a_long_text_in_a_finding_is_cut(tmp_path, mmdefense):
    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps(0)[:-2] + b"c" + b"os" * 10**5 + b"\nsystem\n.")
    outcome = mmdefense("scan", path, "--format", "json")
    assert len(outcome.out) < 20_000


def test_what_crashes_a_reader_is_a_finding_and_the_others_are_read(
    tmp_path, mmdefense, monkeypatch
):
    from mmdefense.scanning import files

    def crash(stream, subject, **more):
        if subject.startswith("b"):
            os.abort()
        return genuine(stream, subject, **more)

    genuine = files.scan_content
    monkeypatch.setattr(files, "scan_content", crash)
    for name in ("a.bin", "b.bin", "c.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n.")
    outcome = mmdefense("scan", tmp_path, "--format", "json")
    found = [(f["subject"], f["id"]) for f in json.loads(outcome.out)["findings"]]
    assert outcome.code == 1
    assert ("b.bin", "file-beyond-bounds") in found
    assert {("a.bin", "pickle-import"), ("c.bin", "pickle-import")} <= set(found)


@pytest.mark.parametrize(
    "setting",
    ["batch_size=1000000000000", "batch_size=1e12", "steps=1000000000000", "restarts=999999999999"],
)
def test_absurd_settings(place, mmdefense, setting):
    outcome = mmdefense(*place.purify("--set", setting))
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{setting.partition('=')[0]} " in outcome.err
    assert place.files() == []
