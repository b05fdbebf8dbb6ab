"""Trace a pickle's opcodes as unpicklers do, without making, importing or calling anything.

Arguments are read as the C unpickler reads them, not as pickletools does: whatever number or text
is there, the stream continues after it. So this machine reads on wherever some unpickler would, and
stops where none would. The stack holds names, texts, numbers, tuples and stand-ins for the results
of calls, so that it is known which name is called, built or only looked up.

References:
    ``Modules/_pickle.c`` and ``Lib/pickle.py`` of CPython, which differ: the former ignores frames;
    the latter, on which joblib and dill build, accepts an unfinished last line.
"""

from __future__ import annotations

import _compat_pickle
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmdefense.checkpoints.names import CALLERS, DIRECT, ENUMS, is_dangerous
from mmdefense.scanning.reader import MAX_CONSTANT, CutError, Reader

__all__ = ["DATA", "MAX_STEPS", "UNKNOWN", "Followed", "Machine", "Name", "Reference", "Use"]

Use = Literal["held", "built", "called"]
"""How a name is used: it is only looked up, instances are made without its constructor, or it is
called."""

MAX_STEPS = 10_000_000
"""Most opcodes of a file to follow. Our choice."""
_FORKED = 64
_MAX_PLAIN = 24
"""Characters of a text that is too short to hold a pickle as base64."""

DATA = object()
"""A harmless value that is not a string."""
UNKNOWN = object()
"""An unknown value."""


