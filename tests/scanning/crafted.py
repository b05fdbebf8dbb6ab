"""Files that hide a call from a reader of less than every unpickler reads.

Each makes a folder, the sentinel, if it is run by the loader that stands with it.
"""

from __future__ import annotations

import functools
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import torch
from handed import (
    changed_class,
    given_back,
    long_places,
    of_another_size,
    to_a_method,
    to_a_partial,
)
from hostile import Calls, unicode_


@dataclass(frozen=True)
class Crafted:
    """A row of the table.

    Attributes:
        name: Of the row.
        file: What is written.
        make: Returns its bytes, given the sentinel.
        load: What runs it; none where no loader at hand does.
    """

    name: str
    file: str
    make: Callable[[Path], bytes]
    load: Callable[[Path], object] | None = None


def unpickle(path: Path) -> object:
    with path.open("rb") as file:
        return pickle.load(file)


def unpickle_all(path: Path) -> None:
    with path.open("rb") as file:
        while True:
            pickle.load(file)


def with_torch(path: Path) -> object:
    return torch.load(path, weights_only=False)


def with_numpy(path: Path) -> object:
    return np.load(path, allow_pickle=True)


def from_npz(path: Path) -> object:
    return with_numpy(path)["a"]


def with_references(path: Path) -> object:
    """Load with persistent ids that stand for what they hold, as some trainers do."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key):
            return {"make": os.mkdir}.get(key, key)

    return Unpickler(path.open("rb")).load()


def given(sentinel: Path) -> bytes:
    return b"(V" + str(sentinel).encode() + b"\nt"


def call(sentinel: Path) -> bytes:
    """Return a pickle of early opcodes that makes the sentinel."""
    return b"cposix\nmkdir\n" + given(sentinel) + b"R."


def remembered(sentinel: Path, between: bytes) -> bytes:
    """Keep the names in the memo, then something hard to read, then call what they name."""
    names = b"Vposix\np0\n0Vmkdir\np1\n0"
    return names + between + b"g0\ng1\n\x93" + given(sentinel) + b"R."


def torch_zip(data: bytes, name: str = "archive/data.pkl", **more: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for entry, content in more.items():
            archive.writestr(f"archive/{entry}", content)
    return buffer.getvalue()


def tar(data: bytes, name: str = "words.txt", form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def of_the_v7_form(data: bytes) -> bytes:
    """Return a tar without the mark of later forms."""
    whole = bytearray(tar(data))
    whole[257:512] = bytes(255)
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    return bytes(whole)


def legacy(place: int, sentinel: Path) -> bytes:
    """Return PyTorch's older format with the call in one of its pickles."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    return b"".join([*parts[:place], call(sentinel), *parts[place + 1 :]])


def array(descr: str, data: bytes, version: int = 1) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}\n".encode("latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def npz(descr: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", array(descr, data))
    return buffer.getvalue()


def dumped(value, **how) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer, **how)
    return buffer.getvalue()


def behind_an_array(sentinel: Path) -> bytes:
    """Return joblib's array, and behind it a call that breaks for what takes it for opcodes."""
    return dumped([np.frombuffer(b"\xff" * 64), Calls(os.mkdir, str(sentinel))])


def in_an_array(sentinel: Path) -> bytes:
    """Return opcodes where joblib sees the numbers of an array."""
    opcodes = call(sentinel).ljust(800)
    data = dumped([np.frombuffer(opcodes), 1])
    return data[: data.index(opcodes)][:-17].rstrip(b"\xff")[:-1] + opcodes + b"."


def past_its_frame(sentinel: Path) -> bytes:
    """Let bytes reach past their frame; what stands behind them is read in two ways."""
    inner = b"B" + struct.pack("<I", 40) + b"x" * 10
    return (
        b"\x80\x04\x95" + struct.pack("<Q", len(inner)) + inner + b"x" * 30 + b"0" + call(sentinel)
    )


def unfinished(sentinel: Path) -> bytes:
    """End in a line without an end: Python's unpickler takes all but its last byte."""
    return b"(V" + str(sentinel).encode() + b"\niposix\nmkdirX"


