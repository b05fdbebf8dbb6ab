"""What is said about the outcome: kept, violated or not decidable; nothing changed."""

from __future__ import annotations

import json
from pathlib import Path

from commands import fitted_net, small_images, write_images
from everyday.rows import Command, Row
from safetensors.torch import save_file

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
    return ["purify", *given, "--set", "batch_size=8", *more]


FINE_TUNING = ("--defense", "fine-tuning", "--set", "steps=2", "--set", "lr=0.001")


def page_and_record_say(words: str, verdict: str):
    def check(folder: Path) -> None:
        assert words in (folder / "out" / "report.html").read_text("utf-8")
        assert words in (folder / "out" / "README.md").read_text("utf-8").replace("\\", "")
        record = json.loads((folder / "out" / "purification.json").read_text("utf-8"))
        assert record["predicate"]["guard"]["verdict"] == verdict

    return check


ROWS = [
    Row("a drop of +0.150 +- 0.139", lambda _: guard(0.150, 0.139).verdict, "not decidable"),
    Row("a drop of +0.100 +- 0.092", lambda _: guard(0.100, 0.092).verdict, "not decidable"),
    Row("a drop of +0.100 +- 0.070", lambda _: guard(0.100, 0.070).verdict, "violated"),
    Row("a drop of -0.010 +- 0.025", lambda _: guard(-0.010, 0.025).verdict, "kept"),
    Row("the number that decides +0.150 +- 0.139", lambda _: guard(0.150, 0.139).needed, 47),
    Command(
        "a guard with six samples",
        lambda folder: purify(folder, *FINE_TUNING),
        0,
        r"bound not decidable with 6 held-out samples \(about 43 would decide\)",
        page_and_record_say("bound not decidable with 6 held-out samples", "not decidable"),
    ),
    Command(
        "a guard with enough samples",
        lambda folder: purify(folder, *FINE_TUNING, "--set", "holdout=0.5", images=120),
        0,
        "utility guard: bound kept: accuracy went from 1.000 to 1.000 on 60",
        page_and_record_say("Utility bound kept", "kept"),
    ),
]