@dataclass(frozen=True)
class Name:
    """Something that is looked up by module and name."""

    module: str
    name: str

    @property
    def full(self) -> str:
        """Module and name in one."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Made:
    """The result of a call, or a built instance.

    Attributes:
        by: What was called.
        given: Its arguments.
        state: The state that was set later.
    """

    by: Any
    given: Any
    state: Any = None


@dataclass(eq=False)
class Reference:
    """The object behind a persistent id, which only the loader knows."""

    key: Any


@dataclass
class Followed:
    """What one pickle does.

    Attributes:
        uses: The strongest use of each name.
        hidden: Lookups and calls whose name cannot be determined.
        changed: Objects whose attributes are set although the pickle did not create them.
        calls: Whether anything is called or built.
        constants: Strings and bytes that could hold another pickle.
        loaded: Bytes that PyTorch would load as a separate file.
        value: The object that the pickle makes; None if it cannot be read to its end.
        first: Its first opcode.
        steps: Number of opcodes that were followed.
        error: Why it cannot be read to its end, or why unpicklers read it differently; or empty.
        cut: Whether the available bytes ended before the pickle.
        exhausted: Whether it was too long.
        crossed: Whether an item reaches past its frame, so that unpicklers read different names.
        end: Where it ends in the file.
    """

    uses: dict[Name, Use] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    calls: bool = False
    constants: list[str | bytes] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    value: Any = None
    first: int = -1
    steps: int = 0
    error: str = ""
    cut: bool = False
    exhausted: bool = False
    crossed: bool = False
    end: int = 0

    def use(self, name: Name, how: Use) -> None:
        """Record a use of a name."""
        order = ("held", "built", "called")
        before = self.uses.get(name, "held")
        self.uses[name] = max(how, before, key=order.index)

    def take(self, other: Followed) -> None:
        """Add all that another pickle does."""
        for name, how in other.uses.items():
            self.use(name, how)
        self.hidden += other.hidden
        self.changed += other.changed
        self.calls |= other.calls
        self.constants += other.constants
        self.loaded += other.loaded
        self.error = self.error or other.error
        self.crossed |= other.crossed


Handlers = Mapping[int, Callable[["Machine"], None]]
STOP, FRAME = b"."[0], b"\x95"[0]


class Machine:
    """A pickle machine over names, texts and unknowns."""

    def __init__(
        self,
        reader: Reader,
        handlers: Handlers,
        steps: int,
        *,
        stack: list[Any] | None = None,
        memo: MutableMapping[Any, Any] | None = None,
        arrays: bool = True,
    ) -> None:
        self.reader, self.handlers, self.limit, self.arrays = reader, handlers, steps, arrays
        self.stack: list[Any] = stack or []
        self.marks: list[int] = []
        self.memo: MutableMapping[Any, Any] = {} if memo is None else memo
        self.protocol = self.code = 0
        self.followed = Followed()

    def run(self) -> Followed:
        """Follow the opcodes to STOP, or to where they break."""
        found, reader = self.followed, self.reader
        try:
            while True:
                if found.steps >= self.limit:
                    found.exhausted = True
                    raise ValueError(f"it has more than {MAX_STEPS} opcodes")
                self.code = code = reader.read(1)[0]
                if found.steps == 0:
                    found.first = code
                before = reader.at
                handler = self.handlers.get(code)
                if handler is None:
                    raise ValueError(f"byte {reader.at - 1} is not an opcode: {code:#04x}")
                handler(self)
                self._check_frame(code, before)
                found.steps += 1
                if code == STOP:
                    break
        except CutError:
            found.cut = True
            found.error = found.error or "it has no end"
        except ValueError as error:
            found.error = found.error or str(error)
        found.end = reader.at
        return found

    def _check_frame(self, code: int, before: int) -> None:
        """Record an item that crosses the end of a frame, where unpicklers read differently."""
        end = self.reader.frame_end
        if end is None or code == FRAME:
            return
        if before - 1 < end < self.reader.at:
            self.note("an item reaches past its frame")
            self.followed.crossed = True
        if self.reader.at >= end:
            self.reader.frame_end = None

    def note(self, error: str) -> None:
        """Record that unpicklers read it differently."""
        self.followed.error = self.followed.error or error

    def floor(self) -> int:
        """Return the height of the stack that a mark protects."""
        return self.marks[-1] if self.marks else 0

    def top(self) -> Any:
        """Return the top of the stack.

        Raises:
            ValueError: If it is empty.
        """
        if len(self.stack) <= self.floor():
            raise ValueError(f"byte {self.reader.at - 1} pops from an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        """Pop the top of the stack, to pass it on.

        Raises:
            ValueError: If it is empty.
        """
        value = self.pop_function()
        self._check_direct(value)
        return value

    def pop_function(self) -> Any:
        """Pop the top of the stack, to call it.

        Raises:
            ValueError: If it is empty.
        """
        value = self.top()
        self.stack.pop()
        return value

    def _check_direct(self, value: Any) -> None:
        if isinstance(value, Name) and value.full in DIRECT:
            self.followed.hidden.append(f"a call of {value.full} by whatever receives it")

    def pop_mark(self) -> list[Any]:
        """Pop everything above the last mark.

        Raises:
            ValueError: If there is no mark.
        """
        if not self.marks:
            raise ValueError(f"byte {self.reader.at - 1} needs a mark, but there is none")
        place = self.marks.pop()
        values = self.stack[place:]
        del self.stack[place:]
        for value in values:
            self._check_direct(value)
        return values

    def constant(self, value: str | bytes) -> None:
        """Push a text or bytes."""
        self.stack.append(value)
        if len(value) >= _MAX_PLAIN or (len(value) > 8 and _looks_pickled(value)):
            self.followed.constants.append(value[:MAX_CONSTANT])

    def look_up(self, module: Any, name: Any) -> None:
        """Push the object of a name.

        Raises:
            ValueError: If the name is not a string.
        """
        if isinstance(module, str) and isinstance(name, str):
            if self.protocol < 3:  # such pickles may use the names of Python 2
                module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            found = Name(module, name)
            self.followed.use(found, "held")
            self.stack.append(found)
        elif any(part is UNKNOWN or isinstance(part, Made | Reference) for part in (module, name)):
            self.followed.hidden.append("a name that is built while unpickling")
            self.stack.append(UNKNOWN)
        else:
            raise ValueError("a name that is not a string")

    def call(self, function: Any, given: Any, how: Use = "called") -> None:
        """Push the result of a call, or of building an instance."""
        self.followed.calls = True
        if not (isinstance(function, Name) and self._record_indirect(function, given)):
            self._use(function, how)
        self.stack.append(_result(function, given))

    def _record_indirect(self, function: Name, given: Any) -> bool:
        """Record what a function calls; return whether the call itself needs no record."""
        full, first = function.full, given[0] if isinstance(given, tuple) and given else None
        if full in {"copyreg._reconstructor", "copyreg.__newobj__"}:
            self._use(first, "built")
            if full == "copyreg._reconstructor" and given[1:]:
                self._use(given[1], "called")
        elif full in CALLERS:
            if not isinstance(given, tuple):
                self.followed.hidden.append(f"what {full} calls")
            elif isinstance(first, Name) or not full.startswith("numpy."):
                self._use(first, "called")
        elif full == "torch.storage._load_from_bytes" and isinstance(first, bytes):
            if len(first) >= MAX_CONSTANT:
                return False
            self.followed.loaded.append(first)
            return True
        elif full in {"builtins.getattr", "operator.getitem", "_operator.getitem"}:
            return _is_plain_member(full, given)
        return False

    def _use(self, what: Any, how: Use, depth: int = 0) -> None:
        """Record that something is called or built."""
        match what:
            case Name():
                self.followed.use(what, how)
            case Made(by=Name(full="functools.partial")) if depth < _FORKED:
                self._use(_first_of(what.given), "called", depth + 1)
                if what.state is not None:
                    self._use(_first_of(what.state), "called", depth + 1)
            case Reference(key=("module", Name() as kind, *_)) if how == "built":
                self.followed.use(kind, how)
            case Made(by=Name() as maker):
                self.followed.hidden.append(f"a call of what {maker.full} returns")
            case _:
                self.followed.hidden.append("a call of something that is not a name")

    def build(self, state: Any) -> None:
        """Set the attributes of the object on top."""
        self.followed.calls = True
        target = self.top()
        if isinstance(target, Made):
            target.state = state
            if self.arrays and _is_wrapper(target):
                self._read_array(state)
        elif not isinstance(target, dict | str | bytes | tuple | int) and target is not DATA:
            named = target.full if isinstance(target, Name) else "an object that it did not create"
            self.followed.changed.append(named)

    def _read_array(self, state: Any) -> None:
        """Skip the array that joblib stores here, but follow it as other unpicklers would."""
        reader, place = self.reader, self.reader.at
        if reader.frame_end is not None and place < reader.frame_end:
            self.note("an array inside a frame")
        reader.frame_end = None
        size = _array_size(state, reader)
        if size != 0 or reader.at != place:
            self._read_as_opcodes(place, are_opcodes=size is None)
        if size is None:
            steps = self.limit - self.followed.steps
            inner = Machine(reader, self.handlers, steps, arrays=False).run()
            self.followed.take(inner)
            self.followed.steps += inner.steps
            if inner.error:
                raise ValueError(f"an array of objects cannot be read: {inner.error}")
        elif reader.at + size > reader.size:
            raise ValueError(f"an array of {size} bytes reaches past the end")
        else:
            reader.jump(reader.at + size)

    def _read_as_opcodes(self, place: int, *, are_opcodes: bool) -> None:
        """Follow what unpicklers other than joblib's would run where it stores an array.

        Args:
            place: Where they continue.
            are_opcodes: Whether joblib unpickles these bytes as well, on its own stack.
        """
        fork = Machine(
            Reader(self.reader.file, place, self.reader.size),
            self.handlers,
            min(self.limit - self.followed.steps, 1_000_000),
            stack=self.stack[-_FORKED:],
            memo=ChainMap({}, self.memo),
            arrays=False,
        )
        fork.protocol = self.protocol
        other = fork.run()
        self.followed.steps += other.steps
        if are_opcodes:
            for name, how in other.uses.items():
                if "." in name.module or is_dangerous(name.module, name.name):  # not by chance
                    self.followed.use(name, how)
        elif other.calls and (not other.error or other.uses):
            self.followed.take(other)
            self.note("calls where joblib stores an array")


def _looks_pickled(value: str | bytes) -> bool:
    if isinstance(value, str):
        return value[0] == "\x80" or "\n" in value or "\x93" in value
    return value[0] == 0x80 or b"\n" in value or b"\x93" in value


_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
_OF_TYPES = {"numpy.dtype", "_codecs.encode"}
_RETURNED_ARGUMENTS = {
    "torch.jit._pickle.restore_type_tag": 0,
    "numpy.core.multiarray.scalar": 1,
    "numpy._core.multiarray.scalar": 1,
}
"""Functions that return an argument, and its position; NumPy's does so unless it is bytes."""


