"""Puts what ``mmdefense evaluate`` measured into the record, card and page of a purification."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmdefense.checkpoints.outputs import CARD
from mmdefense.checkpoints.runs import write_atomically
from mmdefense.checkpoints.seals import marks_in
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import Rates, defense_effectiveness_rating
from mmdefense.report.card import write_card
from mmdefense.report.compare import purification_record, rebuild
from mmdefense.report.evaluation import EvaluatedModel, Evaluation, Proportion
from mmdefense.report.record import AttackInfo, PurificationRecord
from mmdefense.report.statement import differing, materials, subjects, write_statement

__all__ = ["GIVEN", "PURIFIED", "Recordable", "add_evaluation", "recordable"]

GIVEN, PURIFIED = "given model", "purified model"


@dataclass(frozen=True)
class Recordable:
    """An output whose files are those that were written, and to which a model belongs.

    Attributes:
        out: The folder.
        roles: Which of its models that is: the given one, the purified, or both.
        marks: What tells that a file has been changed since.
    """

    out: Path
    roles: tuple[str, ...]
    marks: Mapping[str, Any]


def recordable(
    out: Path, model: EvaluatedModel, known: Mapping[str, str] | None = None
) -> Recordable:
    """Return an output as what an evaluation of a model can be added to.

    Args:
        out: The folder.
        model: The model.
        known: SHA-256 of files that were hashed already, by their path.

    Raises:
        BadInputError: If it is neither of the output's models, if there is no record, or if the
            output's files are not those that were written.
    """
    record, marks = purification_record(out), marks_in(out)
    if changed := differing(out, known):
        raise BadInputError(
            f"{out} is not as it was written ({'; '.join(changed)}), so that nothing can be added "
            "to its record"
        )
    its = record.model
    roles = {
        GIVEN: _is_of(model, its.sha256_before, its.files_before.values()),
        PURIFIED: _is_of(model, its.sha256_after, its.files_after.values()),
    }
    if not any(roles.values()):
        raise BadInputError(
            f"{model.name} is neither the model that was given to {out} nor the purified one, by "
            f"the SHA-256 of its weights ({model.sha256[:12]}...); evaluate one of these"
        )
    return Recordable(out, tuple(role for role, matches in roles.items() if matches), marks)


def _is_of(model: EvaluatedModel, sha256: str | None, files: Collection[str]) -> bool:
    """Say whether a model has these weights, by those in memory or by all of its files."""
    held = set(model.files.values())
    return model.sha256 == sha256 or (bool(held) and held == set(files))


def add_evaluation(place: Recordable, evaluation: Evaluation) -> Evaluation:
    """Add an evaluation to an output: to its record, model card and page, and write its statement.

    One of the same model, data and attack that was there before is replaced. Files of the output
    that lie there as they did when it was checked are not hashed again.

    Returns:
        The evaluation, with which of the models it is of.

    Raises:
        BadInputError: See :func:`recordable`.
        OSError: If a file cannot be written.
    """
    out = place.out
    if marks_in(out) != place.marks:
        place = recordable(out, evaluation.model)
    added = dataclasses.replace(evaluation, recorded_as=place.roles)
    before = purification_record(out)
    kept = [one for one in before.evaluations if _key(one) != _key(added)]
    record = dataclasses.replace(before, evaluations=(*kept, added))
    if added.attack is not None:
        record = dataclasses.replace(record, attack=_attack(record, added))
    listed = subjects(out)
    inputs = materials(out)
    if not record.unchanged:
        _renew_card(record, out / CARD)
    same = {name: value for name, value in listed.items() if name != CARD}
    write_statement(record, out, inputs, only={*listed, CARD}, known=same)
    rebuild(out)
    return added


def _renew_card(record: PurificationRecord, card: Path) -> None:
    with TemporaryDirectory() as folder:
        fresh = Path(folder) / CARD
        if card.is_file():
            shutil.copyfile(card, fresh)
        write_card(record, fresh)
        text = fresh.read_bytes()
    write_atomically(card, lambda file: file.write(text))


def _key(one: Evaluation) -> tuple[object, ...]:
    """Return what an evaluation is of: model, samples and attack."""
    return one.model.sha256, one.data.fingerprint, one.attack


def _attack(record: PurificationRecord, added: Evaluation) -> AttackInfo:
    """Return the rates of both models, as far as they were measured, under the attack of one."""
    like = [
        one
        for one in record.evaluations
        if (one.data.fingerprint, one.attack) == (added.data.fingerprint, added.attack)
    ]
    rates = {
        role: Rates(
            acc=one.value,
            asr=_value(one.asr),
            ra=_value(one.ra),
            retuned=None if one.retuning is None else one.retuning.asr,
        )
        for one in like
        for role in one.recorded_as
    }
    before, after = rates.get(GIVEN, Rates()), rates.get(PURIFIED, Rates())
    words = f"{added.attack}, on {added.data.samples} samples of {added.data.name}"
    return AttackInfo(
        attack=words,
        before=before,
        after=dataclasses.replace(after, der=defense_effectiveness_rating(before, after)),
        metric=added.metric,
    )


def _value(share: Proportion | None) -> float | None:
    return None if share is None else share.value
