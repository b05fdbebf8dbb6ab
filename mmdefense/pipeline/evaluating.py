"""``mmdefense evaluate``: measure a model on clean data and under an attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from mmdefense import registry
from mmdefense.analysis.measurement import learnt_tensors, measured, read_trigger
from mmdefense.attacks.base import Attack
from mmdefense.checkpoints.models import weight_names
from mmdefense.checkpoints.seals import Seal, read_once
from mmdefense.checkpoints.weights import hash_file
from mmdefense.data.batch import split
from mmdefense.defenses.base import versions
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.errors import BadInputError
from mmdefense.metrics.permanence import TUNING, Retuning
from mmdefense.metrics.permanence import retune as retuned
from mmdefense.metrics.utility import check_utility
from mmdefense.pipeline.sources import AUTO, Opened, Source
from mmdefense.pipeline.vetting import open_vetted
from mmdefense.prepared import Prepared
from mmdefense.protocol import ReadingAdapter, Task, TaskAdapter, missing_members, traits
from mmdefense.report.evaluation import EvaluatedData, EvaluatedModel, Evaluation, TriedAttack
from mmdefense.report.recorded import add_evaluation, recordable
from mmdefense.runtime.run import Event, Progress, Run, silent
from mmdefense.settings import checked_settings
from mmdefense.training import Training

__all__ = ["AttackChoice", "Retune", "evaluate", "evaluate_files", "retuning_of"]

_TUNING = 1000
"""Largest number of samples that a retuning attack trains on, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class AttackChoice:
    """An attack as specified by the user, before model and data are opened.

    Attributes:
        name: A name of ``mmdefense list attacks``; None uses the trigger in the file.
        trigger: A picture with alpha or an npz archive; or, with the name of an attack that learns
            its trigger, the safetensors file with the learned trigger.
        target: The attacker's target: a class by its number or name, or a text.
        settings: Further fields of the attack.
    """

    name: str | None = None
    trigger: Path | None = None
    target: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name is None and self.trigger is None:
            raise BadInputError(
                "a target or settings have no effect without an attack or a trigger"
            )
        if self.name is None and self.settings:
            raise BadInputError(
                f"settings belong to a named attack; a trigger from a file has none, got "
                f"{', '.join(self.settings)}"
            )
        learnt = self.trigger is not None and self.trigger.suffix == ".safetensors"
        if self.trigger is not None and learnt != (self.name is not None):
            raise BadInputError(
                "give an attack by name, or a trigger as a picture or npz; give both only if the "
                "file is a .safetensors with the learned trigger of that attack, got "
                f"{self.name or 'no attack'} and {self.trigger}"
            )
        if self.name is not None:
            kind = registry.load("attacks", self.name)  # fails early on a misspelt name
            checked_settings(kind, self.settings)

    def build(self, classes: tuple[str, ...]) -> Attack[Any]:
        """Return the attack on a model with these class names.

        Raises:
            BadInputError: If the target is not a class, or a setting is wrong.
        """
        if self.name is None:
            assert self.trigger is not None
            target = 0 if self.target is None else _class_number(self.target, classes)
            return read_trigger(self.trigger, target)
        kind = registry.load("attacks", self.name)
        given = dict(self.settings)
        if self.target is not None:
            is_class = get_type_hints(kind).get("target") is int
            given["target"] = _class_number(self.target, classes) if is_class else self.target
        if self.trigger is not None:
            given["fitted"] = learnt_tensors(self.trigger)
        attack: Attack[Any] = kind(**checked_settings(kind, given))
        return attack


def _class_number(target: Any, classes: tuple[str, ...]) -> int:
    """Return the index of the class that the user specified.

    Raises:
        BadInputError: If it is neither a class name nor a number.
    """
    if str(target) in classes:
        return classes.index(str(target))
    try:
        return int(target)
    except (TypeError, ValueError):
        known = ", ".join(classes) if classes else "the model and the data name none"
        raise BadInputError(
            f"target must be a class by its number or name, got {target!r}; classes: {known}"
        ) from None


