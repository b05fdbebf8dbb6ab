"""Classify the names that a pickle looks up: tensors, plain data, or not to be called.

One list for the checkpoint reader and for the scan. A name is harmless only if it is listed here,
and only for its listed use. *Called* with anything that a pickle of harmless names can make, those
of :data:`DATA` and of PyTorch's weights-only unpickler make objects and nothing else: no file, no
import, no process, no code from the file. Of the classes of :func:`built_level`, instances are only
*built*, as pickles do that run no constructor: their attributes are set, and that is all.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from functools import cache
from typing import Literal

__all__ = [
    "CALLERS",
    "DATA",
    "DIRECT",
    "ENUMS",
    "MATHS",
    "allowed_by_torch",
    "built_level",
    "is_dangerous",
]

_ARRAYS = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
_RANDOM = ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor")
_KINDS = ("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS = ("float16", "float32", "float64", "longdouble", "complex64", "complex128", "str_")
_TYPES = ("Bool", *(f"{kind}{n}" for kind in ("Int", "UInt") for n in (8, 16, 32, 64)))
_GENERATORS = (("mt19937", "MT19937"), ("pcg64", "PCG64"), ("philox", "Philox"), ("sfc64", "SFC64"))
_LOSSES = ("HalfSquaredError", "AbsoluteError", "PinballLoss", "HuberLoss", "HalfPoissonLoss",
           "HalfGammaLoss", "HalfTweedieLoss", "HalfTweedieLossIdentity", "HalfBinomialLoss",
           "HalfMultinomialLoss", "ExponentialLoss")  # fmt: skip
_SGD = ("Hinge", "SquaredHinge", "ModifiedHuber", "Log", "SquaredLoss", "Huber",
        "EpsilonInsensitive", "SquaredEpsilonInsensitive")  # fmt: skip
_MAKERS = ("metrics._dist_metrics", "neighbors._kd_tree", "neighbors._ball_tree")
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
    *("enum.Enum", "enum.auto", "re._compile", "functools.partial", "typing.Any"),
    *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "tensor", "double", "bool")),
    *("torch.serialization._get_layout", "torch.jit._pickle.restore_type_tag"),
    *(f"numpy.random._pickle.{name}" for name in _RANDOM),
    *(f"numpy.random._{kind}.{name}" for kind, name in _GENERATORS),
    *(f"numpy.random.bit_generator.{n}SeedSequence" for n in ("", "__pyx_unpickle_")),
    *("sklearn.tree._tree.Tree", "sklearn.utils._bunch.Bunch"),
    *(f"sklearn._loss._loss.Cy{name}" for name in _LOSSES),
    *(f"sklearn.linear_model._sgd_fast.{name}" for name in _SGD),
    *(f"sklearn.{module}.newObj" for module in _MAKERS),
    *("numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray", "numpy.ma.core._mareconstruct"),
    *("numpy.dtype", "numpy.ndarray", *(f"numpy.{name}" for name in (*_KINDS, *_FLOATS))),
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _ARRAYS),
    *(f"numpy.dtypes.{name}DType" for name in (*_TYPES, "Float16", "Float32", "Float64", "Str")),
})  # fmt: skip
"""Plain data types of Python and NumPy: a pickle that builds them computes nothing.

