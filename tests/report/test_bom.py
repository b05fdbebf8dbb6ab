"""The bill of materials of a purified model, as `mmdefense report --format cyclonedx` writes it."""

from __future__ import annotations

import json
import sys

import pytest


@pytest.fixture
def out(place, mmdefense):
    outcome = mmdefense(*place.purify())
    assert outcome.code == 0, outcome.err
    return place.out


def bom(path):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator  # takes seconds to import

    text = path.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return json.loads(text)


def test_the_bill_names_the_model_its_files_and_where_it_came_from(out, mmdefense):
    outcome = mmdefense("report", out, "--format", "cyclonedx")
    assert (outcome.code, outcome.out) == (0, f"wrote {out}/bom.cdx.json\n")
    held = bom(out / "bom.cdx.json")
    assert (held["bomFormat"], held["specVersion"]) == ("CycloneDX", "1.6")
    model = held["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "out")
    statement = json.loads((out / "purification.json").read_text())
    digests = {one["name"]: one["hashes"][0]["content"] for one in model["components"]}
    assert digests == {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    (given,) = model["pedigree"]["ancestors"]
    (read,) = given["components"]
    assert read["name"] == "net.safetensors"
    references = {one["type"]: one["url"] for one in model["externalReferences"]}
    assert references["attestation"] == "purification.json"
    assert all((out / name).is_file() for name in references.values())


def test_the_model_card_has_what_was_measured_and_its_limits(out, place, mmdefense):
    arguments = ("--arch", "commands:Net", "--data", place.data, "--record", out)
    outcome = mmdefense("evaluate", out / "model.safetensors", *arguments)
    assert outcome.code == 0, outcome.err
    assert mmdefense("report", out, "--format", "cyclonedx").code == 0
    card = bom(out / "bom.cdx.json")["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["task"] == "image-classification"
    assert card["modelParameters"]["modelArchitecture"] == "Net"
    assert len(card["modelParameters"]["datasets"]) == 1
    guard = json.loads((out / "purification.json").read_text())["predicate"]["guard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    before, after, drop, evaluated = metrics
    assert "given model" in before["slice"]
    assert float(before["value"]) == pytest.approx(guard["before"], rel=1e-5)
    assert float(after["value"]) == pytest.approx(guard["after"], rel=1e-5)
    assert float(drop["confidenceInterval"]["upperBound"]) == pytest.approx(
        guard["drop_high"], 1e-5
    )
    assert evaluated["type"] == "accuracy"
    assert "backdoor" in " ".join(card["considerations"]["technicalLimitations"])


def test_the_same_record_gives_the_same_bill(out, mmdefense, tmp_path):
    for name in ("first.json", "second.json", "second.json"):  # an earlier one is replaced
        assert mmdefense("report", out, "--format", "cyclonedx", "-o", tmp_path / name).code == 0
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert not (out / "bom.cdx.json").exists()


def test_a_bill_that_came_with_a_model_is_not_passed_on(out, place, mmdefense, tmp_path):
    assert mmdefense("report", out, "--format", "cyclonedx").code == 0
    second = tmp_path / "second"
    outcome = mmdefense(*place.purify(model=out / "model.safetensors", out=second))
    assert outcome.code == 0, outcome.err
    assert not (second / "bom.cdx.json").exists()


def test_files_that_are_others_are_told(out, mmdefense):
    (out / "model.safetensors").write_bytes(b"x")
    outcome = mmdefense("report", out, "--format", "cyclonedx")
    assert outcome.code == 1
    assert "model.safetensors is another file" in outcome.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--format", "spdx"), "--format must be one of html, cyclonedx, csv, json, got 'spdx'"),
        (("--format", "cyclonedx", "-o", "net.safetensors"), "is not an earlier output"),
        (("--format", "cyclonedx", "out"), "takes one OUT, got 2"),
    ],
)
def test_what_cannot_be_is_one_line(out, place, mmdefense, monkeypatch, more, said):
    monkeypatch.chdir(place.folder)
    outcome = mmdefense("report", "out", *more)
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert said in outcome.err


@pytest.mark.parametrize(("key", "value"), [("created", "soon"), ("created", 3)])
def test_a_record_that_does_not_fit_is_one_line(out, mmdefense, key, value):
    path = out / "purification.json"
    statement = json.loads(path.read_text())
    statement["predicate"]["provenance"][key] = value
    path.write_text(json.dumps(statement))
    outcome = mmdefense("report", out, "--format", "cyclonedx")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)


def test_a_digest_that_is_none_is_one_line(out, mmdefense):
    path = out / "purification.json"
    statement = json.loads(path.read_text())
    statement["predicate"]["materials"][0]["digest"]["sha256"] = "none"
    path.write_text(json.dumps(statement))
    outcome = mmdefense("report", out, "--format", "cyclonedx")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "does not fit the schema of CycloneDX" in outcome.err


def test_without_the_library_it_is_exit_3(out, mmdefense, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cyclonedx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    outcome = mmdefense("report", out, "--format", "cyclonedx")
    assert (outcome.code, outcome.out) == (3, "")
    assert "cyclonedx-python-lib" in outcome.err
    assert mmdefense("report", out).code == 0
