"""What either of Python's unpicklers looks up or builds, the scan's reader has seen."""

from __future__ import annotations

import _compat_pickle
import contextlib
import io
import pickle
import random
import struct
import warnings

import pytest

from mmdefense.scanning.opcodes import follow

TEXTS = [b"os", b"system", b"a", b"posix.system", b"collections"]
PLAIN = [
    *(b"\x93", b"R", b"\x81", b"o", b"b", b"(", b"t", b")", b"\x85", b"\x86", b"\x94", b"0", b"1"),
    *(b"2", b"}", b"]", b"s", b"u", b"a", b"e", b"l", b"d", b"N", b"\x88", b"K\x05", b"Q", b"Pa\n"),
    *(
        b"\x98",
        b"\x91",
        b"\x8f",
        b"\x90",
        b".",
        b"\x92",
        b"r\1\0\0\0",
        b"j\1\0\0\0",
        b"G" + bytes(8),
    ),
    *(b"\x8a\x01\x05", b"\x8b\x01\0\0\0\x05", b"C\x01a", b"B\x01\0\0\0a", b"T\x02\0\0\0os"),
    *(b"\x8e\x01" + bytes(7) + b"a", b"\x96\x01" + bytes(7) + b"a", b"\x8d\x02" + bytes(7) + b"os"),
    *(b"I%s\n" % text for text in (b"0x1", b"1_0", b"01", b"00", b"010", b" 5 ", b"-0b1")),
    *(b"L%s\n" % text for text in (b"5L", b"0x5L", b"1_0")),
    *(b"F%s\n" % text for text in (b"1e5", b"inf", b"1_0.5", b"nan", b" 1")),
    *(b"g%s\n" % text for text in (b"0", b"01", b" 1", b"1_0", b"2")),
]

ANY = [code for code in range(256) if code not in b"r\x96"]  # with those, much memory is asked for


def opcode(draw: random.Random) -> bytes:
    text, other = draw.choice(TEXTS), draw.choice(TEXTS)
    kinds = [
        *[b"\x8c" + bytes([len(text)]) + text, b"X" + struct.pack("<I", len(text)) + text] * 3,
        *[b"c" + text + b"\n" + other + b"\n", b"\x93", b"R", b"\x81", b"(", b"\x85", b")"] * 3,
        *(b"i" + text + b"\n" + other + b"\n", b"S'" + text + b"'\n", b"V" + text + b"\n"),
        *(b"q" + bytes([draw.randrange(4)]), b"h" + bytes([draw.randrange(4)])),
        *(b"p%d\n" % draw.randrange(4), b"\x80" + bytes([draw.randrange(6)])),
        *(b"\x95" + struct.pack("<Q", draw.randrange(20)), bytes([draw.choice(ANY)])),
    ]
    return draw.choice(kinds if draw.random() < 0.5 else PLAIN)


def unpickled(base, data: bytes, **how):
    """Return the names that an unpickler looks up, and those that it calls or builds."""
    looked, made = set(), set()

    class Unpickler(base):
        def find_class(self, module, name):
            looked.add((module, name))

            class Inert(dict):
                def __new__(cls, *_, **__):
                    made.add((module, name))
                    return dict.__new__(cls)

                def __init__(self, *_, **__):
                    pass

                def __setstate__(self, _):
                    pass

                append = extend = add = __setstate__

            return Inert

        def persistent_load(self, key):
            return key

    with contextlib.suppress(Exception):
        Unpickler(io.BytesIO(data), **how).load()
    return looked, made


def as_python_3(name: tuple[str, str]) -> tuple[str, str]:
    module, name = _compat_pickle.NAME_MAPPING.get(name, name)
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_looked_up_that_was_not_seen(seed):
    draw = random.Random(seed)
    for _ in range(300):
        data = b"".join(opcode(draw) for _ in range(draw.randrange(3, 30)))
        found = follow(io.BytesIO(data))
        if found.crossed:  # that is a finding by itself
            assert found.error
            continue
        seen = {(one.module, one.name) for one in found.uses}
        used = {(one.module, one.name) for one, use in found.uses.items() if use != "held"}
        for base, how in ((pickle.Unpickler, {}), (pickle._Unpickler, {}),
                          (pickle.Unpickler, {"encoding": "latin1"})):  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                looked, made = unpickled(base, data, **how)
            missed = {name for name in looked if name not in seen and as_python_3(name) not in seen}
            assert found.hidden or not {name for name in missed if all(name)}, data
            missed = {name for name in made if name not in used and as_python_3(name) not in used}
            assert found.hidden or not missed, data
