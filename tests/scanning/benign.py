"""What training, saving and sharing models really leaves behind: no scan may call it high."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import functools
import gzip
import io
import json
import pathlib
import pickle
import random
import re
import struct
import tarfile
import types
import typing
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import sklearn.ensemble
import sklearn.feature_selection
import sklearn.linear_model
import sklearn.neighbors
import sklearn.pipeline
import sklearn.preprocessing
import sklearn.svm
import timm.layers
import torch
from safetensors.torch import save_file

LEGACY = {"_use_new_zipfile_serialization": False}


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())


def saved(make: Callable[[], object], **how):
    return lambda path: torch.save(make(), path, **how)


def pickled(make: Callable[[], object], protocol: int | None = None):
    return lambda path: path.write_bytes(pickle.dumps(make(), protocol))


def dumped(make: Callable[[], object], **how):
    return lambda path: joblib.dump(make(), path, **how)


def written(make: Callable[[], bytes]):
    return lambda path: path.write_bytes(make())


def optimizer(kind=torch.optim.AdamW) -> torch.optim.Optimizer:
    model = net()
    made = kind(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made


def checkpoint() -> dict:
    """Return what a training script keeps, settings and random states included."""
    made = optimizer()
    return {
        "model": net().state_dict(), "optimizer": made.state_dict(), "epoch": 3, "best": None,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(made, 10).state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("out"), layers=[1, 2]),
        "metrics": {"accuracy": np.float64(0.5), "loss": np.float32(1.5), "n": np.int64(3)},
        "rng": (torch.get_rng_state(), np.random.get_state(), random.getstate()),
        "when": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), "id": uuid.UUID(int=5),
    }  # fmt: skip


def lightning() -> dict:
    """Return the keys of a checkpoint of Lightning's."""
    return {
        "epoch": 2, "global_step": 80, "pytorch-lightning_version": "2.2.1",
        "state_dict": {f"model.{name}": value for name, value in net().state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [optimizer().state_dict()], "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": collections.OrderedDict(lr=0.1, layers=[1]),
    }  # fmt: skip


def named(*names: tuple[str, str], protocol: int = 2) -> bytes:
    """Return a pickle of instances of classes that need not be installed, with attributes."""
    parts = [f"c{module}\n{name}\n".encode() + b")\x81}X\x01\x00\x00\x00aK\x01sb"
             for module, name in names]  # fmt: skip
    return b"\x80" + bytes([protocol]) + b"(" + b"".join(parts) + b"l."


def old_lightning() -> bytes:
    """Return a class as a key, as the callbacks of early versions of Lightning have it."""
    return b"\x80\x02}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}s."


def training_arguments() -> object:
    import transformers

    return transformers.TrainingArguments(output_dir="out", report_to=[], use_cpu=True)


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def traced(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def python_2() -> bytes:
    """Return a dict as Python 2 pickled it, with names of its own and an array."""
    return (
        b"\x80\x02}q\x01(U\x05labelq\x02]q\x03(K\x01K\x02eU\x04dataq\x04"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85q\x07U\x01b"
        b"q\x08\x87q\tRq\n(K\x01K\x02\x85q\x0bcnumpy\ndtype\nq\x0cU\x02u1q\rK\x00K\x01\x87q\x0e"
        b"Rq\x0f(K\x03U\x01|q\x10NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x11b\x89U\x02\xff\xfeq\x12"
        b"tq\x13bc__builtin__\nset\nq\x14]q\x15\x85q\x16Rq\x17Nu."
    )


def python_3_13() -> bytes:
    return b"\x80\x04\x8c\x0epathlib._local\x8c\tPosixPath\x93\x8c\x01a\x8c\x01b\x86R."


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("data.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def gguf() -> bytes:
    key = b"general.architecture"
    head = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key
    return head + struct.pack("<IQ", 8, 5) + b"llama" + bytes(100)


def tokenizer(path: Path) -> None:
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(path))


def adapter(folder: Path) -> None:
    import peft
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), peft.LoraConfig(r=2))
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "adapter_model.bin")


def estimators() -> list:
    points, labels = np.random.default_rng(0).random((20, 3)), np.arange(20) % 2
    made = [
        sklearn.linear_model.LogisticRegression(), sklearn.svm.SVC(),
        sklearn.ensemble.RandomForestClassifier(3, random_state=0),
        sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(),
                                       sklearn.linear_model.Ridge()),
    ]  # fmt: skip
    return [one.fit(points, labels) for one in made]