def second_contents(sentinel: Path) -> bytes:
    """Let a ZIP64 locator name a table of contents other than the one in front of it."""
    shown = torch_zip(pickle.dumps({}), words=call(sentinel))
    start = shown.rindex(b"PK\x05\x06")
    count, length, place = struct.unpack("<HII", shown[start + 10 : start + 20])
    record = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, place
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start - 99, 1)
    return shown[:start] + record + locator + shown[start:]


def old_joblib(data: bytes) -> bytes:
    return b"ZF" + hex(len(data)).encode().ljust(19) + zlib.compress(data)


def wrapped(inner: bytes) -> bytes:
    """Return a tensor as plain pickle writes it, with other bytes than PyTorch's."""
    data = b"B" + struct.pack("<I", len(inner)) + inner
    return b"\x80\x02ctorch.storage\n_load_from_bytes\n" + data + b"\x85R."


def named(module: str, name: str) -> bytes:
    return b"\x80\x04" + unicode_(module) + unicode_(name) + b"\x93" + unicode_("x") + b"\x85R."


def padded(sentinel: Path, length: int) -> bytes:
    return b"V" + b"a" * length + b"\n0" + call(sentinel)


def reads(between: bytes):
    return lambda s: remembered(s, between)


WORDS = "words of a text that any scanner would pass by\n" * 3
HARD = [
    *(b"I0x1\n0", b"I1_0\n0", b"I010\n0", b"I 7 \n0", b"L0x1fL\n0", b"L1_0L\n0", b"I0b1\n0"),
    *(b"Finf\n0", b"V\xe9\xff\n0", b"\x80\x02", b"C\x01a\x980", b"(1", b"N200"),
    *(b"N\x940", b"Nr\xff\xff\x00\x000", b"Nq\x05h\x0500", b"(((000", b"Np5_0\n0"),
    *(b"\x8a\x000", b"\x8b\x00\x00\x00\x000", b"\x8d" + bytes(8) + b"0", b"\x96" + bytes(8) + b"0"),
    *(b"\x8f(N\x900", b"(N\x910", b"(lNa0", b"(dNNs0", b"\x88\x8900", b"C\x000"),
]  # fmt: skip
DESCRS = [
    *("'\\x4f'", "'O,O'", "'i4,O'", "'2O'", "'object_'", "'object'", "'|O8'", "[('a', 'O')]"),
    *("'O4'", "[('a', '<i4'), ('b', [('c', '|O')])]", "('O', (1,))", "'O' ''", "'(1,)O'"),
]
TREES = [
    *(
        ("sympy.core.sympify", "sympify"),
        ("sympy", "sympify"),
        ("torch", "nn.functional.torch.load"),
    ),
    *(("torch.nn.functional", "torch.hub.load"), ("torch", "hub.load"), ("torch.nn", "functional")),
    *(("torch.nn.modules.module", "torch.load"), ("numpy", "load"), ("numpy", "testing.runstring")),
    *(("my_project.nets", "Net"), ("torch.utils.collect_env", "run"), ("builtins", "print")),
    *(("torch.nn.modules.linear", "Linear"), ("sklearn.utils", "Bunch"), ("timm", "create_model")),
    *(("transformers.training_args", "TrainingArguments"), ("operator", "methodcaller")),
    *(("builtins", "getattr"), ("operator", "getitem"), ("collections", "OrderedDict.fromkeys")),
]

