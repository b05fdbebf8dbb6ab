"""How often a scan is right: whether it finds the backdoors of victims, and none in clean twins.

A twin is trained like its victim, from the same initial weights on the same data, but without an
attack. Victims with the same network, data and training share a twin.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdefense.defenses.base import versions
from mmdefense.evaluation.identity import victim_identity
from mmdefense.evaluation.kept import kept_victim
from mmdefense.evaluation.victims import Victim
from mmdefense.evaluation.zoo import zoo_weights
from mmdefense.findings import Finding
from mmdefense.pipeline.identity import code_version
from mmdefense.pipeline.scan import scan
from mmdefense.protocol import Case
from mmdefense.report.encoding import build, plain
from mmdefense.runtime.run import Progress, named
from mmdefense.scanning.behaviour import COMMON, OUTLIER, SEARCH, TRIGGER
from mmdefense.store import Identity, Store

__all__ = ["Scanned", "calibrate", "clean_twin", "markdown"]


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """One model, and what a scan of it found.

    Attributes:
        case: The name of the victim, or of the twin.
        planted: Whether there is a backdoor.
        seed: Seed of the model, the clean samples and the scan.
        acc: Task metric of the model on test data.
        asr: Success of the true trigger; NaN if there is none.
        outliers: Outliers among the targets, each with its rates: a detection or a false alarm.
        works: Triggers that work but are not outliers.
        others: The ids of all other findings.
        seconds: Duration of the scan.
        settings: Settings of the case and the search.
        versions: Versions of the software, and the device.
    """

    case: str
    planted: bool
    seed: int
    acc: float
    asr: float
    outliers: tuple[str, ...]
    works: tuple[str, ...]
    others: tuple[str, ...]
    seconds: float
    settings: dict[str, Any]
    versions: dict[str, str]


def clean_twin(case: Case) -> Case:
    """Return the case without its attack, named after its data, network and training alone."""
    twin = replace(case, name="", attack=None, settings={})
    digest = hashlib.sha256(json.dumps(plain(twin)).encode()).hexdigest()
    return replace(twin, name=f"{case.data}-clean-{digest[:6]}")


def calibrate(
    cases: Sequence[Case],
    seeds: Sequence[int],
    folder: str | Path,
    progress: Progress | None = None,
    *,
    zoo: bool = False,
) -> list[Scanned]:
    """Scan the victim of every case and every clean twin, with every seed.

    Models and scans are kept in a store and not computed again.

    Args:
        cases: The victims; one without an attack is a clean model.
        seeds: Seeds, with one model and one scan each; use seeds on which nothing was tuned.
        folder: Folder of the store; created if it is missing.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
        zoo: Whether the models are loaded from the zoo, where each has one seed; its clean models
            are cases like the others, and no twin is added.

    Raises:
        BadInputError: If a kept file is damaged, or the zoo lacks a model.
    """
    every: list[Case] = []
    for case in (*cases, *(() if zoo else map(clean_twin, cases))):
        if case not in every:
            every.append(case)
    store = Store(folder)
    return [
        _cell(case, seed, store, progress, zoo_weights(case, seed) if zoo else "")
        for case in every
        for seed in seeds
    ]


def _cell(case: Case, seed: int, store: Store, progress: Progress | None, weights: str) -> Scanned:
    victim = victim_identity(case, seed, weights=weights)
    parts = {"victim": victim.digest, "clean": case.clean, "search": plain(SEARCH)}
    identity = Identity("calibration", f"{case.name}/{seed}", {**parts, "code": code_version()})
    entry = store.find(identity)
    if entry is None or entry.status == "failed":
        show = named(f"{case.name}/{seed}", progress, ", ")
        while (model := kept_victim(store, victim, case, seed, show)) is None:
            time.sleep(1)  # another process trains it
        entry = store.put(identity, plain(_scanned(case, model, seed, show)))
    found: Scanned = build(Scanned, store.content(entry), f"scan {entry.name}")
    return found


def _scanned(case: Case, victim: Victim, seed: int, show: Progress) -> Scanned:
    start = time.perf_counter()
    found = scan(
        victim.adapter,
        victim.clean,
        seed=seed,
        progress=show,
        accept_low_utility=True,  # it was trained on data of this kind
    ).findings
    return Scanned(
        case=case.name,
        planted=case.attack is not None,
        seed=seed,
        acc=_number(victim.before.acc),
        asr=_number(victim.before.asr),
        outliers=_of(found, OUTLIER.id),
        works=_of(found, TRIGGER.id, COMMON.id),
        others=tuple(f.id for f in found if f.id not in {OUTLIER.id, TRIGGER.id, COMMON.id}),
        seconds=time.perf_counter() - start,
        settings={"case": plain(case), "search": plain(SEARCH)},
        versions=dict(versions()),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _of(findings: Iterable[Finding], *rules: str) -> tuple[str, ...]:
    return tuple(f"{found.subject}: {found.value}" for found in findings if found.id in rules)


def markdown(cells: Sequence[Scanned]) -> str:
    """Return a table of how many models of each case had an outlier, and the two totals."""
    lines = [
        "| model | backdoor | outlier | works, no outlier | found |",
        "|---|---|--:|--:|---|",
    ]
    for name in dict.fromkeys(cell.case for cell in cells):
        mine = [cell for cell in cells if cell.case == name]
        outliers, works = (
            sum(bool(getattr(c, key)) for c in mine) for key in ("outliers", "works")
        )
        planted = "planted" if mine[0].planted else "none"
        found = "; ".join(dict.fromkeys(place for c in mine for place in map(_place, c.outliers)))
        counts = f"{outliers} of {len(mine)} | {works} of {len(mine)}"
        lines.append(f"| {name} | {planted} | {counts} | {found or '-'} |")
    totals = [
        f"{label}: {sum(bool(cell.outliers) for cell in part)} of {len(part)}"
        for label, part in (
            ("detections", [cell for cell in cells if cell.planted]),
            ("false alarms", [cell for cell in cells if not cell.planted]),
        )
    ]
    return "\n".join([*lines, "", "; ".join(totals)]) + "\n"


def _place(found: str) -> str:
    return found.partition(": success")[0]