def more_estimators() -> list:
    """Return estimators that keep losses, trees, functions and generators of random numbers."""
    points, labels = np.random.default_rng(0).random((20, 3)), np.arange(20) % 2
    made = [
        sklearn.ensemble.GradientBoostingClassifier(n_estimators=2, random_state=0),
        sklearn.ensemble.HistGradientBoostingClassifier(max_iter=2),
        sklearn.neighbors.KNeighborsClassifier(algorithm="kd_tree"),
        sklearn.linear_model.SGDClassifier(),
        sklearn.preprocessing.FunctionTransformer(np.log1p),
        sklearn.feature_selection.SelectKBest(k=1),
    ]
    return [one.fit(points, labels) for one in made]


def boosted() -> object:
    return more_estimators()[0]


def with_activations() -> torch.nn.Module:
    """Return a model that holds functions, as those of Transformers do, and timm's enumeration."""
    model = torch.nn.TransformerEncoderLayer(8, 2, 8)
    model.other, model.form = torch.nn.functional.gelu, timm.layers.Format.NHWC
    return model


def whole_model() -> torch.nn.Module:
    model = net()
    model.norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    return model


SCALARS = [np.float32(1), np.float64(2), np.int64(3), np.bool_(True), np.str_("a"), np.complex64(1)]
RANDOM = np.random.default_rng(0)
TYPES = [typing.Any, typing.Optional]
STRUCTURED = np.zeros(3, [("a", "<f4"), ("b", "<i8", (2,))])
CONTAINERS = [
    collections.Counter("aab"), collections.defaultdict(list, a=[1]), {1, 2}, slice(1, 2),
    collections.deque([1]), frozenset({3}), decimal.Decimal("1.5"), bytearray(b"a"), range(3), 1j,
    types.SimpleNamespace(a=1), datetime.timedelta(1),
]  # fmt: skip
OMEGACONF = [("omegaconf.dictconfig", "DictConfig"), ("omegaconf.base", "ContainerMetadata"),
             ("omegaconf.nodes", "AnyNode"), ("omegaconf.base", "Metadata"),
             ("omegaconf.listconfig", "ListConfig")]  # fmt: skip
SETTINGS = [("yacs.config", "CfgNode"), ("easydict", "EasyDict"), ("addict.addict", "Dict"),
            ("mmengine.config.config", "ConfigDict"),
            ("mmengine.logging.history_buffer", "HistoryBuffer"),
            ("lightning.fabric.utilities.data", "AttributeDict"),
            ("pytorch_lightning.utilities.parsing", "AttributeDict"),
            ("peft.tuners.lora.config", "LoraConfig")]  # fmt: skip

