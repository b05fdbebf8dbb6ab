"""What a pickle would import and call, found by following its opcodes without running any.

The opcodes are followed with a stack and a memo of their own, so that a name that is put together
out of sight (from the memo, from under a popped decoy) is the name that the unpickler would look
up. A name that cannot be followed is reported as such, and so is a stream that cannot be read to
its end: whatever stands there, an unpickler that reads more forgivingly may run it.

How bad a name is: plain data types of Python and NumPy are ``info``, what
:func:`mmdefense.checkpoints.names.is_dangerous` calls so is ``high``, and any other name that
PyTorch's weights-only unpickler would refuse is ``medium``.

References:
    pickletools in the Python standard library, for the opcodes; picklescan's issues 14 and 22 for
    the memo decoys; protectai/modelscan's issues 85, 330 and 338 for gadgets beyond deny lists.
"""

from __future__ import annotations

import _compat_pickle
import base64
import binascii
import io
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import IO, Any, cast

from mmdefense.checkpoints.names import DATA, is_dangerous
from mmdefense.scanning.findings import Finding, Level, Rule

__all__ = ["MAX_DEPTH", "Followed", "calls_dangerous", "follow", "level_of", "scan_pickles"]

IMPORT = Rule(
    id="pickle-import",
    level="medium",
    measured="a name that the pickle imports",
    reference="names that PyTorch's weights-only unpickler allows",
    meaning="Unpickling it looks this name up and can call it with arguments from the file.",
    blind_spot="what the named thing does; a class of an installed library may be harmless.",
)
PLAIN = Rule(
    id="pickle-data",
    level="info",
    measured="names that the pickle imports",
    reference="plain data types of Python and NumPy",
    meaning="Numbers, texts, paths and containers beside the tensors. They are read as data here.",
    blind_spot="nothing that these types can do; other imports are reported apart.",
)
HIDDEN = Rule(
    id="pickle-hidden-import",
    level="high",
    measured="an import whose name is made while unpickling",
    reference="names written out in the file",
    meaning="The name that is imported cannot be told without running the pickle.",
    blind_spot="which name it is.",
)
BROKEN = Rule(
    id="pickle-broken",
    level="medium",
    measured="whether the pickle can be read to its end",
    reference="a stream of known opcodes that ends in STOP",
    meaning="What stands before the break runs all the same, and other readers may go on after it.",
    blind_spot="what stands after the break.",
)
NESTED_TOO_DEEP = Rule(
    id="pickle-nesting",
    level="high",
    measured="pickles within pickles",
    reference="four levels",
    meaning="Layers of pickles hide what the innermost one does.",
    blind_spot="what lies below the fourth level.",
)

