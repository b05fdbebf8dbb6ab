"""`mmdefense report` after `mmdefense purify`, as a user calls them."""

from __future__ import annotations

import hashlib
import json

import huggingface_hub
import pytest

from mmdefense.report.statement import differing
from mmdefense_tasks.victims import vit_classifier


@pytest.fixture
def out(place, mmdefense):
    outcome = mmdefense(*place.purify())
    assert outcome.code == 0, outcome.err
    return place.out


def test_what_purify_wrote_agrees_with_its_statement(out, place):
    statement = json.loads((out / "purification.json").read_text())
    hashes = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    assert set(hashes) == {"README.md", "model.safetensors", "report.npz"}
    assert set(hashes) | {"purification.json", "report.html"} == {p.name for p in out.iterdir()}
    for name, value in hashes.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == value
    (given,) = statement["predicate"]["materials"]
    assert given["name"] == "net.safetensors"
    assert given["digest"]["sha256"] == hashlib.sha256(place.model.read_bytes()).hexdigest()
    assert "## Purified with mmdefense" in (out / "README.md").read_text()


def test_the_page_is_made_again(out, mmdefense, tmp_path):
    page = out / "report.html"
    before = page.read_text("utf-8")
    page.unlink()
    outcome = mmdefense("report", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"wrote {page}\n"
    assert page.read_text("utf-8") == before
    assert mmdefense("report", out, "-o", tmp_path / "copy.html").code == 0
    assert (tmp_path / "copy.html").read_text("utf-8") == before
    assert differing(out) == []


def test_two_outputs_are_compared(out, place, mmdefense, tmp_path):
    second = tmp_path / "second"
    assert mmdefense(*place.purify("--seed", "1", out=second)).code == 0
    outcome = mmdefense("report", out, second, "-o", tmp_path / "both.html")
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "both.html").read_text("utf-8")
    assert "2 purifications side by side" in text
    assert mmdefense("report", out, second).code == 2


def test_weights_that_are_others_are_told(out, mmdefense):
    (out / "model.safetensors").write_bytes(b"x")
    outcome = mmdefense("report", out)
    assert outcome.code == 1
    assert "model.safetensors is another file" in outcome.err


def test_a_folder_without_a_record_is_bad_input(mmdefense, tmp_path):
    outcome = mmdefense("report", tmp_path)
    assert outcome.code == 2
    assert "purification.json" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_the_model_of_the_hub_that_was_given(place, mmdefense, monkeypatch):
    folder = place.folder / "cached"
    vit_classifier(3, 8, hidden=16, layers=1, heads=2).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: other/one\n---\n\n# A net\n")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    fast = ("--defense", "fine-tuning", "--set", "steps=1", "--evidence", "none")
    more = ("--accept-low-utility", "--data", place.data, "-o", place.out)
    outcome = mmdefense("purify", "owner/net", *fast, *more)
    assert outcome.code == 0, outcome.err
    data = huggingface_hub.ModelCard.load(place.out / "README.md").data
    assert (data.base_model, data.license) == ("owner/net", "mit")
    assert "mmdefense" in data.tags
    assert mmdefense("purify", folder, *fast, *more, "--force").code == 0
    data = huggingface_hub.ModelCard.load(place.out / "README.md").data
    assert data.base_model == "other/one"