# fmt: off
BENIGN: dict[str, Callable[[Path], object]] = {
    "zip.pt": saved(lambda: net().state_dict()),
    "legacy.pth": saved(lambda: net().state_dict(), **LEGACY),
    "protocol 4.pt": saved(lambda: net().state_dict(), pickle_protocol=4),
    "bfloat16.bin": saved(lambda: net().bfloat16().state_dict()),
    "parameters.pt": saved(lambda: dict(net().named_parameters())),
    "sparse.pt": saved(lambda: torch.eye(3).to_sparse()),
    "quantised.pt": saved(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    "checkpoint.ckpt": saved(checkpoint),
    "checkpoint of old.ckpt": saved(checkpoint, **LEGACY),
    "lightning.ckpt": saved(lightning),
    "lightning of old.ckpt": written(old_lightning),
    "adamw.pt": saved(lambda: optimizer().state_dict()),
    "sgd.pt": saved(lambda: optimizer(torch.optim.SGD).state_dict()),
    "whole optimizer.pt": saved(optimizer),
    "whole model.pt": saved(whole_model),
    "whole model with functions.pt": saved(with_activations),
    "whole model of old.pth": saved(whole_model, **LEGACY),
    "dtype and size.pt": saved(lambda: [torch.float16, torch.Size([2]), torch.device("cpu")]),
    "training_args.bin": saved(training_arguments),
    "training_args.pkl": pickled(training_arguments),
    "torchscript.pt": script,
    "traced.pt": traced,
    "exported.pt2": exported,
    "plain tensors.pkl": pickled(lambda: {"a": torch.ones(3), "b": net().state_dict()}),
    "numpy.npy": lambda path: np.save(path, np.zeros((3, 4))),
    "structured.npy": lambda path: np.save(path, STRUCTURED),
    "dates.npy": lambda path: np.save(path, np.array(["2024-01-01"], "datetime64[D]")),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(np.ones((2, 3), ">i4"))),
    "array of texts.npy": lambda path: np.save(path, np.array(["a", "bc"])),
    "array of lists.npy": lambda path: np.save(path, np.array([[1], None], object)),
    "zeros.npz": lambda path: np.savez(path, a=np.zeros(100_000), A=np.arange(3)),
    "packed zeros.npz": lambda path: np.savez_compressed(path, a=np.zeros(100_000)),
    "zeros.gz": written(lambda: gzip.compress(bytes(100_000))),
    "zeros.pkl.gz": written(lambda: gzip.compress(pickle.dumps(np.zeros(10_000)))),
    "zeros.bin": written(lambda: bytes(100_000)),
    "numbers.bin": written(lambda: np.arange(1000, dtype="<f4").tobytes()),
    "scalars.pkl": pickled(lambda: SCALARS),
    "scalars of old.pkl": pickled(lambda: SCALARS, 0),
    "generator.pkl": pickled(lambda: [RANDOM, np.random.RandomState(0)]),
    "python 2.pkl": written(python_2),
    "path of python 3.13.pkl": written(python_3_13),
    "path.pkl": pickled(lambda: [pathlib.PurePosixPath("a/b"), pathlib.Path("c")]),
    "partial.pkl": pickled(lambda: functools.partial(torch.nn.Linear, 3, bias=False)),
    "partial of data.pkl": pickled(lambda: functools.partial(collections.OrderedDict, [(1, 2)])),
    "regex.pkl": pickled(lambda: re.compile(r"\w+ (?P<a>.)", re.IGNORECASE)),
    "types.pkl": pickled(lambda: TYPES[:1]),
    "containers.pkl": pickled(lambda: CONTAINERS),
    "omegaconf.ckpt": written(lambda: named(*OMEGACONF)),
    "settings.pkl": written(lambda: named(*SETTINGS)),
    "long integers and floats.pkl": pickled(lambda: [1 << 500, -(1 << 70), 1e300, True, "é\n"], 0),
    "many pickles.pkl": written(lambda: b"".join(pickle.dumps(i) for i in range(50))),
    "words.pkl": pickled(lambda: {f"word{i} system os eval" * 3: i for i in range(500)}),
    "base64.pkl": pickled(lambda: {"id": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=" * 9}),
    "joblib.joblib": dumped(lambda: {"a": np.arange(99.0), "b": np.zeros(0), "c": STRUCTURED}),
    "joblib of lists.joblib": dumped(lambda: [np.array([[1], None], object), np.ones(3), "x"]),
    "joblib packed.joblib": dumped(lambda: [np.arange(99.0)], compress=3),
    "joblib lzma.joblib": dumped(lambda: [np.arange(99.0)], compress=("lzma", 3)),
    "estimators.joblib": dumped(estimators),
    "estimators.pkl": pickled(estimators),
    "more estimators.pkl": pickled(more_estimators),
    "boosted.joblib": dumped(boosted),
    "more estimators.joblib": dumped(more_estimators, compress=3),
    "model.safetensors": lambda path: save_file(net().state_dict(), path),
    "model.gguf": written(gguf),
    "model.onnx": written(lambda: b"\x08\x08\x12\x07pytorch\x1a\x032.0:\x0f\n" + bytes(50)),
    "model.h5": written(lambda: b"\x89HDF\r\n\x1a\n" + bytes(200)),
    "model.tflite": written(lambda: b"\x1c\0\0\0TFL3" + bytes(100)),
    "spiece.model": written(lambda: b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" * 20),
    "vocab.txt": written(lambda: b"[PAD]\ncat\nos\nsystem\nR.\n(lp0\n"),
    "merges.txt": written(lambda: b"#version: 0.2\ni n\nc at\nt he\n"),
    "import.py": written(lambda: b"import os\nimport sys\nprint(os.name)\n"),
    "data.tar.gz": written(lambda: tar_of(b"cat\nos\n" * 100)),
    "data.zip": written(lambda: zipped(**{"a/b.txt": b"x" * 50, "a/c.csv": b"1,2\n"})),
    "config.json": written(lambda: json.dumps({"model_type": "vit", "layers": 3}).encode()),
    "tokenizer.json": tokenizer,
    "adapter": adapter,
}
# fmt: on
