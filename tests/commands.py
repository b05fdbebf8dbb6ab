"""A tiny classifier on disk with its data, and the command line called as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mmdefense import registry
from mmdefense.cli.app import main
from mmdefense.defenses.base import Purifying
from mmdefense.defenses.fine_tuning import FineTuning

CLASSES = 3


class Net(nn.Module):
    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4 * 4, classes)

    def forward(self, images):
        hidden = torch.relu(self.conv(images))
        return self.head(nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1))


def small_images(count: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Return grey 8x8 images, uint8, with one bright quarter that tells their class."""
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    return images.to(torch.uint8), labels


@cache
def fitted_state() -> dict[str, torch.Tensor]:
    """Return the weights of a ``Net`` that is right about :func:`small_images`, and can move on."""
    images, labels = small_images()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    while True:
        loss = nn.functional.cross_entropy(net(images / 255), labels)
        if loss < 0.05:
            return net.state_dict()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fitted_net() -> Net:
    net = Net()
    net.load_state_dict(fitted_state())
    return net


@dataclass(frozen=True)
class Workplace:
    """A folder with a model, its data, and a place for the output.

    Attributes:
        folder: Where everything lies.
        model: A state dict of ``Net``.
        data: A folder with one sub-folder of images per class.
        out: Does not exist yet.
    """

    folder: Path
    model: Path
    data: Path
    out: Path

    def purify(self, *more: str, **changed: object) -> list[str]:
        """Return the arguments of a short purification; ``changed`` replaces paths or defense."""
        paths = {"model": self.model, "data": self.data, "out": self.out, **changed}
        defense = str(paths.get("defense", "fine-tuning"))
        return [
            *("purify", str(paths["model"]), "--data", str(paths["data"]), "-o", str(paths["out"])),
            *("--arch", "commands:Net", "--defense", defense),
            *("--set", "steps=4", "--set", "batch_size=8", *more),
        ]

    def files(self) -> list[str]:
        """Return everything beside model and data, so that a test sees what was left behind."""
        given = {self.model, self.data}
        return sorted(path.name for path in self.folder.iterdir() if path not in given)


@pytest.fixture
def plug(monkeypatch):
    """Let a test add rows to a table, as the metadata of another distribution would."""

    def add(kind: str, **rows: str) -> None:
        genuine = registry._table
        more = {name: EntryPoint(name, value, f"mmdefense.{kind}") for name, value in rows.items()}
        monkeypatch.setattr(
            registry, "_table", lambda asked: genuine(asked) | (more if asked == kind else {})
        )

    return add


def nothing(work: Purifying[Any]) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Disturbed(FineTuning):
    """Fine-tuning at one rate, and what a test does before and after it."""

    restarts: int = 0

    before: ClassVar[Callable[[Purifying[Any]], None]] = staticmethod(nothing)
    after: ClassVar[Callable[[Purifying[Any]], None]] = staticmethod(nothing)

    def _run(self, work: Purifying[Any]) -> None:
        self.before(work)
        super()._run(work)
        self.after(work)


@pytest.fixture
def disturb(plug, monkeypatch):
    """Register the defense "disturbed"; return a function that says what comes around it."""
    plug("defenses", disturbed="commands:Disturbed")

    def disturb(before=nothing, after=nothing):
        monkeypatch.setattr(Disturbed, "before", staticmethod(before))
        monkeypatch.setattr(Disturbed, "after", staticmethod(after))

    return disturb


@pytest.fixture
def place(tmp_path):
    model, data = tmp_path / "net.safetensors", tmp_path / "data"
    save_file(fitted_net().state_dict(), model)
    write_images(data, *small_images())
    return Workplace(tmp_path, model, data, tmp_path / "out")


def write_images(folder, images, labels):
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image[0])).save(path)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def mmdefense(monkeypatch, capsys):
    """Run the command line in this process; return its exit code and what it wrote."""
    monkeypatch.delenv("MMDEFENSE_DEBUG", raising=False)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mmdefense", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        code = stopped.value.code
        return Outcome(0 if code is None else code, *capsys.readouterr())

    return run


def tool(*words, folder=None):
    """Run a tool of this environment; return its exit code and what it wrote."""
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        words,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": os.pathsep.join(folders)},
    )
    return done.returncode, done.stdout + done.stderr
