"""Small records for the tests of the report."""

from __future__ import annotations

from typing import Any

from mmdefense.defenses.outcome import Choice
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.record import (
    ComparisonRecord,
    DataInfo,
    DefenseInfo,
    GuardInfo,
    LayerChange,
    ModelInfo,
    Provenance,
    PurificationRecord,
    Row,
)

BEFORE = Rates(acc=0.97, asr=0.99, ra=0.01)
PROVENANCE = Provenance(seed=3, versions={"torch": "2.15.0"}, created="2025-01-02T03:04:05Z")
DATA = DataInfo(name="digits", samples=72, fingerprint="f1f2")


def model(name: str = "net.safetensors") -> ModelInfo:
    return ModelInfo(
        name=name,
        architecture="SmallResNet",
        parameters=1234567,
        sha256_before="aa" * 32,
        sha256_after="bb" * 32,
    )


def purification(
    name: str = "net.safetensors",
    guard: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> PurificationRecord:
    figures = {
        "before": 0.97,
        "after": 0.96,
        "drop": 0.01,
        "drop_low": -0.004,
        "drop_high": 0.018,
        "bound": 0.02,
        "state": "fip, step 40",
        "violated": False,
        "samples": 36,
    }
    return PurificationRecord(
        title=name,
        task="image-classification",
        model=model(name),
        data=DATA,
        defense=DefenseInfo(name="fip", settings=settings or {"steps": 40, "stop": None}),
        guard=GuardInfo(**figures | (guard or {})),
        seconds=12.34,
        provenance=PROVENANCE,
        layers=(LayerChange(layer="stem", change=0.1, units=16, pruned=2),),
        history=tuple({"stage": "fip", "step": step, "loss": 1 / step} for step in (1, 2, 3)),
        **more,
    )


CHOICE = Choice(
    defense="tsbd",
    settings={"ratio": None},
    why=("6 triggers were found", "tsbd: known triggers succeed on up to 4%: good enough"),
    success_before=0.99,
    success_after=0.04,
)


def row(defense: str, *, acc: float = 0.96, asr: float = 0.01, **more: Any) -> Row:
    der = (max(0.0, 0.99 - asr) - max(0.0, 0.97 - acc) + 1) / 2
    after = Rates(acc=acc, asr=asr, ra=0.9, der=der)
    return Row(**{"defense": defense, "before": BEFORE, "after": after, "seconds": 1.0} | more)


def comparison(*rows: Row, title: str = "Five defenses") -> ComparisonRecord:
    return ComparisonRecord(
        title=title,
        task="image-classification",
        model=model(),
        data=DATA,
        attack="BadNets, 10%, target 0",
        rows=rows or (row("fine-tuning", asr=0.4), row("fip", baseline="fine-tuning")),
        provenance=PROVENANCE,
    )
