"""What each opcode of a pickle does to the stack, with arguments read as unpicklers do."""

from __future__ import annotations

import codecs
import struct
import warnings
from collections.abc import Callable
from typing import IO, Any

from mmdefense.scanning.machine import DATA, MAX_STEPS, UNKNOWN, Followed, Machine, Reference
from mmdefense.scanning.reader import CutError, Reader

__all__ = ["follow"]


def follow(
    file: IO[bytes], start: int = 0, *, size: int | None = None, steps: int = MAX_STEPS
) -> Followed:
    """Follow the pickle at ``start`` of a file, to its STOP or to where every unpickler breaks.

    Args:
        file: A seekable binary file.
        start: Where the pickle starts.
        size: Size of the whole, if ``file`` is only its beginning.
        steps: Most opcodes to follow.
    """
    return Machine(Reader(file, start, size), _HANDLERS, steps).run()


_HANDLERS: dict[int, Callable[[Machine], None]] = {}

_Handler = Callable[[Machine], None]


def _opcode(*codes: bytes) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys((code[0] for code in codes), handler))
        return handler

    return register


@_opcode(b".")
def _stop(machine: Machine) -> None:
    machine.followed.value = machine.pop()


@_opcode(b"\x80")
def _proto(machine: Machine) -> None:
    machine.protocol = machine.reader.read(1)[0]
    if machine.protocol > 5:
        raise ValueError(f"protocol {machine.protocol} is unknown")


@_opcode(b"\x95")
def _frame(machine: Machine) -> None:
    reader = machine.reader
    (length,) = struct.unpack("<Q", reader.read(8))
    if reader.frame_end is not None and reader.at < reader.frame_end:
        machine.note("a frame inside a frame")
        machine.followed.crossed = True
    if reader.at + length > reader.size:
        machine.note("a frame reaches past the end")
    reader.frame_end = reader.at + length


@_opcode(b"c")
def _global(machine: Machine) -> None:
    _look_up_lines(machine)


def _look_up_lines(machine: Machine) -> bool:
    module, has_end = machine.reader.line()
    if not has_end:
        raise CutError
    name, has_end = machine.reader.line()
    machine.look_up(module.decode(), name.decode())
    return has_end


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


@_opcode(b"\x93")
def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.look_up(module, name)


@_opcode(b"i")
def _inst(machine: Machine) -> None:
    has_end = _look_up_lines(machine)
    kind = machine.stack.pop()
    machine.call(kind, tuple(machine.pop_mark()))
    if not has_end:
        raise CutError


@_opcode(b"o")
def _obj(machine: Machine) -> None:
    values = machine.pop_mark()
    if not values:
        raise ValueError("an object without a class")
    machine.call(values[0], tuple(values[1:]))


@_opcode(b"R")
def _reduce(machine: Machine) -> None:
    given, function = machine.pop(), machine.pop_function()
    machine.call(function, given)


@_opcode(b"\x81")
def _newobj(machine: Machine) -> None:
    given, function = machine.pop(), machine.pop()
    machine.call(function, given, "built")


@_opcode(b"\x92")
def _newobj_ex(machine: Machine) -> None:
    machine.pop()
    _newobj(machine)


@_opcode(b"b")
def _build(machine: Machine) -> None:
    state = machine.pop()
    machine.build(state)


@_opcode(b"\x82", b"\x83", b"\x84")
def _extension(machine: Machine) -> None:
    machine.reader.read({0x82: 1, 0x83: 2, 0x84: 4}[machine.code])
    machine.followed.hidden.append("a name of the extension registry")
    machine.stack.append(UNKNOWN)


@_opcode(b"P")
def _persistent_line(machine: Machine) -> None:
    key, has_end = machine.reader.line()
    if not has_end:
        raise CutError
    machine.stack.append(Reference(_text(key)))


@_opcode(b"Q")
def _persistent(machine: Machine) -> None:
    machine.stack.append(Reference(machine.pop()))


@_opcode(b"I", b"L")
def _integer(machine: Machine) -> None:
    text, has_end = machine.reader.line()
    if not has_end:
        raise CutError
    machine.stack.append(_whole(text.rstrip(b"L"), 0))


def _whole(text: bytes, base: int) -> Any:
    """Return an integer, or some value if it is not written as in Python."""
    try:
        return int(text[:64], base) if len(text) <= 64 else DATA
    except ValueError:
        return DATA


@_opcode(b"F")
def _float_line(machine: Machine) -> None:
    if not machine.reader.line()[1]:
        raise CutError
    machine.stack.append(DATA)


def _fixed(code: bytes, size: int, form: str) -> None:
    @_opcode(code)
    def number(machine: Machine) -> None:
        machine.stack.append(struct.unpack(form, machine.reader.read(size))[0])


_fixed(b"J", 4, "<i")
_fixed(b"K", 1, "<B")
_fixed(b"M", 2, "<H")


@_opcode(b"G")
def _float(machine: Machine) -> None:
    machine.reader.read(8)
    machine.stack.append(DATA)


