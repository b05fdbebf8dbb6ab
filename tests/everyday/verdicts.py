"""What is said about a model that does not work on the data as read, and about the outcome."""

from __future__ import annotations

import contextlib
import html
import json
from pathlib import Path

import pytest
import torch
from commands import Net, fitted_net, small_images, write_images
from domains import DOMAINS
from everyday.rows import Command, Refused, Row
from safetensors.torch import save_file

import mmdefense as mmd
from mmdefense.cli.app import main
from mmdefense.defenses.guard import Guard


def guard(drop: float, margin: float, bound: float = 0.02, samples: int = 40) -> Guard:
    spread = margin / 1.645 * samples**0.5
    figures = {"before": 0.9, "after": 0.9 - drop, "drop": drop, "spread": spread}
    return Guard(**figures, bound=bound, samples=samples, state="final")


def purify(folder: Path, *more: str, images: int = 30) -> list[str]:
    """Make a fitted model and its data; return the arguments of a short purification."""
    save_file(fitted_net().state_dict(), folder / "net.safetensors")
    write_images(folder / "data", *small_images(images))
    given = ("net.safetensors", "--data", "data", "--arch", "commands:Net", "-o", "out")
    return ["purify", *given, *more]


FINE_TUNING = ("--defense", "fine-tuning", "--set", "steps=2", "--set", "lr=0.001")
FINE_TUNING += ("--set", "batch_size=8")


def page_and_record_say(words: str, verdict: str):
    def check(folder: Path) -> None:
        assert words in (folder / "out" / "report.html").read_text("utf-8")
        assert words in (folder / "out" / "README.md").read_text("utf-8").replace("\\", "")
        record = json.loads((folder / "out" / "purification.json").read_text("utf-8"))
        assert record["predicate"]["guard"]["verdict"] == verdict

    return check


def told(folder: Path, command: str, *more: str, weights: str = "random") -> list[str]:
    """Make a model of random weights, or one whose classes are numbered in another order."""
    state = fitted_net().state_dict()
    if weights == "random":
        with torch.random.fork_rng():
            torch.manual_seed(1)
            state = Net().state_dict()
    if weights == "renumbered":
        state |= {name: state[name].roll(1, 0) for name in ("head.weight", "head.bias")}
    save_file(state, folder / "net.safetensors")
    write_images(folder / "data", *small_images())
    return [command, "net.safetensors", "--data", "data", "--arch", "commands:Net", *more]


def nothing_is_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["data", "net.safetensors"]


def of_domain(name: str, folder: Path) -> list[str]:
    """Make a tiny model of a domain with random weights, and its data."""
    domain = DOMAINS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        domain.model(folder / "model")
    domain.data(folder / "data")
    more = [word for word in domain.more if word != "--accept-low-utility"]
    return ["evaluate", "model", "--data", "data", *more]


def with_a_class_moved(**settings: object) -> mmd.Purification:
    """Purify a net of four classes on data that calls its third one the fourth: 67 % are right."""
    images, labels = small_images(300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, some = Net(classes=4), images.float() / 255
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(some), labels).backward()
        optimizer.step()
    moved = torch.where(labels == 2, 3, labels)
    return mmd.purify(net, (some, moved), "fine-tuning", steps=150, lr=0.3, **settings)


