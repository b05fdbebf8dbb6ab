"""What a name that a pickle looks up means: tensors, plain data, or something not to be called."""

from __future__ import annotations

import io
import logging
import re
import sys
from functools import cache

__all__ = ["DATA", "is_dangerous"]

_ARRAYS = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
_KINDS = ("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS = ("float16", "float32", "float64", "longdouble", "complex64", "complex128", "str_")
_TYPES = ("Bool", *(f"{kind}{n}" for kind in ("Int", "UInt") for n in (8, 16, 32, 64)))
_PATHS = ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "PurePath")

DATA = frozenset({
    *(f"builtins.{name}" for name in ("object", "int", "float", "bool", "complex", "str", "bytes")),
    *(f"builtins.{name}" for name in ("bytearray", "tuple", "list", "dict", "set", "frozenset")),
    *(f"builtins.{name}" for name in ("slice", "range", "NoneType", "Ellipsis")),
    *(f"collections.{name}" for name in ("OrderedDict", "Counter", "defaultdict", "deque")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *("argparse.Namespace", "decimal.Decimal", "types.SimpleNamespace", "fractions.Fraction"),
    *("uuid.UUID", "copyreg._reconstructor", "copyreg.__newobj__", "_codecs.encode"),
    *("enum.Enum", "enum.auto"),
    *("numpy.dtype", "numpy.ndarray", *(f"numpy.{name}" for name in (*_KINDS, *_FLOATS))),
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _ARRAYS),
    *(f"numpy.dtypes.{name}DType" for name in (*_TYPES, "Float16", "Float32", "Float64", "Str")),
})  # fmt: skip
"""Plain data types of Python and NumPy: made by a pickle, they compute nothing."""

# Functions of PyTorch and its neighbours that read files, run code or start processes; classes of
# torch.nn and other libraries are none of them.
_DANGEROUS = re.compile(
    r"torch\.(load|save|compile|hub|jit|ops|classes|library|serialization|package|utils|_C|cuda|"
    r"multiprocessing|distributed|_inductor|_dynamo|_functorch|testing|fx|onnx|export|_lobpcg|"
    r"storage\._load_from_bytes|_load_global_deps|from_file|_weights_only_unpickler)\b"
    r"|numpy\.(load|loadtxt|genfromtxt|fromfile|memmap|save|ctypeslib|distutils|f2py|testing|lib|"
    r"DataSource|_core\.memmap|compat)\b(?!\.stride_tricks)"
    r"|pandas\.(read_\w+|eval|io|compat|core\.(computation|eval)\w*)\b"
    r"|(joblib\.(load|dump|memory|parallel|externals)|dill|cloudpickle|mlflow|pip|setuptools|"
    r"pkg_resources|IPython|tensorflow\.(io|saved_model|keras\.models)|keras\.models|transformers\."
    r"(pipeline|pipelines|dynamic_module_utils|trainer)|huggingface_hub|jinja2|yaml|requests|httpx|"
    r"aiohttp|urllib3|paramiko|fabric|sh|pexpect|numba|cffi|numexpr)\b"
)
_DUNDER = re.compile(r"__\w+__")


def is_dangerous(module: str, name: str) -> bool:
    """Whether a pickle that looks this name up can do harm by calling it.

    It can, if the name is of the standard library and no plain data type, of a library's functions
    that read files or run code, reached through another module, or a gadget that picklescan knows.
    """
    full = f"{module}.{name}"
    if full in DATA:
        return False
    is_standard = module.partition(".")[0] in sys.stdlib_module_names
    return (
        is_standard or _walks(name) or bool(_DANGEROUS.match(full)) or _known_gadget(module, name)
    )


def _walks(name: str) -> bool:
    """Whether an attribute leads through a module to another, as ``serialization.os.system``."""
    parts = name.split(".")
    return any(part in sys.stdlib_module_names or _DUNDER.fullmatch(part) for part in parts)


@cache
def _known_gadget(module: str, name: str) -> bool:
    """Whether picklescan calls a name dangerous: the one place that knows this library.

    It gets a pickle of nothing but this name, for its own following of opcodes can be misled.
    """
    from picklescan.scanner import SafetyLevel, scan_pickle_bytes

    data = f"c{module}\n{name}\n.".encode("utf-8", "surrogatepass")
    log = logging.getLogger("picklescan")
    level, log.disabled = log.disabled, True
    try:
        found = scan_pickle_bytes(io.BytesIO(data), "name").globals
    finally:
        log.disabled = level
    return any(one.safety is SafetyLevel.Dangerous for one in found)