MAX_DEPTH = 4
_STREAMS = 10_000
_MAX_ITEM, _MAX_LINE, _MAX_NESTED, _MAX_SEARCHED = 1 << 30, 1 << 20, 1 << 24, 1 << 28
_MARK = object()
_UNKNOWN = object()
_STRINGS = {
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_CALLS = {"REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_NAME = re.compile(r"[\w.]+", re.ASCII)
_SPELLED = re.compile(
    rb"[ci]([A-Za-z_][\w.]*)\n([A-Za-z_][\w.]*)\n"
    rb"|(?:\x8c.|X.{4})([A-Za-z_][\w.]*)(?:\x94|q.)?(?:\x8c.|X.{4})([A-Za-z_][\w.]*)(?:\x94|q.)?\x93",
    re.DOTALL,
)
_BASE64 = re.compile(r"[\w+/\-\s]{24,}={0,2}\s*", re.ASCII)


@dataclass
class Followed:
    """What one pickle does.

    Attributes:
        imports: Names as ``(module, name)``; none where a name could not be followed.
        calls: Whether anything is called.
        sound: Whether nothing is taken from an empty stack, as bytes that are no pickle soon do.
        constants: Strings and bytes that could hold a further pickle.
        error: Why it could not be read to its end; empty where it could.
    """

    imports: list[tuple[str, str] | None] = field(default_factory=list)
    calls: bool = False
    sound: bool = True
    constants: list[str | bytes] = field(default_factory=list)
    error: str = ""


def follow(stream: IO[bytes] | _Bounded) -> Followed:
    """Follow the opcodes of the next pickle of ``stream``, to its STOP or to where it breaks."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            machine.step(opcode, argument)
    except Exception as error:  # genops raises ValueError, UnicodeDecodeError, IndexError ...
        machine.followed.error = str(error) or type(error).__name__
    return machine.followed


class _Machine:
    """A pickle machine over strings and unknowns: it makes no object and imports nothing."""

    def __init__(self) -> None:
        self.followed = Followed()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.protocol = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do to the stack what the opcode does to its kinds of value."""
        name = opcode.name
        self.followed.calls |= name in _CALLS
        if name == "PROTO":
            self.protocol = argument
        elif name in {"GLOBAL", "INST"}:
            module, _, attribute = argument.partition(" ")
            self._import(module, attribute)
            self._replace(opcode)
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            self._import(module, attribute)
            self.stack.append(_UNKNOWN)
        elif name.startswith("EXT"):
            self.followed.imports.append(None)
            self.stack.append(_UNKNOWN)
        elif not self._step_memo(name, argument):
            self._step_value(opcode, argument)

    def _step_memo(self, name: str, argument: Any) -> bool:
        top = self.stack[-1] if self.stack else _UNKNOWN
        if name in {"PUT", "BINPUT", "LONG_BINPUT"}:
            self.memo[argument] = top
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = top
        elif name in {"GET", "BINGET", "LONG_BINGET"}:
            self.stack.append(self.memo.get(argument, _UNKNOWN))
        elif name == "DUP":
            self.stack.append(top)
        else:
            return False
        return True

    def _step_value(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        if opcode.name in _STRINGS | _BYTES:
            self.stack.append(argument)
            self.followed.constants.append(argument[:_MAX_NESTED])
        elif opcode.name == "MARK":
            self.stack.append(_MARK)
        else:
            self._replace(opcode)

    def _replace(self, opcode: pickletools.OpcodeInfo) -> None:
        """Pop what the opcode takes and push unknowns for what it gives."""
        for kind in reversed(opcode.stack_before):
            if kind is pickletools.stackslice:
                continue
            if kind is pickletools.markobject:
                self._pop_to_mark()
            else:
                self._pop()
        self.stack += [_UNKNOWN] * len(opcode.stack_after)

    def _pop_to_mark(self) -> None:
        while self.stack and self.stack.pop() is not _MARK:
            pass

    def _pop(self) -> Any:
        self.followed.sound &= bool(self.stack)
        return self.stack.pop() if self.stack else _UNKNOWN

    def _import(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self.followed.imports.append(None)
            return
        if self.protocol < 3:  # such pickles may bear the names of Python 2
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        self.followed.imports.append((module, name))


def scan_pickles(
    stream: IO[bytes], subject: str, *, declared: bool = True, depth: int = 0
) -> Iterator[Finding]:
    """Yield what speaks against the pickles that stand one behind the other in ``stream``.

    PyTorch's older format and some trainers write several; readers differ in how many they load.

    Args:
        stream: A binary file.
        subject: Its name in the findings.
        declared: Whether it calls itself a pickle. Of other bytes, such as the raw storages behind
            the pickles of the older format, only what names an import is reported, or calls one
            whose name is hidden on a stack that holds.
        depth: How many pickles and archives it lies in.
    """
    if depth > MAX_DEPTH:
        yield NESTED_TOO_DEEP.found(subject, depth)
        return
    names: set[tuple[str, str] | None] = set()
    bounded = _Bounded(stream)
    for count in range(_STREAMS):
        start = stream.tell()
        followed = follow(bounded)
        is_first = declared and count == 0
        if followed.error and not is_first and not calls_dangerous(followed):
            break
        hides = is_first or (followed.calls and followed.sound)
        names.update(name for name in followed.imports if name or hides)
        for constant in followed.constants:
            yield from _scan_constant(constant, subject, depth)
        if followed.error:
            yield BROKEN.found(subject, followed.error)
            stream.seek(start)
            names.update(_spelled_out(stream))
            break
        if not _more(stream):
            break
    yield from _judged(names, subject)


def _spelled_out(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield dangerous imports that are spelled out anywhere, past a break that others read over.

    The C unpickler reads numbers that pickletools does not; joblib puts raw arrays in between.
    """
    for match in _SPELLED.finditer(stream.read(_MAX_SEARCHED)):
        module, name = (part.decode("ascii") for part in match.groups() if part is not None)
        if level_of(module, name) == "high":
            yield module, name


def calls_dangerous(followed: Followed) -> bool:
    """Whether bytes, which may be a broken pickle or none, import what is of high level and call.

    Text can read like an import; one of a proper name, which is called as well, is none by chance.
    """
    names = [name for name in followed.imports if name and _NAME.fullmatch(".".join(name))]
    return followed.calls and any(level_of(*name) == "high" for name in names)


class _Bounded:
    """A stream that refuses to hand out more at once than any pickle needs."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_ITEM:
            raise ValueError(f"an item of {size} bytes is too large to be looked into")
        return self.stream.read(size)

    def readline(self) -> bytes:
        return self.stream.readline(_MAX_LINE)


def _more(stream: IO[bytes]) -> bool:
    """Whether a further byte follows; the stream stays where it is."""
    if not stream.read(1):
        return False
    stream.seek(-1, io.SEEK_CUR)
    return True


def _judged(names: set[tuple[str, str] | None], subject: str) -> Iterator[Finding]:
    levels = {".".join(name): level_of(*name) for name in names if name}
    for name, level in sorted(levels.items()):
        if level not in {None, "info"}:
            yield IMPORT.found(subject, name, level=level)
    if plain := sorted(name for name, level in levels.items() if level == "info"):
        yield PLAIN.found(subject, ", ".join(plain))
    if None in names:
        yield HIDDEN.found(subject, "a name that is made while unpickling")


def _scan_constant(constant: str | bytes, subject: str, depth: int) -> Iterator[Finding]:
    """Yield what a string or bytes of a pickle hold, if they are a pickle themselves."""
    for data in _readings(constant):
        inner = follow(io.BytesIO(data))
        if calls_dangerous(inner) or (not inner.error and (inner.imports or inner.constants)):
            yield from scan_pickles(io.BytesIO(data), f"{subject}!nested pickle", depth=depth + 1)


def _readings(constant: str | bytes) -> Iterator[bytes]:
    data = constant.encode("latin-1", "ignore") if isinstance(constant, str) else bytes(constant)
    if len(data) < 4:
        return
    yield data
    text = data[:1_000_000].decode("latin-1")
    if _BASE64.fullmatch(text):
        try:
            yield base64.b64decode(text, altchars=b"-_" if set("-_") & set(text) else None)
        except (binascii.Error, ValueError):
            return


def level_of(module: str, name: str) -> Level | None:
    """Return how strongly an import speaks against a pickle; none for what only makes tensors."""
    full = f"{module}.{name}"
    if full in _allowed_by_torch():
        return None
    if full in DATA:
        return "info"
    return "high" if is_dangerous(module, name) else "medium"


@cache
def _allowed_by_torch() -> frozenset[str]:
    """Return the names that ``torch.load(weights_only=True)`` accepts with nothing added."""
    from torch import _weights_only_unpickler

    return frozenset(_weights_only_unpickler._get_allowed_globals())
