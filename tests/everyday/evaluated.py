"""What ``evaluate`` takes, writes and records; the Python door; how results show themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import Net, fitted_net, small_images, write_images
from everyday.rows import Command, Refused, Row
from safetensors.torch import save_file

import mmdefense as mmd
from mmdefense.data.labelled import LabelledSamples
from mmdefense.data.text import TextSamples
from mmdefense.report.record import read_record
from mmdefense.report.statement import differing

NAMES = ("ant", "bee", "cat")
PURIFY = ("--defense", "fine-tuning", "--set", "steps=2", "--set", "batch_size=8")


def _place(folder: Path) -> list[str]:
    """Make a model and named classes of images; return the arguments that name them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(Net().state_dict(), folder / "net.safetensors")
    images, labels = small_images()
    for label, name in enumerate(NAMES):
        write_images(folder / "data" / name, images[labels == label], labels[labels == label])
    for nested in (folder / "data").glob("*/*"):  # a folder for each class alone
        for path in nested.iterdir():
            path.rename(nested.parent / path.name)
        nested.rmdir()
    return ["net.safetensors", "--data", "data", "--arch", "commands:Net", "--accept-low-utility"]


def _evaluate(*more: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["evaluate", *_place(folder), *more]


def _written(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "e.json").read_text())
    return value


def _is_whole(folder: Path) -> None:
    found = _written(folder)
    assert (found["kind"], found["schema"], found["task"]) == (
        "evaluation", 1, "image-classification"
    )  # fmt: skip
    assert found["metric"] == found["score_name"] == "accuracy"
    assert found["data"]["samples"] == found["score"]["count"] == 30
    assert found["attack"]["name"] == "badnets"
    assert (found["attack"]["target"], found["attack"]["target_name"]) == (2, "cat")
    assert found["attack"]["settings"]["size"] == 2
    assert found["asr"]["count"] == found["ra"]["count"] == 20
    assert len(found["model"]["sha256"]) == len(found["model"]["files"]["net.safetensors"]) == 64
    assert {"mmdefense", "torch", "python"} <= found["versions"].keys()
    assert found["score"]["low"] < found["value"] < found["score"]["high"]


def _purified(folder: Path) -> str:
    """Purify the model of the place into ``out``; return where the purified weights are."""
    _place(folder)
    given = {"arch": "commands:Net", "steps": 2, "batch_size": 8, "accept_low_utility": True}
    mmd.purify("net.safetensors", "data", "fine-tuning", **given).save("out")
    return "out/model.safetensors"


def _record(*more: str, model: str = "") -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        purified = _purified(folder)
        given = ("--data", "data", "--arch", "commands:Net", "--accept-low-utility")
        common = (*given, "--record", "out")
        return ["evaluate", model or purified, *common, *more]

    return make


def _is_recorded(folder: Path) -> None:
    out = folder / "out"
    record = read_record(out / "purification.json")
    assert differing(out) == []
    (one,) = record.evaluations
    assert one.recorded_as == ("purified model",)
    assert record.attack.before.asr is None
    assert record.attack.after.asr == one.asr.value
    assert "badnets, target 1 (bee)" in (out / "report.html").read_text()
    assert "badnets, target 1" in (out / "README.md").read_text()


def _both_recorded(folder: Path) -> list[Any]:
    purified = _purified(folder)
    common = {"arch": "commands:Net", "attack": "badnets", "target": "bee", "record": "out"}
    common["accept_low_utility"] = True
    found = [mmd.evaluate(model, "data", **common) for model in ("net.safetensors", purified)]
    attack = read_record(folder / "out" / "purification.json").attack
    wanted = [one.asr.value for one in found]
    return [[attack.before.asr, attack.after.asr] == wanted, attack.after.der is not None]


def _record_of_changed_files(folder: Path) -> Any:
    purified = _purified(folder)
    (folder / "out" / "report.npz").write_bytes(b"other")
    common = {"arch": "commands:Net", "record": "out", "accept_low_utility": True}
    return mmd.evaluate(purified, "data", **common)


def _other_weights(folder: Path) -> list[str]:
    arguments = _record()(folder)
    save_file(Net().state_dict(), folder / "other.safetensors")
    return ["evaluate", "other.safetensors", *arguments[2:]]