def evaluate(
    model: str | Path | nn.Module | TaskAdapter[Any],
    data: Any,
    *,
    attack: str | Attack[Any] | None = None,
    target: Any = None,
    trigger: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    task: str = AUTO,
    arch: str | None = None,
    weights: str | None = None,
    split: str = "test",
    reading: Mapping[str, Any] | None = None,
    device: str = "cpu",
    retune: int = 0,
    clean_twin: str | Path | nn.Module | TaskAdapter[Any] | None = None,
    record: str | Path | None = None,
    accept_low_utility: bool = False,
    accept_findings: bool = False,
) -> Evaluation:
    """Measure a model on test data and, if an attack or a trigger is given, with the trigger.

    Args:
        model: A folder, a file or a hub id; or a module, or an adapter around one.
        data: Clean samples that the model was not trained on: a location, as for
            ``mmdefense evaluate --data``; or samples, as for :func:`mmdefense.purify`.
        attack: A name from ``mmdefense list attacks``, or an attack as returned by ``plant``.
        target: The attacker's target: a class by its number or name, or a text.
        trigger: A picture with alpha, or an npz archive; see :class:`AttackChoice`.
        settings: Further fields of an attack given by name.
        task: Name of the task; by default that of the model.
        arch: ``module:callable`` that builds the model for a state dict.
        weights: Key of the weights within a checkpoint.
        split: ``"train"`` or ``"test"``, if the data is split.
        reading: Reading options by name; see :class:`mmdefense.pipeline.sources.Source`.
        device: For example ``"cpu"`` or ``"cuda"``; a module is not moved.
        retune: Number of poisoned samples N that a copy of the model is fine-tuned on, to see
            whether the backdoor comes back; 0 skips this. See
            :func:`mmdefense.metrics.permanence.retune`.
        clean_twin: A model that never had the backdoor, retuned for comparison.
        record: The output folder of a purification; the measurements are added to its record and
            page.
        accept_low_utility: Whether to continue if the model's score on the data is near chance.
        accept_findings: Whether to continue if the scan of the model's files has high-level
            findings.

    Raises:
        LowUtilityError: If the model performs too poorly on the data as read.
        BadInputError: If an argument is not usable, a file of the model has high-level findings,
            or ``record`` belongs to other models.
        UnsupportedError: If a library is not installed, or no adapter accepts the model.

    Example:
        >>> import mmdefense as mmd
        >>> arch = "my_models:SignNet"
        >>> mmd.evaluate("model.safetensors", "images", arch=arch, attack="badnets", target="stop")
        Evaluation of model.safetensors on images
          ACC 100.0 % (95 % interval 88.6 to 100.0, n = 30)
          attack badnets, target 2 (stop)
          ASR ...
          RA ...
    """
    choice: Attack[Any] | AttackChoice | None
    others = not (target is None and trigger is None and not settings)
    if isinstance(attack, Attack):
        if others:
            raise BadInputError(
                "an attack object already has its target, trigger and settings; leave them out"
            )
        choice = attack
    elif attack is None and not others:
        choice = None
    else:
        path = None if trigger is None else Path(trigger)
        choice = AttackChoice(name=attack, trigger=path, target=target, settings=settings or {})
    source = Source(
        model=model,
        data=data,
        task=task,
        arch=arch,
        weights=weights,
        split=split,
        reading=reading or {},
        device=device,
        accept_low_utility=accept_low_utility,
        accept_findings=accept_findings,
    )
    asked = Retune(retune, clean_twin) if retune or clean_twin is not None else None
    return evaluate_files(source, choice, retune=asked, record=record)