``functools.partial`` is as harmless as what it wraps, which is checked where it is called.
"""

MATHS = frozenset({
    *(f"torch.nn.functional.{name}" for name in (
        "relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "mish", "hardswish",
        "hardsigmoid", "hardtanh", "softmax", "log_softmax", "softplus", "logsigmoid", "sigmoid",
        "tanh", "glu", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss",
        "huber_loss", "kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits",
        "normalize", "cosine_similarity", "pairwise_distance", "max_pool2d", "avg_pool2d")),
    *(f"torch._C._nn.{name}" for name in (
        "gelu", "silu", "elu", "leaky_relu", "hardtanh", "softplus", "log_sigmoid", "avg_pool2d")),
    *(f"numpy.{name}" for name in (
        "log", "log1p", "log2", "log10", "exp", "expm1", "sqrt", "cbrt", "square", "absolute",
        "sign", "sin", "cos", "tanh", "mean", "median", "nanmean", "sum", "maximum", "minimum")),
    *(f"sklearn.feature_selection._univariate_selection.{name}" for name in (
        "f_classif", "f_regression", "chi2")),
    *("torchvision.ops.boxes.box_iou", "torchvision.ops.misc.interpolate"),
})  # fmt: skip
"""Functions of numbers only, which models keep as activations, losses and scores: harmless if a
pickle holds them, and never called by a saved pickle."""

CALLERS = frozenset({
    *("torch._tensor._rebuild_from_type_v2", "copyreg._reconstructor"),
    *(f"numpy.random._pickle.{name}" for name in _RANDOM),
})  # fmt: skip
"""Of the harmless functions, those that call what they are given."""

DIRECT = CALLERS - {"numpy.random._pickle.__bit_generator_ctor"} | {
    *("builtins.getattr", "operator.getitem", "_operator.getitem", "copyreg.__newobj__"),
    *("torch.storage._load_from_bytes", "torch.jit._pickle.restore_type_tag"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *(f"sklearn.{module}.newObj" for module in _MAKERS),
}
"""Functions whose arguments decide what they do, so they are harmless only if the pickle calls them
itself: whatever they are passed to calls them with unchecked arguments.
"""

ENUMS = frozenset({
    *("transformers.trainer_utils." + name for name in (
        "IntervalStrategy", "SchedulerType", "HubStrategy", "SaveStrategy", "EvaluationStrategy",
        "FSDPOption")),
    *("transformers.training_args." + name for name in ("OptimizerNames", "ParallelMode")),
    *("transformers.debug_utils.DebugOption", "transformers.utils.generic.ExplicitEnum"),
    *("accelerate.utils.dataclasses." + name for name in (
        "DistributedType", "SageMakerDistributedType", "PrecisionType", "RNGType", "LoggerType",
        "DynamoBackend", "CustomDtype")),
    *("peft.utils.peft_types." + name for name in ("PeftType", "TaskType")),
    *(f"{root}.trainer.states.{name}" for root in ("lightning.pytorch", "pytorch_lightning")
      for name in ("TrainerFn", "TrainerStatus", "RunningStage")),
    *("torchvision.transforms.functional.InterpolationMode", "PIL.Image.Resampling"),
    "timm.layers.format.Format",
})  # fmt: skip
"""Enumerations, whose members are created by value or looked up by name."""

_SETTINGS = re.compile(
    r"omegaconf\.(dictconfig|listconfig|base|nodes|basecontainer)\.\w+"
    r"|transformers\.(training_args\w*|trainer_pt_utils|trainer_utils|configuration_utils|"
    r"generation\.configuration_utils|models\.\w+\.(configuration|tokenization|image_processing)"
    r"\w*)\.\w+"
    r"|(accelerate|peft)\.(state|utils|tuners|config|mapping)(\.\w+)*\.\w+"
    r"|(pytorch_lightning|lightning\.pytorch|lightning\.fabric|lightning_fabric|"
    r"lightning_utilities)\.(callbacks|utilities|trainer|loops|core)(\.\w+)*\.\w+"
    r"|(yacs\.config|fvcore\.common\.config|detectron2\.config\.config)\.CfgNode"
    r"|(addict\.addict\.Dict|easydict\.EasyDict|ml_collections\.config_dict\.\w+\.ConfigDict)"
    r"|mm(engine|cv)\.(config\.config\.ConfigDict|logging\.history_buffer\.HistoryBuffer)"
    r"|diffusers\.configuration_utils\.FrozenDict|fairseq\.data\.dictionary\.Dictionary"
    r"|torch\.(optim|amp|torch_version|utils\.data)(\.\w+)*\.\w+"
)
_MODULES = re.compile(
    r"torch\.nn\.(modules|parameter|utils)(\.\w+)*\.\w+"
    r"|torchvision\.(models|ops|transforms)(\.\w+)*\.\w+|timm\.(models|layers|data)(\.\w+)*\.\w+"
    r"|transformers\.(models(\.\w+)*|modeling_utils|activations|pytorch_utils)\.\w+"
    r"|(peft|torchmetrics|diffusers|ultralytics\.nn|segmentation_models_pytorch)(\.\w+)*\.\w+"
    r"|(sklearn|xgboost|lightgbm|catboost|scipy\.sparse|pandas\.core)(\.\w+)*\.\w+"
    r"|joblib\.numpy_pickle\.NumpyArrayWrapper"
)
_CLASS = re.compile(r"_?[A-Z]\w*|(csr|csc|coo)_(matrix|array)", re.ASCII)

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


def built_level(module: str, name: str) -> Literal["low", "medium"] | None:
    """Return the level of an object of a known library's class whose attributes alone are set.

    Low for settings and the states of trainers, medium for modules and estimators, whose methods
    will run on what the file put into them; none for what is no class of these libraries.
    """
    if not _CLASS.fullmatch(name):
        return None
    full = f"{module}.{name}"
    return "low" if _SETTINGS.fullmatch(full) else "medium" if _MODULES.fullmatch(full) else None


@cache
def allowed_by_torch() -> frozenset[str]:
    """Return the names that ``torch.load(weights_only=True)`` accepts with nothing added."""
    from torch import _weights_only_unpickler

    return frozenset(_weights_only_unpickler._get_allowed_globals())


def is_dangerous(module: str, name: str) -> bool:
    """Whether a pickle that looks this name up can do harm by calling it.

    It can, if the name is of the standard library and no plain data type, of a library's functions
    that read files or run code, reached through another module, or a gadget that picklescan knows.
    """
    full = f"{module}.{name}"
    if full in DATA or full in MATHS:
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

    It gets a pickle of only this name, since its own opcode tracing can be misled.
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