def begun(folder: Path, *more: str) -> list[str]:
    """Cut a purification off after its training; return the arguments with which it goes on."""
    arguments = purify(folder, *FINE_TUNING, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mmdefense", *arguments])
        patch.setattr("mmdefense.pipeline.purification.gather", interrupt)
        with contextlib.suppress(SystemExit):
            main()
    assert (folder / "out.partial").exists()
    return [*arguments, "--resume"]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def unchanged(words: str):
    """Return a check that page and record say so, and that no card says otherwise."""

    def check(folder: Path) -> None:
        out = folder / "out"
        record = json.loads((out / "purification.json").read_text("utf-8"))["predicate"]
        assert words in record["unchanged"]
        assert record["model"]["sha256_before"] == record["model"]["sha256_after"]
        page = (out / "report.html").read_text("utf-8")
        assert f"Nothing was changed: {record['unchanged']}" in html.unescape(page)
        assert "purified with" not in page
        assert not (out / "README.md").exists()

    return check


def nothing_changed(name: str, words: str, *more: str) -> Command:
    return Command(
        name,
        lambda folder: purify(folder, *more),
        1,
        f"nothing was changed: {words}",
        unchanged(words),
    )


SEARCH = ("--set", "search_steps=2", "--set", "screening=0", "--set", "levels=(0.9,)")
UNCHANGED = [
    nothing_changed(
        "a search that accepts no trigger",
        "no trigger was accepted; the best one works on",
        *("--defense", "baeraser", "--set", "tau=1.0", *SEARCH),
    ),
    nothing_changed(
        "a purification of no steps", "steps=0", "--defense", "fine-tuning", "--set", "steps=0"
    ),
    nothing_changed(
        "a pruning of no unit",
        "no unit was pruned",
        *("--defense", "pruning", "--set", "max_share=0.0"),
    ),
    nothing_changed(
        "a search whose time is up",
        "time ran out in recover 0",
        *("--defense", "baeraser", "--max-time", "0.001s", *SEARCH),
    ),
]

RESUMED = [
    Command(
        "go on with another option of reading",
        lambda folder: [*begun(folder), "--read", "image_size=8"],
        2,
        "holds an unfinished run with another option image_size",
    ),
    Command("go on with the same options", begun, 0, "utility guard"),
]

NEAR_CHANCE = "near chance.*check the labels, normalisation.*--accept-low-utility"
ONE_STEP = ("-o", "out", "--defense", "fine-tuning", "--set", "steps=1")
ACCEPT = "--accept-low-utility"

LOW_UTILITY = [
    Command(
        "purify a model that is at chance",
        lambda folder: told(folder, "purify", *ONE_STEP),
        2,
        NEAR_CHANCE,
        nothing_is_left,
    ),
    Command(
        "plan for a model that is at chance",
        lambda folder: told(folder, "purify", *ONE_STEP, "--dry-run"),
        2,
        NEAR_CHANCE,
    ),
    Command(
        "scan a model that is at chance with data",
        lambda folder: told(folder, "scan"),
        2,
        NEAR_CHANCE,
    ),
    Command(
        "evaluate a model whose classes are numbered in another order",
        lambda folder: told(folder, "evaluate", weights="renumbered"),
        2,
        NEAR_CHANCE,
    ),
    Command(
        "evaluate it all the same",
        lambda folder: told(folder, "evaluate", ACCEPT, weights="renumbered"),
        0,
        "ACC 0.0 %",
    ),
    Command(
        "purify it all the same",
        lambda folder: told(folder, "purify", *ONE_STEP, ACCEPT, weights="renumbered"),
        0,
        "report.html",
    ),
    Command(
        "evaluate a detector at chance", lambda f: of_domain("detection", f), 2, "the label numbers"
    ),
    Command(
        "evaluate a language model at chance", lambda f: of_domain("causal", f), 2, "of the pair"
    ),
    Command(
        "evaluate a video model at chance", lambda f: of_domain("video", f), 2, "spacing of frames"
    ),
    Row(
        "a purification that raises the accuracy from 67 to 100 %",
        lambda _: with_a_class_moved(),
        Refused("raised the accuracy from 0.667 to 1.000.*check the labels"),
    ),
    Row(
        "the same, accepted",
        lambda _: with_a_class_moved(accept_low_utility=True).guard.after,
        1.0,
    ),
    Row(
        "clouds in other units, for a model that is then at chance",
        lambda _: mmd.purify(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4)),
            (torch.randn(12, 16, 3), torch.arange(12) % 4),
            adapter="points",
            steps=1,
        ),
        Refused("check the labels, the units and axes"),
    ),
]


class Broken(Net):
    """Its weights are finite and its outputs are not."""

    def forward(self, images):
        return super().forward(images) * float("nan")


def low_utility_is_on_the_page(folder: Path) -> None:
    page = html.unescape((folder / "out" / "report.html").read_text("utf-8"))
    assert "Low utility accepted" in page
    record = json.loads((folder / "out" / "purification.json").read_text("utf-8"))
    assert "near chance" in record["predicate"]["low_utility"]


ROWS = [
    *LOW_UTILITY,
    Row(
        "outputs that are NaN",
        lambda _: mmd.purify(Broken(), small_images(), "fine-tuning"),
        Refused("its loss is NaN or infinite for 30 of 30 samples"),
    ),
    Command(
        "low utility that is accepted",
        lambda folder: told(folder, "purify", "-o", "out", *FINE_TUNING, "--accept-low-utility"),
        0,
        "note: low utility is accepted: the model's accuracy is",
        low_utility_is_on_the_page,
    ),
    Command(
        "a run to go on with that is not there",
        lambda folder: purify(folder, *FINE_TUNING, "--resume"),
        0,
        "has no checkpoint: the run starts from the beginning",
    ),
    Command(
        "one mean for three channels",
        lambda folder: [
            *("evaluate", "net.safetensors", "--data", "data", "--channels", "3"),
            *purify(folder)[4:6],
            *("--mean", "0.5", "--std", "0.25"),
        ],
        2,
        "mean and std must have a value for each channel of the images, got 1",
    ),
    *UNCHANGED,
    *RESUMED,
    Row("a drop of +0.150 +- 0.139", lambda _: guard(0.150, 0.139).verdict, "not decidable"),
    Row("a drop of +0.100 +- 0.092", lambda _: guard(0.100, 0.092).verdict, "not decidable"),
    Row("a drop of +0.100 +- 0.070", lambda _: guard(0.100, 0.070).verdict, "violated"),
    Row("a drop of -0.010 +- 0.025", lambda _: guard(-0.010, 0.025).verdict, "kept"),
    Row("the number that decides +0.150 +- 0.139", lambda _: guard(0.150, 0.139).needed, 47),
    Command(
        "a guard with six samples",
        lambda folder: purify(folder, *FINE_TUNING),
        0,
        r"bound not decidable with 30 held-out samples \(about 43 would decide\)",
        page_and_record_say("bound not decidable with 30 held-out samples", "not decidable"),
    ),
    Command(
        "a guard with enough samples",
        lambda folder: purify(folder, *FINE_TUNING, "--set", "holdout=0.5", images=120),
        0,
        "utility guard: bound kept: accuracy went from 1.000 to 1.000 on 60",
        page_and_record_say("Utility bound kept", "kept"),
    ),
]