@dataclass(frozen=True)
class Retune:
    """A retuning attack, as requested by the user.

    Attributes:
        count: Number of poisoned samples.
        twin: A model that never had the backdoor, for comparison, or None.
    """

    count: int
    twin: Any = None

    def __post_init__(self) -> None:
        if self.twin == "":  # which as a path would be the current folder
            raise BadInputError("the clean twin must be a folder, a file or an id, got ''")
        if self.count < 1 and self.twin is not None:
            raise BadInputError(
                "the clean twin is used by the retuning attack only; add --retune 5, the number "
                "of poisoned samples"
            )
        if self.count < 1:
            raise BadInputError(f"retune must be at least 1 poisoned sample, got {self.count}")


def evaluate_files(
    source: Source,
    attack: Attack[Any] | AttackChoice | None = None,
    *,
    retune: Retune | None = None,
    record: str | Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the model of ``source`` on its data and, if an attack is given, with its trigger.

    Args:
        source: Model and data.
        attack: The attack, if any.
        retune: The retuning attack, which shows whether the backdoor comes back; None skips it.
        record: The output folder of a purification; the measurements are added to its record and
            page.
        command: The command line, for the record.
        progress: Called with progress events.

    Raises:
        LowUtilityError: If the model performs too poorly on the data as read.
        BadInputError: If an argument is not usable, the attack is for another task, or ``record``
            belongs to other models.
        UnsupportedError: If a library is not installed, or no adapter accepts the model.
    """
    if retune is not None and attack is None:
        raise BadInputError(
            "a retuning attack needs the backdoor's attack or trigger; give --attack or --trigger"
        )
    report = progress or silent
    report(Event("reading", 0, 1))
    with read_once(source.model) as seal:
        opened = open_vetted(source).opened
    decoded = getattr(opened.data, "in_memory", None)  # decoded once for several passes
    if decoded is not None:
        opened = dataclasses.replace(opened, data=decoded())
    report(Event("reading", 1, 1))
    prepared = opened.prepare(to_learn=False)
    adapter, samples = prepared.adapter, prepared.samples
    model = _model_info(source, prepared, seal)
    known = {} if seal is None else seal.by_path()
    place = None if record is None else recordable(Path(record), model, known)
    task, classes = opened.task, _classes(opened)
    tried = attack.build(classes) if isinstance(attack, AttackChoice) else attack
    if tried is not None and task.name not in tried.tasks:
        raise BadInputError(
            f"{type(tried).__name__} is an attack on {' and '.join(tried.tasks)}, but the model "
            f"is for {task.name}; choose an attack for that task"
        )
    raw = samples if decoded is None else opened.data
    report(Event("measuring", 0, 1))
    found = measured(prepared, raw, tried, accept_low_utility=source.accept_low_utility)
    report(Event("measuring", 1, 1))
    twin, twin_info = None, None
    if retune is not None and retune.twin is not None:
        twin, twin_info = _clean_twin(source, retune.twin, raw, model)
    retuning = None
    if retune is not None:
        assert tried is not None
        retuning = _retuned(adapter, twin, raw, tried, retune.count, Run(tried.seed, report))
    score_name = traits(adapter).score_name
    own = task.metric == score_name
    evaluation = Evaluation(
        model=model,
        data=EvaluatedData(
            name=_named(source.data, "samples"),
            split=source.split,
            samples=len(samples),
            fingerprint=prepared.fingerprint,
        ),
        task=task.name,
        metric=task.metric,
        value=found.score.value if own else task.measure(adapter, samples),
        score=found.score,
        score_name=score_name,
        also=_also(task, adapter, samples),
        attack=None if tried is None else _tried(attack, tried, classes),
        asr=found.asr,
        ra=found.ra,
        retuning=retuning,
        twin=twin_info,
        versions=versions(),
        device=str(next(adapter.model.parameters()).device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )
    return evaluation if place is None else add_evaluation(place, evaluation)


def _clean_twin(
    source: Source, where: Any, raw: Any, model: EvaluatedModel
) -> tuple[TaskAdapter[Any], EvaluatedModel]:
    """Return the clean twin in an adapter for the same data, and its description.

    Raises:
        BadInputError: If it is the model itself, or takes different inputs.
        LowUtilityError: If it performs too poorly on the data.
    """
    twin_source = dataclasses.replace(source, model=where)
    with read_once(where) as seal:
        opened = open_vetted(twin_source).opened
    prepared = dataclasses.replace(opened, data=raw).prepare(to_learn=False)
    check_utility(prepared, accept=source.accept_low_utility)
    info = _model_info(twin_source, prepared, seal)
    if info.sha256 == model.sha256:
        raise BadInputError(f"the clean twin {info.name} has the same weights as the model itself")
    return prepared.adapter, info


def _retuned(
    adapter: TaskAdapter[Any],
    twin: TaskAdapter[Any] | None,
    raw: Any,
    attack: Attack[Any],
    count: int,
    run: Run,
) -> Retuning:
    """Retune on up to half of the data, at most the paper's number of samples; test on the rest.

    Raises:
        BadInputError: If there are too few samples.
    """
    seed = attack.seed
    test, tuning = split(raw, min(0.5, _TUNING / len(raw)), seed)
    if count > len(tuning):
        raise BadInputError(
            f"retune must be at most {len(tuning)}, the number of samples for training (the other "
            f"{len(test)} are for testing), got {count}; give more data"
        )
    training = retuning_of(adapter)
    return retuned(adapter, tuning, test, attack, count, twin=twin, training=training, run=run)


def retuning_of(adapter: TaskAdapter[Any]) -> Training:
    """Return a retuning attack's training settings: the paper's, with the model's optimizer."""
    tuning = FineTuning(lr=TUNING.lr, steps=TUNING.steps, batch_size=TUNING.batch_size)
    return dataclasses.replace(
        tuning.training(adapter), schedule="constant", augment=False, max_norm=TUNING.max_norm
    )


def _model_info(source: Source, prepared: Prepared[Any], seal: Seal | None) -> EvaluatedModel:
    model = prepared.model
    files = {} if seal is None else {n: seal.files[n] for n in weight_names(source.model)}
    return EvaluatedModel(
        name=_named(source.model, type(model).__name__),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        sha256=prepared.sha256,
        files=files,
    )


def _named(given: Any, otherwise: str) -> str:
    return str(given) if isinstance(given, (str, Path)) else otherwise


def _classes(opened: Opened) -> tuple[str, ...]:
    """Return the class names of the data, in the order of its labels, or else of the model."""
    named = getattr(opened.data, "classes", ())
    if not named and not missing_members(opened.adapter, ReadingAdapter):
        named = opened.adapter.reading().get("classes", ())  # type: ignore[attr-defined]
    return tuple(map(str, named or ()))


def _also(task: Task, adapter: TaskAdapter[Any], samples: Any) -> dict[str, float]:
    measure = getattr(task, "also", None)
    return dict(measure(adapter, samples)) if measure is not None else {}


_ONLY_FOR_PLANTING = {"ratio", "sam_radius", "trace_weight"}  # nothing is planted here


def _tried(
    asked: Attack[Any] | AttackChoice | None, attack: Attack[Any], classes: tuple[str, ...]
) -> TriedAttack:
    shown = {
        entry.name: getattr(attack, entry.name)
        for entry in dataclasses.fields(attack)
        if entry.repr and entry.name not in _ONLY_FOR_PLANTING
    }
    target = shown.pop("target", None)
    is_class = isinstance(target, int) and target < len(classes)
    file = asked.trigger if isinstance(asked, AttackChoice) else None
    name = registry.name_of("attacks", type(attack))
    return TriedAttack(
        name="file" if isinstance(asked, AttackChoice) and asked.name is None else name,
        settings=shown,
        target=target,
        target_name=classes[target] if is_class else "",
        files={} if file is None else {file.name: hash_file(file)},
    )
