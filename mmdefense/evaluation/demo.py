"""A real backdoor, planted in a small classifier and removed in several ways: ``make demo``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmdefense import registry
from mmdefense.analysis.evidence import embeddings, sharpness
from mmdefense.checkpoints.folders import new_folder
from mmdefense.checkpoints.models import write_model
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.data.batch import few
from mmdefense.defenses.base import Result, versions
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.evaluation.victims import Victim, purified_row, train_victim
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.plots.base import Plot
from mmdefense.plots.embedding_map import EmbeddingMap
from mmdefense.plots.loss_smoothness import LossSmoothness
from mmdefense.protocol import Case
from mmdefense.report.page import render_page
from mmdefense.report.record import (
    ComparisonRecord,
    DataInfo,
    ModelInfo,
    Provenance,
    Row,
    write_record,
)
from mmdefense.runtime.run import Progress, Run, named
from mmdefense.settings import check_seed

__all__ = ["DEFENSES", "run_demo"]

DEFENSES = ("fip", "fast-fip", "tsbd", "fine-pruning", "baeraser")
_BASELINE = "fine-tuning"
_CLEAN, _BOUND = 0.2, 0.05
"""Share of the training set that a demo's defenses get, and their bound on the drop of the metric.

With less data, or a smaller bound, the guard cannot decide without cross-validation, which takes up
to five times as long. Ours.
"""
_CURVATURE_SAMPLES = 32  # ours: to measure the curvature of each model on


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
    task: str = "image-classification",
    case: Case | None = None,
    defenses: Sequence[str] = DEFENSES,
) -> ComparisonRecord:
    """Train a victim, purify it with each defense, and write the comparison.

    The defenses have their defaults, but for a utility bound of 5 points.

    ``out`` gets the victim's weights (``model.safetensors``), ``comparison.json`` and the
    page ``report.html``.

    Args:
        out: The folder to create.
        seed: Seed of the victim and of the defenses.
        force: Whether to replace an earlier output at ``out``.
        progress: Called with each event; stages are named after the defense.
        task: The name of a task, whose demo case, or else first case, is the victim, with a fifth
            of the training set as clean data.
        case: Another victim instead.
        defenses: Names of defenses; plain fine-tuning with the budget of the first is added.

    Raises:
        BadInputError: If the folder exists or cannot be written.
    """
    check_seed(seed)
    case = case or _demo_case(task)
    with new_folder(out, force=force) as folder:
        victim = train_victim(case, Run(seed, named("victim", progress)))
        rows, results = _purified(victim, defenses, seed, progress)
        record = _record(case, victim, rows, seed)
        write_model(victim.adapter.model, folder)
        write_record(record, folder / "comparison.json")
        render_page(record, list(_plots(victim, results)), folder / "report.html")
    return record


def _demo_case(task: str) -> Case:
    cases: Sequence[Case] = registry.load("tasks", task)().cases()
    return replace(next((case for case in cases if case.demo), cases[0]), clean=_CLEAN)


def _purified(
    victim: Victim, defenses: Sequence[str], seed: int, progress: Progress | None
) -> tuple[list[Row], dict[str, Result]]:
    """Return a row for each defense, and for plain fine-tuning with the budget of the first.

    Also return the results of the defenses that the model supports.
    """
    chosen = {
        name: registry.load("defenses", name)(seed=seed, max_utility_drop=_BOUND)
        for name in defenses
    }
    chosen[_BASELINE] = FineTuning.like(chosen[defenses[0]])
    rows, results = [], {}
    for name, defense in chosen.items():
        baseline = "" if name == _BASELINE else _BASELINE
        row, purified = purified_row(victim, name, defense, baseline, named(name, progress))
        rows.append(row)
        if purified is not None:
            results[name] = purified.result
    return rows, results


def _record(case: Case, victim: Victim, rows: Sequence[Row], seed: int) -> ComparisonRecord:
    model, clean = victim.adapter.model, victim.clean
    return ComparisonRecord(
        title=f"A backdoor in a model of {case.data}, and its removal",
        task=case.task,
        metric=victim.task.metric,
        model=ModelInfo(
            name=case.name,
            architecture=type(model).__name__,
            parameters=sum(p.numel() for p in model.parameters()),
            sha256_before=hash_weights(model),
        ),
        data=DataInfo(
            name=f"{100 * case.clean:g} % of the training set of {case.data}",
            samples=len(clean),
            fingerprint=clean.fingerprint(),
        ),
        attack="none" if victim.attack is None else victim.attack.in_words(),
        rows=tuple(rows),
        provenance=Provenance(
            seed=seed,
            versions=versions(),
            device=str(next(model.parameters()).device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            threads=(torch.get_num_threads(),),
        ),
    )


def _plots(victim: Victim, results: dict[str, Result]) -> Iterator[Plot]:
    """Yield the plots: the attack, what each defense found, and the model before and after."""
    attack = victim.attack
    assert attack is not None
    triggered = attack.triggered(victim.test, victim.adapter)
    yield victim.task.show(triggered.clean, triggered.samples)
    for name, result in results.items():
        for plot in result.plots:
            yield replace(plot, of=name)
    yield _smoothness(victim, results)
    name, result = next(iter(results.items()))
    if (embedding := _embedding(victim, triggered, result)) is not None:
        yield replace(embedding, of=name)


def _smoothness(victim: Victim, results: dict[str, Result]) -> LossSmoothness:
    """Return the curvature of the victim and of each purified model, side by side.

    Few samples are used, since there are many models.
    """
    some = victim.adapter.samples(few(victim.clean, _CURVATURE_SAMPLES))
    adapters = {"before": victim.adapter, **{name: r.adapter for name, r in results.items()}}
    measured = {name: sharpness(adapter, some) for name, adapter in adapters.items()}
    found = {name: value for name, value in measured.items() if value is not None}
    return LossSmoothness(
        list(found),
        [smoothness.trace for smoothness in found.values()],
        [smoothness.lambda_max for smoothness in found.values()],
    )


def _embedding(
    victim: Victim, triggered: TriggeredSamples[Any], result: Result
) -> EmbeddingMap | None:
    """Map clean and triggered test samples, before and after; None without embeddings."""
    clean, stamped, truth = (
        few(part, count)
        for part, count in ((victim.test, 200), (triggered.samples, 90), (triggered.clean, 90))
    )
    labels = [part.strata() for part in (clean, truth)]
    read = [victim.adapter.samples(part) for part in (clean, stamped)]
    pairs = [embeddings(victim.adapter, result.adapter, part) for part in read]
    known = [label for label in labels if label is not None]
    found = [pair for pair in pairs if pair is not None]
    if len(known) < 2 or len(found) < 2:
        return None
    before, after = (torch.cat(points) for points in zip(*found, strict=True))
    crossed = torch.arange(len(before)) >= len(clean)
    names = getattr(victim.test, "classes", ())
    return EmbeddingMap.by_tsne(before, after, torch.cat(known), triggered=crossed, names=names)
