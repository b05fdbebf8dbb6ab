"""What the scan calls high is not loaded, unless the user says so; the evidence then says it."""

from __future__ import annotations

import json

import pytest
import torch
from domains import DOMAINS

import mmdefense as mmd
from mmdefense.checkpoints import models
from mmdefense.errors import BadInputError
from mmdefense.report.record import read_record

WALK = "{{ ''['__cla' ~ 'ss__'] }}"
STEPS = ("--defense", "fine-tuning", "--set", "steps=2", "--set", "batch_size=4")
ANY_DROP = ("--max-utility-drop", "1", "--accept-low-utility")


@pytest.fixture
def folder(tmp_path):
    """A model of images with a hostile template beside its weights, and its data."""
    found = DOMAINS["image"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found.model(tmp_path / "model")
    found.data(tmp_path / "data")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": WALK}))
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch):
    """Fail where a model is loaded."""

    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(models, "load_folder", load)


def commands(folder):
    given = ("--data", folder / "data")
    return {
        "purify": ("purify", folder / "model", *given, "-o", folder / "out", *STEPS, *ANY_DROP),
        "dry run": ("purify", folder / "model", *given, "-o", folder / "out", "--dry-run"),
        "evaluate": ("evaluate", folder / "model", *given, "--accept-low-utility"),
    }


@pytest.mark.parametrize("command", ["purify", "dry run", "evaluate"])
def test_it_is_refused_before_it_is_loaded(folder, unloaded, mmdefense, command):
    outcome = mmdefense(*commands(folder)[command])
    assert (outcome.code, outcome.out) == (2, "")
    assert "tokenizer_config.json: __class__ (template-escape)" in outcome.err
    assert "--accept-findings" in outcome.err
    assert [line for line in outcome.err.splitlines() if line.startswith("mmdefense: ")] == (
        outcome.err.splitlines()[-1:]
    )
    assert sorted(path.name for path in folder.iterdir()) == ["data", "model"]


def test_python_refuses_it_as_well(folder, unloaded):
    with pytest.raises(BadInputError, match="accept-findings"):
        mmd.purify(folder / "model", folder / "data", "fine-tuning", steps=2, progress=None)
    with pytest.raises(BadInputError, match="accept-findings"):
        mmd.evaluate(folder / "model", folder / "data")


def test_accepted_findings_stand_in_record_card_and_page(folder, mmdefense):
    outcome = mmdefense(*commands(folder)["purify"], "--accept-findings")
    assert outcome.code == 0, outcome.err
    assert "note: findings of high level were accepted: tokenizer_config.json" in outcome.err
    record = read_record(folder / "out" / "purification.json")
    assert "tokenizer_config.json: __class__ (template-escape)" in record.accepted_findings
    for name in ("README.md", "report.html"):
        assert "were accepted" in (folder / "out" / name).read_text()


def test_accepted_findings_do_not_stop_a_measurement(folder, mmdefense):
    outcome = mmdefense(*commands(folder)["evaluate"], "--accept-findings")
    assert outcome.code == 0, outcome.err


def test_what_is_less_than_high_is_not_refused(folder, mmdefense):
    (folder / "model" / "tokenizer_config.json").unlink()
    (folder / "model" / "setup.py").write_text("x = 1\n")
    outcome = mmdefense(*commands(folder)["evaluate"])
    assert outcome.code == 0, outcome.err