CRAFTED = [
    Crafted("GGUF by a float", "a.bin", lambda s: b"GGUF12345" + b"0" + call(s), unpickle),
    Crafted("GGUF by a float, its name", "a.gguf",
            lambda s: b"GGUF12345" + b"0" + call(s), unpickle),
    Crafted("bz2 by a length", "a.pkl",
            lambda s: b"BZh9\0" + bytes(0x39685A) + b"0" + call(s), unpickle),
    Crafted("GGUF in a zip", "a.pt",
            lambda s: torch_zip(b"GGUF12345" + b"0" + call(s)), with_torch),
    Crafted("GGUF in a tar", "a.tar", lambda s: tar(b"GGUF12345" + b"0" + call(s))),
    Crafted("MZ by a number", "a.dat", lambda s: b"MZ\x900" + call(s), unpickle),
    Crafted("lzma by a list", "a.pkl", lambda s: b"]0" + call(s), unpickle),
    Crafted("behind 10,000 pickles", "a.pkl", lambda s: b"N." * 10_000 + call(s), unpickle_all),
    Crafted("behind 64 KiB of text", "a.dat", lambda s: padded(s, 1 << 16), unpickle),
    Crafted("behind 64 KiB in a zip", "a.zip",
            lambda s: torch_zip(b"N.", words=padded(s, 1 << 17))),
    Crafted("behind 64 KiB in a tar", "a.tar", lambda s: tar(padded(s, 1 << 17))),
    Crafted("another suffix", "words.txt", call, unpickle),
    Crafted("no suffix", "words", call, unpickle),
    Crafted("an exclamation mark", "a.pkl!words", call, unpickle),
    Crafted("an exclamation mark before it", "words!a.pkl", lambda s: b"N." + call(s)[:-1]),
    Crafted("an exclamation mark in a zip", "a.zip",
            lambda s: torch_zip(call(s), "archive/a.pkl!b.txt")),
    *(
        Crafted(f"pickle {place + 1} of the older format", "a.pth",
                functools.partial(legacy, place), with_torch)
        for place in range(5)
    ),
    *(
        Crafted(f"names from the memo, {between!r}", "a.bin", reads(between), unpickle)
        for between in HARD
    ),
    Crafted("a text in another encoding", "a.bin", reads(b"S'\xc3\xa9'\n0"), with_torch),
    Crafted("put and memoize", "a.bin",
            lambda s: b"\x80\x04Vposix\nq\x05\x30Vmkdir\n\x940Vcollections\n\x940h\x05h\x01\x93"
            + given(s) + b"R.", unpickle),
    Crafted("marks and duplicates", "a.bin",
            lambda s: b"Vposix\nVmkdir\n(Vre\nV_compile\n1\x932" + given(s) + b"R0N.", unpickle),
    Crafted("inst", "a.bin", lambda s: given(s)[:-1] + b"iposix\nmkdir\n.", unpickle),
    Crafted("obj", "a.bin", lambda s: b"(cposix\nmkdir\n" + given(s)[1:-1] + b"o.", unpickle),
    Crafted("an unfinished line", "a.joblib", unfinished, joblib.load),
    Crafted("a name that is no ASCII", "a.bin", lambda s: b"cmy\xc3\xa9\nrun\n" + given(s) + b"R."),
    Crafted("a call of a persistent id", "a.bin", lambda s: b"Vmake\nQ" + given(s) + b"R.",
            with_references),
    Crafted("a persistent id by line", "a.bin", lambda s: b"Pmake\n" + given(s) + b"R.",
            with_references),
    Crafted("an instance by a persistent id", "a.bin", lambda s: b"Vmake\nQ)\x81."),
    Crafted("keyword arguments", "a.bin", lambda s: b"\x80\x04cposix\nmkdir\n)}\x92."),
    Crafted("attributes of a class", "a.bin",
            lambda s: b"cargparse\nNamespace\n(N}Vx\nVy\nstb."),
    Crafted("attributes of a function", "a.bin",
            lambda s: b"ctorch._utils\n_rebuild_tensor_v2\n(N}V__defaults__\n)stb."),
    Crafted("a partial that is called", "a.bin",
            lambda s: b"cfunctools\npartial\n(cposix\nmkdir\ntR" + given(s) + b"R.", unpickle),
    Crafted("a call in a rebuilt tensor", "a.bin",
            lambda s: b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nmkdir\nctorch\nTensor\n"
            + given(s) + b"NtR.", unpickle),
    Crafted("a module in a rebuilt tensor", "a.bin",
            lambda s: b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch.nn.modules.linear\nLinear\n"
            b"ctorch\nTensor\n(K\x01K\x01tNtR."),
    Crafted("a call of what a call makes", "a.bin",
            lambda s: b"cbuiltins\nset\n)R" + given(s) + b"R."),
    Crafted("joblib, behind an array", "a.joblib", behind_an_array, joblib.load),
    Crafted("joblib, in an array", "a.joblib", in_an_array, unpickle),
    Crafted("joblib, an array of objects", "a.joblib",
            lambda s: dumped(np.array([Calls(os.mkdir, str(s)), None], object)), joblib.load),
    Crafted("joblib, packed", "a.joblib",
            lambda s: dumped([np.zeros(9), Calls(os.mkdir, str(s))], compress="xz"), joblib.load),
    Crafted("joblib of old", "a.joblib", lambda s: old_joblib(call(s)), joblib.load),
    Crafted("lzma alone", "a.joblib",
            lambda s: lzma.compress(call(s), lzma.FORMAT_ALONE), joblib.load),
    Crafted("lzma alone, another suffix", "a.lzma",
            lambda s: lzma.compress(call(s), lzma.FORMAT_ALONE)),
    Crafted("gzip in gzip", "a.pkl", lambda s: gzip.compress(gzip.compress(call(s)))),
    Crafted("zstd by name", "a.pkl.zst", lambda s: b"\x28\xb5\x2f\xfd" + bytes(40)),
    Crafted("lz4 by name", "a.joblib", lambda s: b"\x04\x22\x4d\x18" + bytes(40)),
    Crafted("past its frame", "a.pkl", past_its_frame, unpickle),
    Crafted("a frame in a frame", "a.pkl",
            lambda s: b"\x80\x04\x95" + struct.pack("<Q", 60) + b"\x95" + bytes(8) + call(s)),
    Crafted("tar of the V7 form", "a.tar", lambda s: of_the_v7_form(call(s))),
    Crafted("tar of the V7 form, its pickles", "a.pt",
            lambda s: of_the_v7_form(padded(s, 1 << 17))),
    Crafted("behind the end of a tar", "a.tar", lambda s: tar(b"x") + tar(call(s))),
    Crafted("a tar whose name is a pickle", "a.pkl",
            lambda s: tar(b"", call(s).decode()), unpickle),
    Crafted("a second table of contents", "a.pt", second_contents),
    Crafted("a pickle's name in capitals", "a.pt",
            lambda s: torch_zip(b"N.", **{"DATA.PKL": call(s)})),
    Crafted("bytes behind a zip", "a.pt", lambda s: torch_zip(b"N.") + b"x" * 30),
    Crafted("a name with an end in it", "a.zip",
            lambda s: torch_zip(b"N.", "archive/a-b.pkl").replace(b"a-b", b"a\0b")),
    *(Crafted(f"array of {descr}", "a.npy", lambda s, d=descr: array(d, call(s)))
      for descr in DESCRS),
    *(Crafted(f"npz of {descr}", "a.npz", lambda s, d=descr: npz(d, call(s))) for descr in DESCRS),
    Crafted("array of the third form", "a.npy", lambda s: array("'O'", call(s), 3), with_numpy),
    Crafted("array of a header that is none", "a.npy", lambda s: array("O", call(s))),
    Crafted("array without its mark", "a.npy", call, with_numpy),
    Crafted("array without its mark, in a zip", "a.npz", lambda s: torch_zip(call(s), "a.npy")),
    Crafted("tensor of other bytes", "a.pkl", lambda s: wrapped(legacy(3, s)), unpickle),
    Crafted("tensor of a zip", "a.pkl", lambda s: wrapped(torch_zip(call(s))), unpickle),
    *(Crafted(f"{module}, {name}", "a.pkl", lambda s, n=(module, name): named(*n))
      for module, name in TREES),
    *(Crafted(f"handed {make.__name__}", "a.pkl", lambda s, m=make: m(legacy(3, s)), unpickle)
      for make in (to_a_partial, to_a_method, given_back)),
    Crafted("places of many digits", "a.pkl", long_places, unpickle),
    *(Crafted(f"joblib, another size by its {how}", "a.joblib",
              lambda s, h=how: of_another_size(h, call(s)), joblib.load)
      for how in ("rebuilt", "type", "key", "partial")),
    Crafted("a class given back as a number", "a.pkl", lambda s: changed_class()),
    Crafted("no pickle to its end", "a.pkl", lambda s: pickle.dumps(list(range(99)))[:-1]),
    Crafted("a pickle of a later protocol", "a.bin", lambda s: b"\x80\x07N."),
    Crafted("words under a pickle's name", "a.pt", lambda s: WORDS.encode()),
]  # fmt: skip
