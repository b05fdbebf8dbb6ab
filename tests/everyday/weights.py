"""Checkpoints as training scripts, trainers and exporters leave them, and triggers that work."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import io
import os
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from commands import Net
from everyday.rows import Command, Refused, Row
from torch import nn

from mmdefense.checkpoints.models import load_model, save_model
from mmdefense.scanning.files import scan_files

ARCH = "commands:Net"


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def state(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in net(seed).state_dict().items()}


def able() -> dict[str, torch.Tensor]:
    """Return weights that tell the images of ``commands`` by their bright quarter."""
    weights = {key: torch.zeros_like(value) for key, value in net().state_dict().items()}
    weights["conv.weight"][0, 0, 1, 1] = 1.0
    weights["head.weight"][:, :3] = torch.eye(3)
    return weights


class Config(dict):
    """A project's own settings, as yacs and mmcv have them; its module is not there later."""

    def __setstate__(self, given):
        os.mkdir(given["mark"])

    def __reduce__(self):
        return Config, (), {"mark": str(Path("run-by-the-pickle"))}, None, iter(self.items())


def touch(mark):
    os.mkdir(mark)


class Call:
    """Pickles to a call of a project's own function."""

    def __reduce__(self):
        return touch, ("run-by-the-pickle",)


def training(can: bool = False) -> dict[str, object]:
    """Return what a training script keeps beside the weights."""
    return {
        "epoch": np.int64(3),
        "best_acc": np.float64(0.9),
        "state_dict": able() if can else state(),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(4)}}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1, out=Path("/x"), seed=np.int32(1)),
        "losses": np.arange(4.0),
        "when": datetime.datetime(2020, 1, 1),
        "counts": collections.Counter(a=1),
        "by_class": collections.defaultdict(list, a=[1, 2]),
        "size": torch.Size([3, 32, 32]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "rng": np.random.default_rng(0).bit_generator.state,
    }


def loaded(held: object, weights: str | None = None, **how: object):
    """Return a row's reader: which net was read (its seed), and whether anything was run."""

    def read(folder: Path) -> object:
        torch.save(held() if callable(held) else held, folder / "a.pt", **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more = {} if weights is None else {"weights": weights}
            model = load_model(folder / "a.pt", arch=ARCH, **more)
        assert not (folder / "run-by-the-pickle").exists()
        found = model.state_dict()["conv.weight"]
        return [torch.equal(found, net(seed).conv.weight) for seed in (0, 1)].index(True)

    return read


def levels(make):
    """Return a row's reader: the findings of a scan of the files, as level and rule."""

    def read(folder: Path) -> object:
        make(folder / "a")
        found = scan_files(folder)
        return ["; ".join(sorted(f"{f.level} {f.id}" for f in found))]

    return lambda folder: read(folder) == [make.right]


@functools.cache
def program() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())), buffer)
    return buffer.getvalue()


def scripted(path: Path) -> Path:
    path = path.with_suffix(".pt")
    path.write_bytes(program())
    return path


def exported(path: Path) -> Path:
    """Write an archive with the entries that torch.export.save writes; its own takes long."""
    path = path.with_suffix(".pt2")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("archive_format", "byteorder", "models/model.json", "data/weights/weight_0"):
            archive.writestr(f"a/{name}", "{}")
    return path


scripted.right = "medium file-torchscript"
exported.right = "low file-not-looked-into"


def checkpoint(path: Path) -> Path:
    path = path.with_suffix(".pt")
    torch.save(training(can=True), path)
    return path


checkpoint.right = "info pickle-data"


def programs(make):
    return lambda folder: load_model(make(folder / "a"), arch=ARCH)


