"""Whatever a pickle asks for, it is read as data: nothing is imported, called, or changed."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

from mmdefense.checkpoints.pickled import Array, Object, read_pickled
from mmdefense.errors import BadInputError, UnsupportedError

LEGACY = {"_use_new_zipfile_serialization": False}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def zipped(path, data: bytes, **entries: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/byteorder", entries.get("byteorder", b"little"))
        archive.writestr("a/data/0", entries.get("storage", bytes(16)))
    return path


@pytest.mark.parametrize("how", [{}, LEGACY, {"pickle_protocol": 4}])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_tensors_come_back_as_they_were(tmp_path, how, dtype):
    whole = torch.randn(4, 6).to(dtype)
    held = {"whole": whole, "part": whole[1:3, ::2], "turned": whole.T, "none": whole[:0]}
    torch.save(held, tmp_path / "a.pt", **how)
    read = read_pickled(tmp_path / "a.pt")[0]
    for name, value in held.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], value)
    assert read["whole"].untyped_storage().data_ptr() == read["part"].untyped_storage().data_ptr()


@pytest.mark.parametrize("how", [{}, LEGACY, {"pickle_protocol": 5}])
@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3), ">i4")), np.array("text")],
)
def test_arrays_and_numbers_of_numpy_are_read(tmp_path, how, array):
    held = {"array": array, "scalar": array.dtype.type(1), "many": collections.Counter("aab")}
    torch.save(held, tmp_path / "a.pt", **how)
    read, passed_by = read_pickled(tmp_path / "a.pt")
    assert isinstance(read["array"], Array)
    np.testing.assert_array_equal(read["array"].value(), array)
    assert (read["scalar"], read["many"]) == (held["scalar"], {"a": 2, "b": 1})
    assert passed_by == []


def test_an_array_of_objects_is_no_array(tmp_path):
    torch.save({"array": np.array([{}, None])}, tmp_path / "a.pt")
    assert read_pickled(tmp_path / "a.pt")[0]["array"].value() is None


def test_unknown_names_import_nothing(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = b"\x80\x02}" + text("x") + b"cevil\nThing\n" + text("y") + b"\x85Rs."
    read, passed_by = read_pickled(zipped(tmp_path / "a.pt", data))
    assert (read["x"].name, passed_by) == ("evil.Thing", ["evil.Thing"])
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "name", [b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cevil\nThing\n"]
)
def test_attributes_of_classes_and_functions_are_not_changed(tmp_path, name):
    import argparse

    before = dict(vars(argparse.Namespace)), torch._utils._rebuild_tensor_v2.__defaults__
    state = b"}" + text("__defaults__") + text("x") + b"s"
    data = b"\x80\x02" + name + b"N" + state + b"\x86b."  # BUILD with the state (None, {...})
    with contextlib.suppress(BadInputError):
        read_pickled(zipped(tmp_path / "a.pt", data))
    assert (dict(vars(argparse.Namespace)), torch._utils._rebuild_tensor_v2.__defaults__) == before


def tensor(offset=b"K\x00", size=b"K\x04\x85", stride=b"K\x01\x85") -> bytes:
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ"
        + offset + size + stride + b"\x89NtR."
    )  # fmt: skip


def test_a_tensor_lies_within_its_storage(tmp_path):
    assert read_pickled(zipped(tmp_path / "a.pt", tensor()))[0].shape == (4,)
    for lie in (
        {"size": b"K\x05\x85"},
        {"offset": b"K\x01"},
        {"stride": b"K\x02\x85"},
        {"offset": b"J\xff\xff\xff\xff"},
        {"size": b"J\xff\xff\xff\x7f\x85"},
    ):
        with pytest.raises(BadInputError, match="cannot be read"):
            read_pickled(zipped(tmp_path / "a.pt", tensor(**lie)))


def test_another_machines_order_of_bytes_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="big-endian"):
        read_pickled(zipped(tmp_path / "a.pt", tensor(), byteorder=b"big"))


def test_a_length_that_is_a_lie_takes_no_memory(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt", **LEGACY)
    data = (tmp_path / "a.pt").read_bytes()
    assert data.count(b"K\x04N") == 1
    (tmp_path / "a.pt").write_bytes(data.replace(b"K\x04N", b"J\xff\xff\xff\x7fN"))
    with pytest.raises(BadInputError, match="claims 8589934588 bytes"):
        read_pickled(tmp_path / "a.pt")


@pytest.mark.parametrize("save", [torch.save, pickle.dump])
def test_what_can_do_harm_is_named_and_refused(tmp_path, save):
    class Harm:
        def __reduce__(self):
            return eval, ("1",)

    buffer = io.BytesIO()
    save({"x": Harm()}, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(BadInputError, match=r"would run builtins\.eval"):
        read_pickled(tmp_path / "a.pt")


def test_an_object_says_what_it_is_and_does_nothing():
    thing = Object("evil.Thing")
    assert repr(thing) == "<evil.Thing, not read>"
    assert not callable(thing)
