"""The command line and the Python door: what they take, and what they say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everyday.rows import Command, Refused, Row

from mmdefense.attacks.pointba import PointPBA
from mmdefense.attacks.rare_token import RareToken
from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.defenses.tsbd import TSBD
from mmdefense.settings import checked_settings

NET = """\
import dataclasses
import torch

from sides import SIDE

@dataclasses.dataclass
class Width:
    value: int = 2

class Net(torch.nn.Linear):
    def __init__(self, width: int = 2):
        super().__init__(SIDE, Width(width).value)
"""


@contextmanager
def without(*libraries: str) -> Iterator[None]:
    """Hide libraries, as if they were not installed."""
    kept = {name: module for name, module in sys.modules.items() if _of(name, libraries)}
    for name in kept:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(libraries))
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _of(name, libraries)]:
            del sys.modules[name]
        sys.modules.update(kept)


def _of(module: str, libraries: tuple[str, ...]) -> bool:
    return module.partition(".")[0] in libraries


def _hidden(library: str, call: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        with without(library):
            return call(folder)

    return read


def _demo(task: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        from mmdefense.evaluation.demo import run_demo

        return run_demo(folder / "out", task=task)

    return run


def _net_elsewhere(folder: Path) -> list[int]:
    place = folder / "nets"
    place.mkdir()
    (place / "my net.py").write_text(NET)
    (place / "sides.py").write_text("SIDE = 3\n")
    try:
        nets = [build_architecture(f"nets/my net.py:Net{more}") for more in ("", "(width=8)")]
    finally:
        sys.modules.pop("sides", None)
    return [net.out_features for net in nets]


def _wants_a_library(folder: Path) -> Any:
    (folder / "net_that_wants.py").write_text("import no_such_library\n")
    return build_architecture("net_that_wants:Net")


LIBRARIES = [
    Row(
        "a demo whose library is missing",
        _hidden("torchvision", _demo("object-detection")),
        Refused("needs the packages 'torchvision' and 'pycocotools'.*pip install", 3),
    ),
    Row(
        "a demo of language whose library is missing",
        _hidden("transformers", _demo("language-generation")),
        Refused("needs the package 'transformers'.*pip install", 3),
    ),
    Row(
        "an arch of a library that is missing",
        _hidden("torchvision", lambda _: build_architecture("torchvision.models:resnet18")),
        Refused("needs the package 'torchvision', which is not installed; (uv )?pip install", 3),
    ),
    Row(
        "an arch of timm that is missing",
        _hidden("timm", lambda _: build_architecture("timm:create_model('resnet18')")),
        Refused("needs the package 'timm', which is not installed; (uv )?pip install", 3),
    ),
    Row(
        "an arch whose own file imports a library that is missing",
        _wants_a_library,
        Refused(
            "needs the package 'no_such_library', .*install the package that provides no_such",
            3,
        ),
    ),
    Row(
        "an arch whose module is misspelt",
        lambda _: build_architecture("my_ned:Net"),
        Refused("module 'my_ned', which is neither in the current directory nor installed"),
    ),
    Row(
        "an arch file that is not there",
        lambda _: build_architecture("nets/net.py:Net"),
        Refused("arch file nets/net.py does not exist"),
    ),
    Row("an arch of a file elsewhere", _net_elsewhere, [2, 8]),
]


def _says(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda _: list(arguments)


def _words(value: object, right: tuple[str, ...]) -> Callable[[Path], bool]:
    return lambda _: checked_settings(RareToken, {"words": value})["words"] == right


LISTS = [
    Command("the version", _says("--version"), 0, r"^mmdefense \d+\.\d+"),
    Command("help of the whole", _says("-h"), 0, "Usage: "),
    Command("help of a command", _says("purify", "-h"), 0, "--max-utility-drop"),
    Command(
        "a list without markup",
        _says("list", "attacks"),
        0,
        r"Applies the patch to a few consecutive frames",
    ),
    Command(
        "a list that is aligned",
        _says("list", "attacks"),
        0,
        r"(?m)^badnets {21}Overwrites[^`]*\n(.*\n)*regional-misclassification  RMA",
    ),
    Command("a list of cases", _says("list", "cases"), 0, r"digits-badnets +image-class.*SmallRes"),
    Command(
        "the settings of a defense",
        _says("list", "defenses", "fip"),
        0,
        r"steps +300 +a whole number +Number of updates\.",
    ),
    Command(
        "the settings of an attack",
        _says("list", "attacks", "rare-token"),
        0,
        r"words +cf,mn,bb,tq,mb +a list \(text, \.\.\.\) +The rare words",
    ),
    Command(
        "the reading options of an adapter",
        _says("list", "adapters", "torch-classifier"),
        0,
        r"--read NAME=VALUE:\n +mean",
    ),
    Command("a name to list that is unknown", _says("list", "cases", "digit"), 2, "digits-"),
    Row("a tuple of one word", _words("cf", ("cf",)), True),
    Row("a tuple of two words", _words("cf,mn", ("cf", "mn")), True),
    Row(
        "a tuple of one number",
        lambda _: checked_settings(TSBD, {"candidates": 0.1})["candidates"],
        (0.1,),
    ),
    Row(
        "a tuple of three numbers of which two are given",
        lambda _: checked_settings(PointPBA, {"center": (0.1, 0.2)}),
        Refused(r"center of PointPBA must be a list \(a number, a number, a number\)"),
    ),
]

ROWS = [*LIBRARIES, *LISTS]