@_opcode(b"\x8a")
def _long1(machine: Machine) -> None:
    machine.stack.append(int.from_bytes(machine.reader.sized("<B"), "little", signed=True))


@_opcode(b"\x8b")
def _long4(machine: Machine) -> None:
    machine.reader.sized("<i")
    machine.stack.append(DATA)


@_opcode(b"N", b"\x88", b"\x89", b"\x97", b"]", b"\x8f")
def _plain(machine: Machine) -> None:
    machine.stack.append(DATA)


@_opcode(b"}")
def _empty_dict(machine: Machine) -> None:
    machine.stack.append({})


@_opcode(b")")
def _empty_tuple(machine: Machine) -> None:
    machine.stack.append(())


@_opcode(b"S")
def _quoted(machine: Machine) -> None:
    text, has_end = machine.reader.line()
    if not has_end:
        raise CutError
    if len(text) >= 2 and text[:1] == text[-1:] and text[:1] in b"'\"":
        text = text[1:-1]
    if b"\\" in text:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = _unescaped(text)
    machine.constant(_text(text))


def _unescaped(text: bytes) -> bytes:
    try:
        return codecs.escape_decode(text)[0]
    except ValueError:
        return text


@_opcode(b"V")
def _unicode(machine: Machine) -> None:
    text, has_end = machine.reader.line()
    if not has_end:
        raise CutError
    try:
        machine.constant(text.decode("raw-unicode-escape"))
    except UnicodeDecodeError:
        machine.constant(_text(text))


def _counted(code: bytes, form: str, make: Callable[[bytes], str | bytes]) -> None:
    @_opcode(code)
    def item(machine: Machine) -> None:
        machine.constant(make(machine.reader.sized(form)))


for _code, _form in ((b"T", "<i"), (b"U", "<B"), (b"\x8c", "<B"), (b"X", "<I"), (b"\x8d", "<Q")):
    _counted(_code, _form, _text)
for _code, _form in ((b"C", "<B"), (b"B", "<I"), (b"\x8e", "<Q"), (b"\x96", "<Q")):
    _counted(_code, _form, bytes)


@_opcode(b"(")
def _mark(machine: Machine) -> None:
    machine.marks.append(len(machine.stack))


@_opcode(b"0")
def _pop(machine: Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


@_opcode(b"1")
def _pop_mark(machine: Machine) -> None:
    machine.pop_mark()


@_opcode(b"2")
def _dup(machine: Machine) -> None:
    machine.stack.append(machine.top())


@_opcode(b"\x98")
def _read_only(machine: Machine) -> None:
    machine.top()


@_opcode(b"t")
def _tuple(machine: Machine) -> None:
    machine.stack.append(tuple(machine.pop_mark()))


def _short_tuple(code: bytes, count: int) -> None:
    @_opcode(code)
    def short(machine: Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))


_short_tuple(b"\x85", 1)
_short_tuple(b"\x86", 2)
_short_tuple(b"\x87", 3)


@_opcode(b"l", b"\x91")
def _list(machine: Machine) -> None:
    machine.pop_mark()
    machine.stack.append(DATA)


@_opcode(b"d")
def _dict(machine: Machine) -> None:
    values = machine.pop_mark()
    machine.stack.append({})
    _set_items(machine, values)


@_opcode(b"s")
def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine, [key, value])


@_opcode(b"u")
def _set_many(machine: Machine) -> None:
    _set_items(machine, machine.pop_mark())


def _set_items(machine: Machine, values: list[Any]) -> None:
    target = machine.top()
    for key, value in zip(values[::2], values[1::2], strict=False):
        if isinstance(target, dict):
            target[key if isinstance(key, str) else UNKNOWN] = value


@_opcode(b"a")
def _append(machine: Machine) -> None:
    machine.pop()
    machine.top()


@_opcode(b"e", b"\x90")
def _append_many(machine: Machine) -> None:
    machine.pop_mark()
    machine.top()


def _memoing(put: bytes, get: bytes, index: Callable[[Machine], Any]) -> None:
    @_opcode(put)
    def keep(machine: Machine) -> None:
        place = index(machine)
        machine.memo[place] = machine.top()

    @_opcode(get)
    def give(machine: Machine) -> None:
        place = index(machine)
        if place not in machine.memo:
            raise ValueError(f"there is no memo entry {place}")
        machine.stack.append(machine.memo[place])


def _index_line(machine: Machine) -> Any:
    text, has_end = machine.reader.line()
    if not has_end:
        raise CutError
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text[:20]!r} is not a memo key") from None


_memoing(b"p", b"g", _index_line)
_memoing(b"q", b"h", lambda machine: machine.reader.read(1)[0])
_memoing(b"r", b"j", lambda machine: struct.unpack("<I", machine.reader.read(4))[0])


@_opcode(b"\x94")
def _memoize(machine: Machine) -> None:
    machine.memo[len(machine.memo)] = machine.top()
