"""Time that was promised, and what a log says of progress."""

from __future__ import annotations

import json
from pathlib import Path

from clocks import Clock
from commands import fitted_net, small_images, write_images
from everyday.rows import Command, Row
from safetensors.torch import save_file

import mmdefense as mmd
from mmdefense.report.record import read_record
from mmdefense.runtime.deadline import Deadline


def purification(*more: str):
    """Return what makes the arguments of a short purification of a small net."""

    def make(folder: Path) -> list[str]:
        save_file(fitted_net().state_dict(), folder / "net.safetensors")
        write_images(folder / "data", *small_images())
        return [
            *("purify", "net.safetensors", "--data", "data", "-o", "out", "--arch", "commands:Net"),
            *("--defense", "fine-tuning", "--set", "steps=4", "--set", "batch_size=8", *more),
        ]

    return make


def nothing_measured(folder: Path) -> None:
    record = read_record(folder / "out" / "purification.json")
    assert (record.evidence.level, record.measured, record.layers) == ("none", {}, ())
    assert "Not measured" in (folder / "out" / "report.html").read_text("utf-8")


def evidence_was_short(folder: Path) -> None:
    record = json.loads((folder / "out" / "purification.json").read_text("utf-8"))["predicate"]
    assert record["evidence"]["level"] == "fast"


def stopped(_: Path) -> tuple[str, float, bool]:
    """Purify with a clock that each look moves by a second; return where it ended."""
    clock = Clock(per_look=1.0)
    purified = mmd.purify(
        fitted_net(),
        small_images(),
        "fip",
        batch_size=8,
        max_seconds=Deadline(20, clock),
        progress=None,
    )
    return purified.result.stopped[:6], purified.evidence.curvature is None, clock.now < 40


ROWS = [
    Row("a time limit is one for evidence too", stopped, ("purify", True, True)),
    Command("no evidence", purification("--evidence", "none"), 0, check=nothing_measured),
    Command("evidence by default", purification(), 0, check=evidence_was_short),
    Command(
        "a level of evidence that is none",
        purification("--evidence", "all"),
        2,
        "evidence must be one of none, fast, full, got 'all'",
    ),
    Command("a log of progress", purification(), 0, r"fine-tune: 4 of 4 in \S+ s, loss"),
    Command("a dry run tells evidence apart", purification("--dry-run"), 0, "evidence  fast, at"),
]