def _result(function: Any, given: Any) -> Any:
    """Return the result of a call; some functions return one of their arguments."""
    place = _RETURNED_ARGUMENTS.get(function.full) if isinstance(function, Name) else None
    if place is not None and isinstance(given, tuple) and len(given) > place:
        back = given[place]
        return back if isinstance(back, Name | Made) else Made(function, given)
    return Made(function, given)


def _is_wrapper(target: Made) -> bool:
    """Return whether an object is joblib's wrapper of an array, however it is built."""
    named = (target.by, _first_of(target.given))
    return any(isinstance(one, Name) and one.full == _WRAPPER for one in named)


def _first_of(values: Any) -> Any:
    return values[0] if isinstance(values, tuple) and values else UNKNOWN


def _is_plain_member(full: str, given: Any) -> bool:
    """Return whether a call gets an enumeration member by name or subscripts a typing type."""
    match given:
        case (Name() as owner, str(key)) if full == "builtins.getattr":
            return owner.full in ENUMS and key.isidentifier() and key.isupper()
        case (Name() as owner, _) if full != "builtins.getattr":
            return owner.module == "typing" and "." not in owner.name
    return False


def _array_size(state: Any, reader: Reader) -> int | None:
    """Return the bytes of the array that joblib's wrapper describes; None if it is a pickle.

    The padding before it is skipped.

    Raises:
        ValueError: If they cannot be determined.
    """
    match state:
        case {
            "shape": tuple(shape),
            "dtype": Made(by=Name(full="numpy.dtype"), given=(str(code), *_)) as kind,
        }:
            if _holds_objects(kind):
                return None
            count = 1
            for extent in shape:
                count *= extent if type(extent) is int and extent >= 0 else -1
            is_plain = all(isinstance(key, str) for key in state) and code[1:].isdecimal()
            item = int(code[1:]) * (4 if code[0] == "U" else 1) if is_plain else -1
            size = count * item if count >= 0 and _keeps_size(kind.state, item) else -1
        case _:
            size = -1
    if size < 0 or code[0] not in "biufcmMSUV":
        raise ValueError("the size of a joblib array cannot be determined")
    if state.get("numpy_array_alignment_bytes") is not None:
        padding = reader.read(1)[0]
        reader.jump(reader.at + padding)
    return size


def _keeps_size(state: Any, size: int) -> bool:
    """Return whether the state of a NumPy dtype keeps the size of an item."""
    if state is None:
        return True
    given = state[5] if isinstance(state, tuple) and len(state) > 5 else None
    return type(given) is int and given in {-1, size}


def _holds_objects(kind: Made) -> bool:
    """Return whether a pickled NumPy dtype is, or has a field of, objects."""
    left: list[Any] = [kind]
    seen: set[int] = set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Made):
            if not (isinstance(value.by, Name) and value.by.full in _OF_TYPES):
                raise ValueError("the type of a joblib array cannot be determined")
            code = _first_of(value.given)
            if not isinstance(code, str) or code.startswith("O"):
                return True
            left.append(value.state)
        elif isinstance(value, dict | tuple):
            left += value.values() if isinstance(value, dict) else value
    return False
