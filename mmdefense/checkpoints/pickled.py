"""Read ``torch.save`` files as data only: tensors, numbers, strings and containers.

No name in the file is imported, and nothing in the file is called: each name becomes a class of our
own, made for this file. Names of tensors, containers and NumPy numbers build those; any other name
builds an inert :class:`Object` that holds what it was given. So the pickled settings and paths that
training scripts store next to the weights do not get in the way. A file that names what can do
harm, such as ``os.system``, is refused, though it would not be called.

References:
    ``torch.serialization.safe_globals`` for the same idea with real classes; the layout of the two
    formats is that of ``torch.serialization`` of PyTorch 2.
"""

from __future__ import annotations

import _compat_pickle
import codecs
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from mmdefense.checkpoints.faults import MAX_AXES, is_zip
from mmdefense.checkpoints.names import DATA, is_dangerous
from mmdefense.errors import BadInputError, MMDefenseError, UnsupportedError, one_line, printable

__all__ = ["Array", "Object", "read_pickled"]

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before PyTorch 1.6
_SPREAD, _SMALL = 16, 1 << 20
"""Limits on a tensor that repeats values: a multiple of what is stored, or this many. Our
choice."""
_NUMBERS = re.compile(r"[biufcUS]\d{1,6}")
_DTYPES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16},
    **{"BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16},
    **{"Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8},
    **{"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_OF_TENSORS = ("torch.device", "torch._utils._rebuild_", "torch.serialization._get_layout")
_STORAGE = re.compile(rf"torch\.(?:cuda\.|storage\.)?({'|'.join(_DTYPES)})Storage")


class Object:
    """An object that is not read: its name and content, without any behaviour.

    Attributes:
        name: Module and name that the file gives.
        items: What it holds by key, where it is a kind of mapping.
        values: What it holds in order, where it is a kind of list or set.
        state: Its attributes, or what its own class would have made of itself.
    """

    def __init__(self, name: str, given: tuple[Any, ...] = ()) -> None:
        self.name, self.given = name, given
        self.items: dict[Any, Any] = {}
        self.values: list[Any] = []
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        """Add a value, as the unpickler does for lists."""
        self.values.append(value)

    def add(self, value: Any) -> None:
        """Add a value, as the unpickler does for sets."""
        self.values.append(value)


class _Type(Object):
    """NumPy's type of an element."""

    def __init__(self, code: Any, *_: Any) -> None:
        super().__init__("numpy.dtype")
        self.code = code

    def dtype(self) -> np.dtype[Any] | None:
        """Return the type, none where it is not of plain numbers or texts."""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "="
        plain = isinstance(self.code, str) and _NUMBERS.fullmatch(self.code)
        return np.dtype(order + self.code) if plain and order in {"<", ">", "=", "|"} else None


class Array(Object):
    """A NumPy array."""

    def __init__(self, *_: Any) -> None:
        super().__init__("numpy.ndarray")

    def value(self) -> np.ndarray[Any, Any] | None:
        """Return the array; none where it holds objects, or its bytes do not fit its shape."""
        match self.state:
            case (_, tuple(shape), _Type() as kind, fortran, bytes() | bytearray() as data):
                dtype = kind.dtype()
                if dtype is None or math.prod(shape) * dtype.itemsize != len(data):
                    return None
                return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        return None


def _scalar(kind: Any, data: Any = b"") -> Any:
    dtype = kind.dtype() if isinstance(kind, _Type) else None
    if dtype is None or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        return Object("numpy.generic", (kind, data))
    return np.frombuffer(data, dtype)[0].item()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.state = (1, shape, kind, order == "F", data)
    return array


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if codecs.lookup("latin1").name != str(encoding).replace("latin1", "iso8859-1"):
        raise ValueError(f"bytes in the encoding {encoding!r:.40}")
    return text.encode("latin1")


class _Storage:
    """The bytes of a tensor, or of several.

    Attributes:
        content: ``(B,)`` of uint8.
        dtype: Of its elements, as far as the file says.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.content, self.dtype = torch.empty(size, dtype=torch.uint8), dtype

    def read_from(self, file: IO[bytes]) -> None:
        """Fill it from where a file stands."""
        view = memoryview(self.content.numpy().data)
        while len(view):
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError("a tensor is cut off")
            view = view[count:]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    """Return a tensor over a storage, after checking that it fits."""
    dtype = more[2] if len(more) > 2 and isinstance(more[2], torch.dtype) else storage.dtype
    places = [offset, *size, *stride]
    if not all(type(n) is int and n >= 0 for n in places) or len(size) != len(stride):
        raise ValueError(f"a tensor of shape {size!r:.60} and strides {stride!r:.60}")
    held, values = len(storage.content) // dtype.itemsize, math.prod(size)
    if len(size) > MAX_AXES or values > max(_SPREAD * held, _SMALL):
        raise ValueError(
            f"a tensor claims {len(size)} axes and {values} values, but the file has {held}"
        )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > len(storage.content):
        raise ValueError(
            f"a tensor of shape {tuple(size)} exceeds its storage of {len(storage.content)} bytes"
        )
    found = torch.empty(0, dtype=dtype)
    return found.set_(storage.content.untyped_storage(), offset, tuple(size), tuple(stride))


class _Mapping(dict[Any, Any]):
    """A dict subclass, without the attributes that the file gives it."""

    def __setstate__(self, state: Any) -> None:
        pass


def _listed(values: Any = (), *_: Any) -> list[Any]:
    return list(values)


_MAKERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Mapping,
    "collections.Counter": _Mapping,
    "collections.defaultdict": lambda *_: _Mapping(),
    "collections.deque": _listed,
    **{f"builtins.{kind.__name__}": kind for kind in (list, set, frozenset, tuple, complex)},
    "builtins.dict": _Mapping,
    "torch.Size": lambda values=(): torch.Size(values),
    "_codecs.encode": _encoded,
    "numpy.dtype": _Type,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda value, *_: value,
    "torch._utils._rebuild_parameter_with_state": lambda value, *_: value,
    "torch._tensor._rebuild_from_type_v2": lambda make, _, given, *__: make(*given),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda value, *_: value,
    "torch.nn.parameter.Parameter": lambda value, *_: value,
}


def _class_for(make: Callable[..., Any]) -> type:
    """Return a new class, since the unpickler may set attributes of it, that makes something."""
    return type("Named", (), {"__new__": lambda _, *given, **named: make(*given, **named)})


class _Refused(Exception):  # noqa: N818  # becomes the error of the file that it is raised for
    """A name that must not be looked up."""


class _Unpickler(pickle.Unpickler):
    """Builds data and inert objects."""

    def __init__(self, file: IO[bytes], storage: Callable[..., Any] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self.storage = storage
        self.passed_by: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Return our stand-in for a name; nothing is imported."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in _MAKERS:
            return _class_for(_MAKERS[full])
        if stored := _STORAGE.fullmatch(full):
            return _DTYPES[stored[1]]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if not full.startswith(_OF_TENSORS) and is_dangerous(module, name):
            raise _Refused(full)
        if full not in DATA and not full.startswith(_OF_TENSORS):
            self.passed_by.add(full)
        return _class_for(lambda *given, **_: Object(full, given))

    def persistent_load(self, key: Any) -> Any:
        """Return the storage that a tensor names."""
        match key:
            case ("storage", torch.dtype() as dtype, name, _, int(count), *_) if count >= 0:
                if self.storage is not None:
                    return self.storage(str(name), dtype, count)
            case ("module", kind, *_):  # a class with its source, before PyTorch 1.6
                return kind
        raise ValueError(f"a reference to {key!r:.60}")


class _Measured:
    """A file that refuses reads beyond its end."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.tell, self.readline = file, size, file.tell, file.readline

    def read(self, count: int) -> bytes:
        """Return so many bytes.

        Raises:
            ValueError: If there are less.
        """
        left = self.size - self.tell()
        if count > left:
            raise ValueError(f"an item of the pickle claims {count} bytes, but only {left} follow")
        return self.file.read(count)


def _unpickled(unpickler: _Unpickler, file: IO[bytes], size: int) -> Any:
    """Return what the next pickle of a file holds.

    Its opcodes are read first: the unpickler allocates what an opcode claims, whether or not it is
    there.

    Raises:
        ValueError: If one claims more than the file can hold.
    """
    start = file.tell()
    steps = enumerate(pickletools.genops(cast(IO[bytes], _Measured(file, size))), start=1)
    for count, (opcode, argument, _) in steps:
        if opcode.name in _PUTS and not 0 <= int(argument or 0) <= count:
            raise ValueError(f"the pickle claims {argument} memo entries after {count} steps")
    file.seek(start)
    return unpickler.load()


def read_pickled(path: Path) -> tuple[Any, list[str]]:
    """Return what a PyTorch file holds, as data, and the classes whose objects were not read.

    Raises:
        BadInputError: If it is damaged, no PyTorch file, or names what can do harm.
        UnsupportedError: If it is a program (TorchScript, ``torch.export``), or of another machine.
    """
    try:
        with path.open("rb") as file:
            return _from_zip(path, file) if is_zip(file) else _from_legacy(path, file)
    except MMDefenseError:
        raise
    except _Refused as error:
        raise BadInputError(
            f"model {path} was refused and nothing in it executed: loading it would run "
            f"{printable(str(error))}; it must hold tensors and plain data only, as safetensors "
            "or torch.save(model.state_dict(), ...) write them"
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise BadInputError(
            f"model file {path} cannot be read: {printable(one_line(error))}; it is damaged, or "
            "was not written by torch.save"
        ) from error


def _from_zip(path: Path, file: IO[bytes]) -> tuple[Any, list[str]]:
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        pickles = [name for name in names if name.split("/", 1)[-1] == "data.pkl"]
        _check_no_program(path, names)
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} entries data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UnsupportedError(
                f"{path} was written on a big-endian machine; save it again as safetensors there"
            )
        kept: dict[str, _Storage] = {}

        def storage(name: str, dtype: torch.dtype, count: int) -> _Storage:
            if name not in kept:
                entry = archive.getinfo(f"{root}data/{name}")
                kept[name] = _Storage(entry.file_size, dtype)
                with archive.open(entry) as stream:
                    kept[name].read_from(stream)
            return kept[name]

        with archive.open(pickles[0]) as stream:
            unpickler = _Unpickler(stream, storage)
            held = _unpickled(unpickler, stream, archive.getinfo(pickles[0]).file_size)
    return held, sorted(unpickler.passed_by)


def _check_no_program(path: Path, names: set[str]) -> None:
    """Refuse an archive of a program, and say how to extract its weights.

    Raises:
        UnsupportedError: If it is one.
    """
    parts = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in parts or any(part.startswith("code/") for part in parts):
        raise UnsupportedError(
            f"{path} is TorchScript, a program with weights, and a model's code is never run "
            "here; if you trust it, extract its weights in Python: "
            "safetensors.torch.save_file(torch.jit.load(FILE).state_dict(), "
            "'model.safetensors'), and give that file with --arch module:callable"
        )
    if any(part.startswith("models/") for part in parts) or "archive_format" in parts:
        raise UnsupportedError(
            f"{path} is a torch.export program, and a model's code is never run here; if you "
            "trust it, extract its weights in Python: "
            "safetensors.torch.save_file(dict(torch.export.load(FILE).state_dict), "
            "'model.safetensors'), and give that file with --arch module:callable"
        )


def _from_legacy(path: Path, file: IO[bytes]) -> tuple[Any, list[str]]:
    """Read the format before PyTorch 1.6: consecutive pickles, then the raw storages."""
    limit, kept = path.stat().st_size, dict[str, _Storage]()
    file.seek(0)
    if _unpickled(_Unpickler(file), file, limit) != _MAGIC:
        raise ValueError("its first object is not PyTorch's magic number")
    _unpickled(_Unpickler(file), file, limit)  # the protocol
    machine = _unpickled(_Unpickler(file), file, limit)
    if isinstance(machine, dict) and not machine.get("little_endian", True):
        raise UnsupportedError(
            f"{path} was written on a big-endian machine; save it again as safetensors there"
        )

    def storage(name: str, dtype: torch.dtype, count: int) -> _Storage:
        if name not in kept:
            if count * dtype.itemsize > limit:
                raise ValueError(
                    f"a tensor claims {count * dtype.itemsize} bytes, but the limit is {limit}"
                )
            kept[name] = _Storage(count * dtype.itemsize, dtype)
        return kept[name]

    unpickler = _Unpickler(file, storage)
    held = _unpickled(unpickler, file, limit)
    for name in _unpickled(_Unpickler(file), file, limit):
        (count,) = struct.unpack("<q", file.read(8))
        found = kept[str(name)]
        if count * found.dtype.itemsize != len(found.content):
            raise ValueError("the length of a tensor differs from what it claims")
        found.read_from(file)
    return held, sorted(unpickler.passed_by)