def backdoorbench(name: str, weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """Return what BackdoorBench writes as attack_result.pt, of the form of its release 2."""
    return {
        "model_name": name,
        "num_classes": 3,
        "model": weights,
        "data_path": "../data",
        "img_size": [32, 32, 3],
        "clean_data": "cifar10",
        "bd_train": {"poison_indicator": np.ones(4), "container": Config(a=1)},
        "bd_test": Call(),
    }


def of_backdoorbench(folder: Path) -> object:
    from mmdefense_tasks.victims import PreActResNet18

    torch.manual_seed(0)
    given = PreActResNet18(3)
    torch.save(backdoorbench("preactresnet18", given.state_dict()), folder / "attack_result.pt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_model(folder / "attack_result.pt")
    assert not (folder / "run-by-the-pickle").exists()
    assert torch.equal(model.linear.weight, given.linear.weight)
    read_with = "--image-size 32 --mean 0.4914,0.4822,0.4465 --std 0.247,0.243,0.261"
    return any(read_with in str(note.message) for note in said)


def written(folder: Path) -> object:
    """Return the keys that are written where a set has more beside the weights."""
    from safetensors.torch import load_file

    torch.save(
        {"state_dict": {**state(0, "model."), "loss.weight": torch.ones(3)}}, folder / "a.pt"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(folder / "a.pt", arch=ARCH, weights="state_dict.model")
        save_model(model, folder / "out", folder / "a.pt", weights="state_dict.model")
    found = sorted(load_file(folder / "out" / "model.safetensors"))
    return found == sorted([*state(0, "model."), "loss.weight"])


def data(folder: Path) -> Path:
    from commands import small_images

    images, labels = small_images()
    np.savez(folder / "data.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return folder / "data.npz"


def measured(make, *more: str):
    return lambda folder: [
        *("evaluate", str(make(folder / "a")), "--arch", ARCH, "--data", str(data(folder))),
        *more,
    ]


def purified(make):
    def arguments(folder: Path) -> list[str]:
        model = make(folder / "a")
        return [
            *("purify", str(model), "--arch", ARCH, "--data", str(data(folder)), "-o", "out"),
            *("--defense", "fine-tuning", "--set", "steps=2", "--max-utility-drop", "1"),
        ]

    return arguments


def ema(path: Path) -> Path:
    path = path.with_suffix(".pt")
    torch.save({"state_dict": state(0), "state_dict_ema": able()}, path)
    return path


def found(*success: float):
    """Return patches towards as many classes, with their success and sizes of equal steps."""
    from mmdefense.kernels.inversion import Recovered
    from mmdefense.protocol import TriggerFamily

    count = len(success)
    return Recovered(
        family=TriggerFamily("patch", (2, 8, 8), budget=0.1),
        targets=torch.arange(count),
        levels=torch.full((count,), 0.9),
        success=torch.tensor(success),
        size=torch.linspace(0.04, 0.09, count),
        accepted=torch.tensor(success) >= 0.9,
        pool=torch.rand(count, 1, 2, 8, 8),
    )


def scanned(_: Path) -> object:
    """Scan a net for which a search finds a trigger that works, among others that nearly do."""
    from commands import small_images

    from mmdefense.findings import ScanRecord
    from mmdefense.registry import adapt
    from mmdefense.runtime.run import Run
    from mmdefense.scanning import behaviour
    from mmdefense.scanning.formats import to_html, to_json

    adapter = adapt(net())
    images, labels = small_images()
    with mock.patch.object(behaviour, "recover", return_value=[found(0.99, 0.8, 0.7)]):
        samples = adapter.samples((images / 255, labels))
        findings = list(behaviour._triggers(adapter, samples, behaviour.SEARCH, Run(0)))
    record = ScanRecord(model="m", findings=findings, parts=["behaviour"])
    (trigger,) = [f for f in findings if f.id == "behaviour-trigger"]
    (picture,) = trigger.pictures.values()
    pictured = picture in to_html(record) and picture in to_json(record)
    return (
        trigger.level == "medium"
        and picture.startswith("data:image/png")
        and pictured
        and "Nothing was found" not in record.verdict.text
    )


def nine_alike(_: Path) -> int:
    """Return how often the text of a scan tells of nine layers of which the same is found."""
    from mmdefense.findings import Rule, ScanRecord
    from mmdefense.scanning.formats import to_text

    rule = Rule(id="r", level="low", measured="m", reference="x", meaning="n", blind_spot="b")
    findings = [rule.found(f"layer{number}", float(number)) for number in range(9)]
    return to_text(ScanRecord(model="m", findings=findings, parts=["weights"])).count("r: ")


def rejected(_: Path) -> object:
    """Return what BAERASER's page calls a trigger that works and was not accepted."""
    from mmdefense.defenses.baeraser import recovered_triggers
    from mmdefense.registry import adapt

    adapter = adapt(net())
    record = found(0.99, 0.5, 0.4)
    record = dataclasses.replace(record, accepted=torch.zeros(3, dtype=torch.bool))
    (grid,) = recovered_triggers(adapter, [record], 0.9).panels()
    return next(row.label for row in grid.rows).startswith("works")


old = functools.partial(loaded, _use_new_zipfile_serialization=False)
both = {"state_dict": state(0), "state_dict_ema": state(1)}
beside = {"state_dict": {**state(0, "model."), "loss.weight": torch.ones(3)}}


def pointer(folder: Path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "net.pth").write_text(text)
    return load_model(folder / "net.pth", arch=ARCH)


def class_that_is_not_there(folder: Path):
    (folder / "nets.py").write_text("from torch import nn\n")
    torch.save(state(), folder / "net.pt")
    return load_model(folder / "net.pt", arch=f"{folder}/nets.py:Nope")


ROWS = [
    Row("a Git LFS pointer", pointer, Refused("is a Git LFS pointer, .*; run git lfs pull")),
    Row("a class that the file lacks", class_that_is_not_there, Refused("nets.py has no 'Nope'")),
    Row("numpy scalars, settings and paths beside the weights", loaded(training), 0),
    Row("the same in the format before PyTorch 1.6", old(training), 0),
    Row("the same as pickle protocol 4", loaded(training, pickle_protocol=4), 0),
    Row("settings of a project's own class", loaded(lambda: {"cfg": Config(), "net": state()}), 0),
    Row("a call of a project's own function", loaded(lambda: {"x": Call(), "model": state()}), 0),
    Row("weights as numpy arrays",
        loaded(lambda: {k: v.numpy() for k, v in state().items()}), 0),
    Row("Lightning's prefix",
        loaded({"state_dict": state(0, "model."), "pytorch-lightning_version": "2.0"}), 0),
    Row("a prefix of the project's own", loaded({"net": state(1, "backbone.")}), 1),
    Row("wrapped twice", loaded({"checkpoint": {"model_state_dict": state()}, "epoch": 1}), 0),
    Row("EMA weights alone", loaded({"ema": {"module": state(1)}, "updates": 5}), 1),
    Row("EMA weights beside the others", loaded(both),
        Refused(r"2 sets of weights that fit .*: state_dict, state_dict_ema; choose .* --weights")),
    Row("EMA weights asked for", loaded(both, "state_dict_ema"), 1),
    Row("weights asked for that are not there", loaded(both, "ema"),
        Refused("has no weights 'ema'; choose from state_dict, state_dict_ema")),
    Row("a loss with weights beside the model's", loaded(beside),
        Refused(r"holds more .*: loss.weight; .* give --weights state_dict.model$")),
    Row("what stands beside the weights is written as it was", written, True),
    Row("a whole pickled model", loaded(lambda: nn.Linear(2, 2)),
        Refused("got an object of torch.nn.modules.linear.Linear")),
    Row("TorchScript", programs(scripted), Refused("is TorchScript.*state_dict.*--arch", code=3)),
    Row("a program of torch.export", programs(exported), Refused("torch.export program", code=3)),
    Row("a scan of TorchScript", levels(scripted), True),
    Row("a scan of a program of torch.export", levels(exported), True),
    Row("a scan of a training checkpoint", levels(checkpoint), True),
    Row("BackdoorBench", of_backdoorbench, True),
    Row("BackdoorBench, of a net that is not at hand",
        lambda folder: (torch.save(backdoorbench("vit_b_16", state()), folder / "a.pt"),
                        load_model(folder / "a.pt")),
        Refused("vit_b_16, 3 classes.*--arch")),
    Row("a trigger that works, whatever its index", scanned, True),
    Row("nine findings alike", nine_alike, 1),
    Row("a trigger that works on the page of BAERASER that left it alone", rejected, True),
    Command("purify TorchScript", purified(scripted), 3, "is TorchScript"),
    Command("purify a program of torch.export", purified(exported), 3, "torch.export program"),
    Command("measure a training checkpoint", measured(checkpoint), 0, "100.0 %"),
    Command("purify raw or EMA weights", purified(ema), 2, "choose one"),
    Command("measure the EMA weights", measured(ema, "--weights", "state_dict_ema"), 0, "100.0 %"),
    Command("scan TorchScript", lambda folder: ["scan", str(scripted(folder / "a"))], 0,
            "1 finding of medium level"),
    Command("scan a training checkpoint",
            lambda folder: ["scan", str(checkpoint(folder / "a")), "--fail-on", "medium"], 0,
            "argparse.Namespace"),
]  # fmt: skip
