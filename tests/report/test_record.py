from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from records import CHOICE, comparison, purification

from mmdefense.defenses.outcome import TriggerSearch
from mmdefense.errors import BadInputError
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.record import (
    AttackInfo,
    ComparisonRecord,
    PurificationRecord,
    read_record,
    write_record,
)

FULL = purification(
    attack=AttackInfo(attack="BadNets", before=Rates(acc=0.9, asr=1.0), after=Rates(acc=0.9)),
    triggers=TriggerSearch(targets=10, found=0, families=("patch", "additive"), threshold=0.75),
    choice=CHOICE,
)


@pytest.mark.parametrize("record", [purification(), FULL, comparison()])
def test_a_record_comes_back_from_its_file_as_it_was(record, tmp_path: Path):
    write_record(record, tmp_path / "purification.json")
    assert read_record(tmp_path / "purification.json") == record


def test_settings_of_any_type_become_plain_json():
    record = purification(settings={"layers": ("a", "b"), "where": Path("x"), "tau": math.inf})
    assert record.defense.settings == {"layers": ["a", "b"], "where": "x", "tau": None}
    assert PurificationRecord.from_json(record.to_json()) == record


def test_a_loss_that_is_not_finite_is_null_in_the_file_and_still_valid_json():
    record = replace(purification(), history=({"stage": "fip", "step": 1, "loss": math.nan},))
    text = record.to_json()
    assert "NaN" not in text
    assert PurificationRecord.from_json(text).history[0]["loss"] is None


def test_a_number_that_must_stand_reads_as_nan_where_the_file_has_null():
    record = purification(guard={"after": math.nan})
    assert math.isnan(PurificationRecord.from_json(record.to_json()).guard.after)


def _edited(**changes):
    return json.dumps(json.loads(purification().to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "schema"),
        (_edited(schema=99), "schema 1, got 99"),
        (_edited(kind="other"), "kind"),
        (_edited(surprise=1), "surprise"),
        (_edited(seconds="long"), "purification.seconds must be a number"),
        (_edited(model={"name": "x"}), "purification.model lacks the keys"),
        (_edited(layers=[{"layer": 3, "change": 0.1}]), "purification.layers.layer must be a str"),
    ],
)
def test_what_is_no_record_is_refused_with_one_line_that_says_where(text, says):
    with pytest.raises(BadInputError, match=says) as caught:
        PurificationRecord.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_the_other_kind_are_refused(tmp_path: Path):
    with pytest.raises(BadInputError, match="cannot be read"):
        read_record(tmp_path / "none.json")
    with pytest.raises(BadInputError, match="kind"):
        ComparisonRecord.from_json(purification().to_json())


def test_a_rate_in_percent_is_refused_and_one_that_is_nan_was_not_measured():
    with pytest.raises(BadInputError, match="asr must be a fraction"):
        Rates(asr=97.4)
    assert Rates(asr=math.nan) == Rates()


def test_rows_fall_back_to_the_guard_where_no_attack_is_known():
    (row,) = purification().rows
    assert (row.before.acc, row.after.acc, row.after.asr) == (0.97, 0.96, None)
    (row,) = FULL.rows
    assert row.before.asr == 1.0
