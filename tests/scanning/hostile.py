"""Malicious model files, each of which would make a sentinel file if it were run."""

from __future__ import annotations

import base64
import gzip
import importlib
import io
import json
import os
import pickle
import runpy
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import torch


@dataclass(frozen=True)
class Hostile:
    """A row of the table.

    Attributes:
        name: Of the row.
        file: What is written.
        make: Writes it, given where and the sentinel.
        words: What some finding on it says.
    """

    name: str
    file: str
    make: Callable[[Path, Path], object]
    words: tuple[str, ...]


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(sentinel: Path) -> str:
    return f"touch {sentinel}"


def code(sentinel: Path) -> str:
    return f"open({str(sentinel)!r}, 'w')"


def plain(make, protocol=2):
    return lambda path, sentinel: path.write_bytes(pickle.dumps(make(sentinel), protocol))


def raw(make):
    return lambda path, sentinel: path.write_bytes(make(sentinel))


def unicode_(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def call(sentinel: Path) -> bytes:
    """Return opcodes that call what lies on the stack with the command."""
    return unicode_(touch(sentinel)) + b"\x85R"


def decoyed_memo(sentinel: Path) -> bytes:
    """Mix PUT and MEMOIZE so that a naive memo sees harmless names (picklescan issue 14)."""
    return (
        b"\x80\x04" + unicode_("os") + b"q\x00" + unicode_("system") + b"q\x01"
        + unicode_("torch._utils") + b"\x94" + unicode_("_rebuild_tensor_v2") + b"\x94"
        + b"h\x00h\x01\x93" + call(sentinel) + b"."
    )  # fmt: skip


def popped_decoy(sentinel: Path) -> bytes:
    """Push the harmless names last and pop them again before the import."""
    return (
        b"\x80\x04" + unicode_("os") + unicode_("system")
        + unicode_("collections") + unicode_("OrderedDict") + b"00"
        + b"\x93" + call(sentinel) + b"."
    )  # fmt: skip


def attribute_walk(sentinel: Path) -> bytes:
    """Reach os through a module of PyTorch."""
    names = unicode_("torch") + unicode_("serialization.os.system")
    return b"\x80\x04" + names + b"\x93" + call(sentinel) + b"."


def unreadable_integer(sentinel: Path) -> bytes:
    """Hide behind an integer that the C unpickler reads and pickletools does not."""
    return b"I0x1\n0cos\nsystem\n" + call(sentinel) + b"."


def legacy(path: Path, sentinel: Path) -> None:
    state = {"conv.weight": torch.zeros(3), "x": Calls(os.system, touch(sentinel))}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def torch_zip(payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"conv.weight": torch.zeros(3), "x": payload}, buffer)
    return buffer.getvalue()


