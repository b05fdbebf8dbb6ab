"""Puts what ``mmdefense evaluate`` measured into the record, card and page of a purification."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from mmdefense.checkpoints.outputs import CARD
from mmdefense.checkpoints.runs import write_atomically
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import Rates, defense_effectiveness_rating
from mmdefense.report.card import write_card
from mmdefense.report.compare import purification_record, rebuild
from mmdefense.report.evaluation import EvaluatedModel, Evaluation, Proportion
from mmdefense.report.record import AttackFigures, PurificationRecord
from mmdefense.report.statement import differing, materials, subjects, write_statement

__all__ = ["GIVEN", "PURIFIED", "add_evaluation", "check_recordable"]

GIVEN, PURIFIED = "given model", "purified model"


def check_recordable(out: Path, model: EvaluatedModel) -> tuple[str, ...]:
    """Return which models of an output these weights are: the given one, the purified, or both.

    Raises:
        BadInputError: If they are neither, if there is no record, or if the output's files are not
            those that were written.
    """
    record = purification_record(out)
    if changed := differing(out):
        raise BadInputError(
            f"{out} is not as it was written ({'; '.join(changed)}), so that nothing can be added "
            "to its record"
        )
    known = record.model
    roles = {
        GIVEN: _is_of(model, known.sha256_before, known.files_before.values()),
        PURIFIED: _is_of(model, known.sha256_after, known.files_after.values()),
    }
    if not any(roles.values()):
        raise BadInputError(
            f"{model.name} is neither the model that was given to {out} nor the purified one, by "
            f"the SHA-256 of its weights ({model.sha256[:12]}...); evaluate one of these"
        )
    return tuple(role for role, matches in roles.items() if matches)


def _is_of(model: EvaluatedModel, sha256: str | None, files: Collection[str]) -> bool:
    """Say whether a model has these weights, by those in memory or by all of its files."""
    held = set(model.files.values())
    return model.sha256 == sha256 or (bool(held) and held == set(files))


def add_evaluation(out: Path, evaluation: Evaluation) -> Evaluation:
    """Add an evaluation to an output: to its record, model card and page, and write its statement.

    One of the same model, data and attack that was there before is replaced.

    Returns:
        The evaluation, with which of the models it is of.

    Raises:
        BadInputError: See :func:`check_recordable`.
        OSError: If a file cannot be written.
    """
    roles = check_recordable(out, evaluation.model)
    added = dataclasses.replace(evaluation, recorded_as=roles)
    before = purification_record(out)
    kept = [one for one in before.evaluations if _key(one) != _key(added)]
    record = dataclasses.replace(before, evaluations=(*kept, added))
    if added.attack is not None:
        record = dataclasses.replace(record, attack=_figures(record, added))
    listed = subjects(out)
    inputs = materials(out)
    if not record.unchanged:
        _renew_card(record, out / CARD)
    write_statement(record, out, inputs, only={*listed, CARD})
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


def _figures(record: PurificationRecord, added: Evaluation) -> AttackFigures:
    """Return the rates of both models, as far as they were measured, under the attack of one."""
    like = [
        one
        for one in record.evaluations
        if (one.data.fingerprint, one.attack) == (added.data.fingerprint, added.attack)
    ]
    rates = {
        role: Rates(acc=one.value, asr=_value(one.asr), ra=_value(one.ra))
        for one in like
        for role in one.recorded_as
    }
    before, after = rates.get(GIVEN, Rates()), rates.get(PURIFIED, Rates())
    words = f"{added.attack}, on {added.data.samples} samples of {added.data.name}"
    return AttackFigures(
        attack=words,
        before=before,
        after=dataclasses.replace(after, der=defense_effectiveness_rating(before, after)),
        metric=added.metric,
    )


def _value(share: Proportion | None) -> float | None:
    return None if share is None else share.value