EVALUATED = [
    Command(
        "an evaluation as JSON",
        _evaluate("--attack", "badnets", "--target", "cat", "--set", "size=2", "-o", "e.json"),
        0,
        r"attack badnets, target 2 \(cat\)",
        _is_whole,
    ),
    Command(
        "a target that is no class",
        _evaluate("--attack", "badnets", "--target", "dog"),
        2,
        "got 'dog'; classes: ant, bee, cat",
    ),
    Command(
        "an attack that learns its trigger",
        _evaluate("--attack", "trojannn"),
        3,
        "TrojanNN learns its trigger while it is planted",
    ),
    Command(
        "a target without an attack or a trigger",
        _evaluate("--target", "cat", "-o", "e.json"),
        2,
        "no effect without an attack or a trigger",
    ),
    Command(
        "settings without an attack",
        _evaluate("--set", "size=2"),
        2,
        "no effect without an attack or a trigger",
    ),
    Command(
        "a JSON file in a folder that is not there",
        _evaluate("-o", "nowhere/e.json"),
        2,
        "the folder of nowhere/e.json does not exist",
    ),
    Command(
        "an evaluation of the purified model in its record",
        _record("--attack", "badnets", "--target", "bee"),
        0,
        "recorded in out, as of the purified model",
        _is_recorded,
    ),
    Command(
        "an evaluation of the given model in the record of its purification",
        _record(model="net.safetensors"),
        0,
        "recorded in out, as of the given model",
    ),
    Command(
        "an evaluation of another model for a record",
        _other_weights,
        2,
        "neither the model that was given to out nor the purified one, by the SHA-256",
    ),
    Row("a record of both models under one attack", _both_recorded, [True, True]),
    Row(
        "a record whose files were changed",
        _record_of_changed_files,
        Refused("out is not as it was written .*report.npz is another file"),
    ),
]


def _learnt_patch(folder: Path) -> float:
    _place(folder)
    save_file({"patch": torch.ones(1, 2, 2)}, folder / "patch.safetensors")
    found = mmd.evaluate(
        "net.safetensors",
        "data",
        arch="commands:Net",
        attack="trojannn",
        trigger="patch.safetensors",
        target=1,
        accept_low_utility=True,
    )
    return found.asr.count


def _in_memory(_: Path) -> list[float]:
    found = mmd.evaluate(fitted_net(), small_images(), attack="badnets", target=2)
    return [found.score.count, found.asr.count]


def _lines_of(make: Callable[[Path], Any]) -> Callable[[Path], bool]:
    """Return whether something shows itself in at most eight lines of text and some HTML."""

    def look(folder: Path) -> bool:
        shown = make(folder)
        text = repr(shown)
        return text.count("\n") < 8 and len(text) < 1200 and "<" in shown._repr_html_()

    return look


def _purification(folder: Path) -> Any:
    _place(folder)
    given = {"arch": "commands:Net", "steps": 2, "accept_low_utility": True}
    return mmd.purify("net.safetensors", "data", "fine-tuning", **given)


IMAGES = torch.rand(40, 1, 8, 8)
LABELS = torch.arange(40) % 3

PYTHON = [
    Row("what an attack has learnt, from a file", _learnt_patch, 20),
    Row("a module and images in memory to evaluate", _in_memory, [30, 20]),
    Row("a purification, shown", _lines_of(_purification), True),
    Row("a result of a defense, shown", _lines_of(lambda f: _purification(f).result), True),
    Row("a scan, shown", _lines_of(lambda _: mmd.scan(Net())), True),
    Row(
        "an evaluation, shown",
        _lines_of(lambda _: mmd.evaluate(fitted_net(), small_images(), attack="badnets")),
        True,
    ),
    Row("labelled samples, shown", _lines_of(lambda _: LabelledSamples(IMAGES, LABELS)), True),
    Row("a batch, shown", _lines_of(lambda _: LabelledSamples(IMAGES, LABELS).everything()), True),
    Row("texts, shown", _lines_of(lambda _: TextSamples(("word " * 99,) * 50, ("a",) * 50)), True),
    Row(
        "an adapter by name for a model at a path",
        lambda _: mmd.purify("net.safetensors", "data", adapter="torch-classifier"),
        Refused("adapter 'torch-classifier' is for a module"),
    ),
    Row(
        "options of reading for images in memory",
        lambda _: mmd.purify(Net(), small_images(), reading={"image_size": 8}),
        Refused("arch, weights and reading apply to a model or data at a path"),
    ),
]

ROWS = [*EVALUATED, *PYTHON]