def zipped(path: Path, entries: dict[str, bytes], method=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def wrong_checksum(path: Path, sentinel: Path) -> None:
    """Break the checksum of the pickle: a strict reader stops there, PyTorch's does not."""
    data = bytearray(torch_zip(Calls(os.system, touch(sentinel))))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        checksum = struct.pack("<I", archive.getinfo("archive/data.pkl").CRC)
    path.write_bytes(bytes(data).replace(checksum, b"\x01\x02\x03\x04"))


def encrypted_flag(path: Path, sentinel: Path) -> None:
    data = torch_zip(Calls(os.system, touch(sentinel)))
    path.write_bytes(
        data.replace(b"PK\x01\x02\x00\x00\x00\x00\x08", b"PK\x01\x02\x00\x00\x00\x00\x09")
    )


def other_local_name(path: Path, sentinel: Path) -> None:
    data = torch_zip(Calls(os.system, touch(sentinel)))
    path.write_bytes(data.replace(b"archive/data.pkl", b"archive/data.txt", 1))


def zip_in_zip(path: Path, sentinel: Path) -> None:
    inner = io.BytesIO()
    zipped(inner, {"hidden.bin": pickle.dumps(Calls(os.system, touch(sentinel)))})
    zipped(path, {"archive/data.pkl": pickle.dumps({}), "archive/extra.zip": inner.getvalue()})


def appended_zip(path: Path, sentinel: Path) -> None:
    """Put a harmless zip behind a pickle: one reader sees the one, another the other."""
    inner = io.BytesIO()
    zipped(inner, {"archive/data.pkl": pickle.dumps({})})
    path.write_bytes(pickle.dumps(Calls(os.system, touch(sentinel))) + inner.getvalue())


def zip_bomb(path: Path, _) -> None:
    zipped(path, {"archive/data.pkl": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)


def overlapping_entries(path: Path, _) -> None:
    """Let two names of the contents share the bytes of one entry."""
    data = torch_zip(1)
    start = data.index(b"PK\x01\x02")
    entry = data[start : data.index(b"PK\x01\x02", start + 1)]
    twin = entry.replace(b"data.pkl", b"more.pkl")
    end = data.rindex(b"PK\x05\x06")
    tail = bytearray(data[end : end + 22])
    count, size = struct.unpack("<HI", tail[10:16])
    tail[8:16] = struct.pack("<HHI", count + 1, count + 1, size + len(twin))
    contents = data[start : start + size]
    path.write_bytes(data[:start] + twin + contents + bytes(tail))


def gzip_bomb(path: Path, _) -> None:
    path.write_bytes(gzip.compress(bytes(1 << 26)))


def tarred(path: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for info, data in entries:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def entry(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def safetensors(header, data: bytes = bytes(16), length: int | None = None):
    """Return the bytes of a file with this header; its length is claimed as ``length``."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def object_array(path: Path, sentinel: Path) -> None:
    holder = np.empty(1, object)
    holder[0] = Calls(os.system, touch(sentinel))
    np.save(path, holder, allow_pickle=True)


def nested(sentinel: Path) -> dict:
    return {"blob": pickle.dumps(Calls(os.system, touch(sentinel)))}


def encoded(sentinel: Path) -> dict:
    return {"blob": base64.b64encode(pickle.dumps(Calls(os.system, touch(sentinel)))).decode()}


def in_hex(sentinel: Path) -> dict:
    return {"blob": pickle.dumps(Calls(os.system, touch(sentinel))).hex()}


def deep(sentinel: Path) -> bytes:
    data = pickle.dumps(Calls(os.system, touch(sentinel)))
    for _ in range(5):
        data = pickle.dumps(data)
    return data


def after_a_harmless_one(sentinel: Path) -> bytes:
    return pickle.dumps({"a": 1}) + pickle.dumps(Calls(os.system, touch(sentinel)))


FILES = [
    *(
        Hostile(f"os.system, protocol {n}", "a.bin", plain(lambda s: Calls(os.system, touch(s)), n),
                ("posix.system",))
        for n in (0, 1, 2, 4, 5)
    ),
    Hostile("eval", "a.pt", plain(lambda s: Calls(eval, code(s))), ("builtins.eval",)),
    Hostile("exec", "a.pt", plain(lambda s: {"w": [Calls(exec, code(s))]}, 4), ("builtins.exec",)),
    Hostile("import", "a.pth", plain(lambda s: Calls(__import__, "this")), ("__import__",)),
    Hostile("getattr", "a.pth",
            plain(lambda s: Calls(getattr, Calls(importlib.import_module, "os"), "system")),
            ("importlib.import_module",)),
    Hostile("runpy", "a.ckpt", plain(lambda s: Calls(runpy.run_path, str(s))), ("runpy.run_path",)),
    Hostile("subprocess", "a.bin", plain(lambda s: Calls(subprocess.Popen, ["touch", str(s)])),
            ("subprocess.Popen",)),
    Hostile("torch.load gadget", "a.pt", plain(lambda s: Calls(torch.load, str(s))),
            ("torch.serialization.load",)),
    Hostile("torch.hub gadget", "a.pt", plain(lambda s: Calls(torch.hub.load, "x/y", "z")),
            ("torch.hub.load",)),
    Hostile("reduce in reduce", "a.pt",
            plain(lambda s: Calls(print, Calls(print, Calls(os.system, touch(s))))),
            ("posix.system",)),
    Hostile("decoyed memo", "a.bin", raw(decoyed_memo), ("os.system",)),
    Hostile("popped decoy", "a.bin", raw(popped_decoy), ("os.system",)),
    Hostile("attribute walk", "a.bin", raw(attribute_walk), ("torch.serialization.os.system",)),
    Hostile("name made while unpickling", "a.bin", raw(lambda s: b"\x80\x04cbuiltins\nstr\n"
            + unicode_("os") + b"\x85R" + unicode_("system") + b"\x93" + call(s) + b"."),
            ("built while unpickling",)),
    Hostile("module of another library", "a.bin",
            raw(lambda s: b"cfile_store.gadgets\nrun\n" + call(s) + b"."),
            ("file_store.gadgets.run",)),
    Hostile("extension registry", "a.bin", raw(lambda s: b"\x80\x02\x82\x01" + call(s) + b"."),
            ("extension registry",)),
    Hostile("inst opcode", "a.bin",
            raw(lambda s: b"(S'" + touch(s).encode() + b"'\nios\nsystem\n."), ("os.system",)),
    Hostile("Python 2 names", "a.bin", raw(lambda s: b"c__builtin__\neval\n(S'1'\ntR."),
            ("builtins.eval",)),
    Hostile("broken behind the payload", "a.bin",
            raw(lambda s: b"cos\nsystem\n" + call(s) + b"\xff\xff"), ("os.system",)),
    Hostile("unreadable for pickletools", "a.bin", raw(unreadable_integer),
            ("os.system",)),
    Hostile("second pickle", "a.pkl", raw(after_a_harmless_one), ("posix.system",)),
    Hostile("nested pickle", "a.bin", plain(nested), ("nested pickle", "posix.system")),
    Hostile("base64 pickle", "a.bin", plain(encoded), ("nested pickle", "posix.system")),
    Hostile("hex pickle", "a.bin", plain(in_hex), ("nested pickle", "posix.system")),
    Hostile("torch zip", "a.pt",
            raw(lambda s: torch_zip(Calls(os.system, touch(s)))), ("data.pkl", "posix.system")),
    Hostile("legacy torch file", "a.pth", legacy, ("posix.system",)),
    Hostile("whole model", "a.pt",
            lambda path, _: torch.save(torch.nn.Linear(2, 2), path), ("Linear",)),
    Hostile("wrong checksum", "a.pt", wrong_checksum, ("checksum", "posix.system")),
    Hostile("encrypted flag", "a.pt", encrypted_flag, ("encrypted", "posix.system")),
    Hostile("other local name", "a.pt", other_local_name, ("another name", "posix.system")),
    Hostile("zip in zip", "a.pt", zip_in_zip, ("extra.zip!hidden.bin", "posix.system")),
    Hostile("zip behind a pickle", "a.pt", appended_zip, ("belong to no entry", "posix.system")),
    Hostile("zip bomb", "a.pt", zip_bomb, ("a zip bomb",)),
    Hostile("overlapping entries", "a.pt", overlapping_entries, ("overlap",)),
    Hostile("zip traversal", "a.pt",
            lambda path, s: zipped(path, {"archive/data.pkl": b"", "../../evil": b"x"}),
            ("outside its folder", "../../evil")),
    Hostile("zip absolute name", "a.pt",
            lambda path, s: zipped(path, {"/etc/evil": b"x", "archive/data.pkl": b""}),
            ("outside its folder",)),
    Hostile("tar traversal", "a.pt", lambda path, s: tarred(path, (entry("../evil"), b"x")),
            ("outside its folder",)),
    Hostile("tar link", "a.tar",
            lambda path, s: tarred(path, (entry("l", type=tarfile.SYMTYPE, linkname="/etc"), b"")),
            ("symlink",)),
    Hostile("tar of a pickle", "a.tar",
            lambda path, s: tarred(
                path, (entry("pickle"), pickle.dumps(Calls(os.system, touch(s))))),
            ("a.tar!pickle", "posix.system")),
    Hostile("gzip bomb", "a.bin", gzip_bomb, ("decompression bomb",)),
    Hostile("gzip of a pickle", "a.pkl",
            raw(lambda s: gzip.compress(pickle.dumps(Calls(os.system, touch(s))))),
            ("posix.system",)),
    Hostile("gzip cut off behind the payload", "a.pkl",
            raw(lambda s: gzip.compress(pickle.dumps(Calls(os.system, touch(s))))[:-4]),
            ("archive-damaged", "posix.system")),
    Hostile("zip without its contents", "a.pt",
            raw(lambda s: torch_zip(Calls(os.system, touch(s))) + bytes(100_000)),
            ("without a central directory",)),
    Hostile("six pickles in each other", "a.bin", raw(deep), ("pickle-nesting",)),
    Hostile("zlib of a pickle", "a.joblib",
            raw(lambda s: zlib.compress(pickle.dumps(Calls(os.system, touch(s))))),
            ("posix.system",)),
    Hostile("joblib", "a.joblib",
            lambda path, s: joblib.dump(Calls(os.system, touch(s)), path), ("posix.system",)),
    Hostile("joblib, behind an array", "a.joblib",
            lambda path, s: joblib.dump([np.arange(99.0), Calls(os.system, touch(s))], path),
            ("posix.system",)),
    Hostile("array of objects", "a.npy", object_array, ("posix.system",)),
    Hostile("disguised pickle", "notes.txt",
            plain(lambda s: Calls(os.system, touch(s)), 0), ("called .txt", "posix.system")),
    Hostile("pickle called safetensors", "a.safetensors",
            plain(lambda s: Calls(os.system, touch(s))), ("posix.system", "called .safetensors")),
    Hostile("hidden name", ".hidden", plain(lambda s: Calls(os.system, touch(s))),
            ("posix.system",)),
    Hostile("header beyond the file", "a.safetensors",
            raw(lambda s: safetensors({}, length=1 << 40)), ("claims 1099511627776 bytes",)),
    Hostile("tensor beyond the file", "a.safetensors",
            raw(lambda s: safetensors({"w": tensor(0, 4096, (1024,))})), ("outside the 16 bytes",)),
    Hostile("overlapping tensors", "a.safetensors",
            raw(lambda s: safetensors({"a": tensor(), "b": tensor(8, 16, (2,))})), ("overlaps",)),
    Hostile("hole between tensors", "a.safetensors",
            raw(lambda s: safetensors({"a": tensor(0, 4, (1,)), "b": tensor(8, 16, (2,))})),
            ("belong to no tensor",)),
    Hostile("shape against bytes", "a.safetensors",
            raw(lambda s: safetensors({"w": tensor(shape=(400,))})), ("has 16 bytes",)),
    Hostile("unknown dtype", "a.safetensors",
            raw(lambda s: safetensors({"w": tensor(dtype="X9")})), ("unknown dtype",)),
    Hostile("the same name twice", "a.safetensors",
            raw(lambda s: safetensors(
                b'{"w":%s,"w":%s}' % ((json.dumps(tensor()).encode(),) * 2))), ("2 times",)),
    Hostile("bytes behind the tensors", "a.safetensors",
            raw(lambda s: safetensors({"w": tensor()}, bytes(99))), ("after the last tensor",)),
    Hostile("negative offsets", "a.safetensors",
            raw(lambda s: safetensors({"w": tensor(-16, 0)})), ("offsets",)),
]  # fmt: skip


def config(folder: Path, **more) -> None:
    """Write the folder of a tiny sound model, with more in its configuration."""
    from mmdefense_tasks.victims import vit_classifier

    vit_classifier(3, 8, hidden=8, layers=1, heads=2).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def auto_map(folder: Path, sentinel: Path) -> None:
    config(folder, auto_map={"AutoModelForImageClassification": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text(f"import os\nos.system({touch(sentinel)!r})\n")


def remote_auto_map(folder: Path, _) -> None:
    config(folder, auto_map={"AutoConfig": "someone/else--configuration.Config"})


def tokenizer_auto_map(folder: Path, _) -> None:
    config(folder)
    held = {"auto_map": {"AutoTokenizer": ["tokenization_x.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(held))


def foreign_shard(folder: Path, _) -> None:
    config(folder)
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"classifier.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def foreign_link(folder: Path, _) -> None:
    config(folder)
    outside = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def evil_shard(folder: Path, sentinel: Path) -> None:
    config(folder)
    (folder / "model.safetensors").unlink()
    payload = {"classifier.weight": Calls(os.system, touch(sentinel))}
    torch.save(payload, folder / "pytorch_model.bin")


def chat_template(folder: Path, sentinel: Path) -> None:
    config(folder)
    walk = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": walk}))


FOLDERS = [
    Hostile("auto_map", "m", auto_map, ("auto_map", "modeling_evil.py", "system")),
    Hostile("auto_map of another repository", "m", remote_auto_map, ("someone/else",)),
    Hostile("auto_map of a tokenizer", "m", tokenizer_auto_map, ("tokenizer_config.json",)),
    Hostile("shard outside", "m", foreign_shard, ("../elsewhere.safetensors",)),
    Hostile("link outside", "m", foreign_link, ("escapes the folder",)),
    Hostile("pickled shard", "m", evil_shard, ("pytorch_model.bin", "posix.system")),
]
TEMPLATES = [Hostile("chat template", "m", chat_template, ("__class__", "__globals__"))]
