"""Pickles that leave a call to something that nobody would look at for one."""

from __future__ import annotations

import struct
from pathlib import Path

from hostile import unicode_

_REBUILD = b"ctorch._tensor\n_rebuild_from_type_v2\n"
_PARTIAL = b"cfunctools\npartial\n"
_LOAD = b"ctorch.storage\n_load_from_bytes\n"


def of_bytes(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def to_a_partial(data: bytes) -> bytes:
    """Have a function called that is only handed on, by one that is wrapped."""
    given = b"(" + _LOAD + b"ccollections\nOrderedDict\n" + of_bytes(data) + b"\x85}t"
    return b"\x80\x04" + _PARTIAL + _REBUILD + b"\x85R" + given + b"R."


def to_a_method(data: bytes) -> bytes:
    """Give an object a method that making a parameter of it calls."""
    method = unicode_("detach") + _PARTIAL + _LOAD + of_bytes(data) + b"\x86Rs"
    thing = b"ctypes\nSimpleNamespace\n)R}" + method + b"b"
    return b"\x80\x04ctorch._utils\n_rebuild_parameter\n(" + thing + b"\x89}tR."


def given_back(data: bytes) -> bytes:
    """Change what a partial calls under the name of a copy that is none."""
    kept = _PARTIAL + b"cbuiltins\nstr\n\x85Rq\x000"
    changed = b"ctorch.jit._pickle\nrestore_type_tag\nh\x00" + unicode_("x") + b"\x86R"
    state = b"(" + _LOAD + b")}Ntb0"
    return b"\x80\x04" + kept + changed + state + b"h\x00" + of_bytes(data) + b"\x85R."


def long_places(sentinel: Path) -> bytes:
    """Keep two names at places of the memo of more digits than need be."""
    zeros = b"0" * 70
    kept = unicode_("eval") + b"p" + zeros + b"1\n0" + unicode_("set") + b"p" + zeros + b"2\n0"
    code = unicode_(f"__import__('os').mkdir({str(sentinel)!r})")
    return b"\x80\x04" + kept + unicode_("builtins") + b"g" + zeros + b"1\n\x93" + code + b"\x85R."


_WRAPPER = b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n"
_REBUILT = b"ccopyreg\n_reconstructor\n" + _WRAPPER + b"cbuiltins\nobject\nN\x87R"
_LARGER = b"(K\x03" + unicode_("|") + b"NNNJ" + struct.pack("<i", 1000) + b"K\x01K\x00tb"
_SHAPE = (
    b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n(" + unicode_("U5") + b"\x89\x88tR"
    b"(K\x03" + unicode_("<") + b"NNNK\x14K\x04K\x08tbC\x14" + "shape".encode("utf-32-le")
    + b"\x86RM\xe8\x03\x85s"
)  # fmt: skip


def changed_class() -> bytes:
    """Change a class under the name of a number of NumPy's, as older versions read it."""
    number = b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n" + unicode_("O") + b"\x85R"
    state = b"N}" + unicode_("data") + unicode_("x") + b"s\x86b."
    return b"\x80\x04" + number + b"ctorch.nn.parameter\nParameter\n\x86R" + state


def of_another_size(how: str, call: bytes) -> bytes:
    """Describe an array of 1000 bytes such that a careless reader sees one of 1, or none."""
    made = _REBUILT if how == "rebuilt" else _WRAPPER + b")\x81"
    state, again = (_LARGER if how == "type" else b""), (_SHAPE if how == "key" else b"")
    shape, code = (b"M\xe8\x03" if how == "rebuilt" else b"K\x01"), "V1" if how == "type" else "u1"
    kind = b"cnumpy\ndtype\n("
    if how == "partial":
        kind = _PARTIAL + b"(cnumpy\ndtype\n" + unicode_("V1000") + b"\x89tR("
    fields = (
        (b"cnumpy\nndarray\n", "subclass"),
        (shape + b"\x85", "shape"),
        (unicode_("C"), "order"),
        (
            kind + unicode_(code) + (b"" if how == "partial" else b"\x89\x88") + b"tR" + state,
            "dtype",
        ),
        (b"\x89", "allow_mmap"),
    )
    held = b"}(" + b"".join(unicode_(name) + value for value, name in fields) + b"u" + again
    start, rest = (b"" if how == "rebuilt" else b"A") + b".\x80\x02B", b"0" + call
    inside = 1000 - len(start) - 4
    length = struct.pack("<I", inside + len(rest))
    return b"\x80\x04" + made + held + b"b" + start + length + bytes(inside) + rest + b"."
