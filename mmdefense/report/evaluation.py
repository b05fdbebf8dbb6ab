"""What ``mmdefense evaluate`` measured: its JSON, and its lines for a person."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, ClassVar

from torch import Tensor

from mmdefense.metrics.definitions import heading
from mmdefense.metrics.permanence import Retuning
from mmdefense.report.encoding import JsonRecord, plain
from mmdefense.tabular import Table, Value

__all__ = ["ASR_GOAL", "EvaluatedData", "EvaluatedModel", "Evaluation", "Proportion", "TriedAttack"]

ASR_GOAL = 0.05
"""Ours: a trigger that works on at most 5 % of the samples counts as removed."""

_Z = 1.96  # two-sided 95 %


@dataclass(frozen=True)
class Proportion:
    """A share of samples, in ``[0, 1]``, with its 95 % confidence interval.

    Attributes:
        value: The share.
        low: Lower end.
        high: Upper end.
        count: Number of samples n.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Proportion:
        """Return the mean of ``values``, shape ``(N,)`` in ``[0, 1]``, with its Wilson interval.

        References:
            Wilson. *Probable Inference, the Law of Succession, and Statistical Inference*. JASA
            22(158), 1927.
        """
        count, share = len(values), float(values.double().mean())
        scale = 1 + _Z**2 / count
        centre = share + _Z**2 / (2 * count)
        margin = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
        return cls(share, max(0.0, (centre - margin) / scale), (centre + margin) / scale, count)

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.value:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = {self.count})"


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """The model that was measured.

    Attributes:
        name: What the user called it: a path, an id or a class.
        architecture: Class name.
        parameters: Number of weights.
        sha256: Of the weights in memory, as ``purification.json`` has it before and after.
        files: SHA-256 of each weight file, as ``sha256sum`` prints it; empty for a module.
    """

    name: str
    architecture: str
    parameters: int
    sha256: str
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluatedData:
    """The clean samples that it was measured on.

    Attributes:
        name: A folder, or the name of a data set.
        split: ``"train"`` or ``"test"``, where the data is split.
        samples: Number of samples.
        fingerprint: A hash of the samples.
    """

    name: str
    split: str
    samples: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class TriedAttack:
    """The attack whose trigger was tried.

    Attributes:
        name: As in ``mmdefense list attacks``; of a trigger from a file, ``"file"``.
        settings: The attack's fields.
        target: What the attacker wants: the number of a class, or a text.
        target_name: The name of that class, where it has one.
        files: SHA-256 of the file that the trigger was read from, by name.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None
    target_name: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", plain(self.settings))

    def __str__(self) -> str:
        named = f" ({self.target_name})" if self.target_name else ""
        aim = self.settings.get("mapping", "all-to-one")
        target = aim if aim == "all-to-all" else f"target {self.target}{named}"
        trigger = f"trigger of {', '.join(self.files)}" if self.name == "file" else self.name
        return f"{trigger}, {target}"


@dataclass(frozen=True, kw_only=True)
class Evaluation(JsonRecord):
    """What a model does on test data: what ``mmdefense evaluate -o`` writes.

    Attributes:
        model: The model.
        data: The clean samples.
        task: Name of the task.
        metric: Name of the task's metric, for example ``"accuracy"``, ``"mAP@50"`` or ``"BLEU"``.
        value: That metric, in ``[0, 1]``.
        score: Mean of the adapter's score over the samples; of a classifier the accuracy.
        score_name: What that is a mean of, for example ``"n-gram accuracy"``.
        also: Further values of the task by name, for example ``"perplexity"``.
        attack: The attack that was tried, if any.
        asr: Attack success rate, where an attack was tried.
        ra: Mean score despite the trigger, where the attack leaves a right answer.
        retuning: What a few poisoned samples bring back, where that was tried.
        twin: The clean twin that was put through the same, where there was one.
        versions: Version by name: mmdefense, torch, python and so on.
        device: For example ``"cpu"``.
        created: Date and time in ISO 8601.
        command: The command line, if there was one.
        recorded_as: In the record of a purification, whose weights these are: of the
            ``"given model"`` or the ``"purified model"``; of both, where nothing was changed.
    """

    kind: ClassVar[str] = "evaluation"

    model: EvaluatedModel
    data: EvaluatedData
    task: str
    metric: str
    value: float
    score: Proportion
    score_name: str
    also: Mapping[str, float] = field(default_factory=dict)
    attack: TriedAttack | None = None
    asr: Proportion | None = None
    ra: Proportion | None = None
    retuning: Retuning | None = None
    twin: EvaluatedModel | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    created: str = ""
    command: str = ""
    recorded_as: tuple[str, ...] = ()

    @property
    def finding(self) -> bool:
        """Whether the trigger works, beyond doubt: the whole interval of the ASR is above 5 %."""
        return self.asr is not None and self.asr.low > ASR_GOAL

    def lines(self) -> list[str]:
        """Return what was measured, a line each."""
        return [f"{name} {shown}" for name, shown in self.values()]

    def values(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each figure and its value for a person."""
        if self.metric == self.score_name:
            yield heading(self.metric), str(self.score)
        else:
            yield self.metric, f"{100 * self.value:.1f} %"
            yield self.score_name, str(self.score)
        yield from ((name, f"{value:.4g}") for name, value in self.also.items())
        if self.attack is not None:
            yield "attack", str(self.attack)
        if self.asr is not None:
            yield "ASR", str(self.asr)
        if self.ra is not None:
            of = "" if self.score_name == "accuracy" else f" ({self.score_name} with the trigger)"
            yield f"RA{of}", str(self.ra)
        if self.retuning is not None:
            yield from self.retuning.lines()
        if self.twin is not None:
            yield "clean twin", f"{self.twin.name} (SHA-256 {self.twin.sha256[:12]})"

    def table(self) -> Table:
        """Return a row for each rate: its value in ``[0, 1]``, 95 % interval and samples."""
        single = {self.metric: self.value} if self.metric != self.score_name else {}
        rows: list[dict[str, Value]] = [
            {"name": name, "value": value} for name, value in {**single, **self.also}.items()
        ]
        rates = {self.score_name: self.score, "ASR": self.asr, "RA": self.ra}
        rows += [
            {"name": name, **dataclasses.asdict(rate)}
            for name, rate in rates.items()
            if rate is not None
        ]
        of = {"model": self.model.name, "data": self.data.name}
        return Table([{**of, **row} for row in rows], f"Evaluation of {self.model.name}")

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        lines = [f"Evaluation of {self.model.name} on {self.data.name}", *self.lines()]
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(shown)}</td></tr>"
            for name, shown in self.values()
        )
        title = f"Evaluation of {self.model.name} on {self.data.name}"
        return f"<table><caption>{escape(title)}</caption>{rows}</table>"
