"""The recipe that counts detections and false alarms; the scans themselves are made up here."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmdefense.errors import BadInputError
from mmdefense.evaluation import calibration
from mmdefense.evaluation.calibration import calibrate, clean_twin, markdown
from mmdefense.evaluation.cases import named_cases
from mmdefense.findings import ScanRecord
from mmdefense.scanning.behaviour import OUTLIER, SMOOTHNESS, TRIGGER
from mmdefense.store import Store

RECIPE = Path(__file__).parents[2] / "recipes" / "scan_calibration.py"


@pytest.fixture
def scans(monkeypatch):
    """Let scans find, in turn, an outlier and one that is not; return who was scanned."""
    given = [OUTLIER.found("patch to 0", "success 99%"), TRIGGER.found("patch to 1", "success 91%")]
    seen = []

    def scan(adapter, data, *, seed, progress, **_):
        seen.append((len(data), seed))
        found = [given[(len(seen) - 1) % 2], SMOOTHNESS.found("the model", "lambda_max 1")]
        return ScanRecord(model="m", findings=found, parts=["behaviour"])

    monkeypatch.setattr(calibration, "scan", scan)
    return seen


def cases(*names):
    found = named_cases(names)
    return [replace(case, training=replace(case.training, steps=1)) for case in found]


def test_a_scan_is_kept_and_not_done_again(scans, tmp_path):
    first = calibrate(cases("digits-badnets"), [7], tmp_path)
    twin = clean_twin(*cases("digits-badnets")).name
    assert twin.startswith("digits-clean-")
    assert [(c.case, c.planted) for c in first] == [("digits-badnets", True), (twin, False)]
    assert len(scans) == 2
    again = calibrate(cases("digits-badnets"), [7], tmp_path)
    assert len(scans) == 2
    assert [replace(cell, asr=0.0) for cell in again] == [replace(cell, asr=0.0) for cell in first]
    store = Store(tmp_path)
    (tmp_path / store.content_path(store.entries("calibration")[0])).write_text("{")
    with pytest.raises(BadInputError, match="is damaged; `mmdefense store rm"):
        calibrate(cases("digits-badnets"), [7], tmp_path)


def test_victims_of_one_net_and_data_set_share_their_twin():
    first, second = map(clean_twin, cases("digits-badnets", "digits-blended"))
    assert first == second
    assert first.attack is None


def test_the_recipe_prints_detections_and_false_alarms(scans, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--smoke", "--out", str(tmp_path)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    said = capsys.readouterr().out
    assert "| digits-badnets | planted | 1 of 1 | 0 of 1 | patch to 0 |" in said
    assert "| none | 0 of 1 | 1 of 1 | - |" in said
    assert "detections: 1 of 1; false alarms: 0 of 1" in said


def test_models_of_the_zoo_are_scanned_as_they_are(scans, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("mmdefense.evaluation.victims.train", None)
    names = ("--case", "digits-badnets", "--case", "digits-clean")
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--zoo", *names, "--out", str(tmp_path)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert "detections: 1 of 1; false alarms: 0 of 1" in capsys.readouterr().out
    assert len(scans) == 2


def test_no_cells_are_an_empty_table():
    assert "detections: 0 of 0" in markdown([])
