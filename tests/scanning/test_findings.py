from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmdefense.errors import BadInputError
from mmdefense.findings import Finding, ScanRecord, reaches, worst_level
from mmdefense.pipeline.scan import scan
from mmdefense.scanning.formats import to_html, to_json, to_sarif, to_text


def finding(level="high", id="pickle-import", subject="a.pt!data.pkl", value="posix.system"):
    return Finding(
        id=id, level=level, subject=subject, measured="an import", value=value,
        reference="names allowed", meaning="It runs.", blind_spot="what it does.",
    )  # fmt: skip


def record(*findings, parts=("files",)):
    return ScanRecord(model="m", findings=findings, parts=parts, files={"a.pt": "00ff"})


def test_levels_are_ordered():
    findings = [finding("low"), finding("medium")]
    assert worst_level(findings) == "medium"
    assert worst_level([]) is None
    assert reaches(findings, "low")
    assert reaches(findings, "medium")
    assert not reaches(findings, "high")
    assert not reaches([], "low")


def test_figures_for_information_are_no_finding_to_fail_on():
    found = record(finding("info"))
    assert not reaches(found.findings, "low")
    assert "Nothing was found by what was looked at, but 1 figure" in found.verdict.text
    (result,) = json.loads(to_sarif(found))["runs"][0]["results"]
    assert (result["level"], result["kind"]) == ("none", "informational")


def test_a_scan_is_a_page_of_its_own():
    page = to_html(record(finding(value="<script>alert(1)</script>"), finding("info")))
    assert "<script>" not in page
    for word in ("pickle-import", "not proof", "00ff", "what it does."):
        assert word in page


def test_an_unknown_level_is_refused():
    with pytest.raises(BadInputError, match="info, low, medium, high"):
        finding("severe")


@pytest.mark.parametrize(
    "findings",
    [(), (finding("info"),), (finding("low"),), (finding("medium"),), (finding(),)],
)
def test_no_verdict_says_that_a_model_is_clean(findings):
    verdict = record(*findings).verdict
    assert "clean" not in verdict.text
    assert "not looked at: weights, behaviour" in verdict.text
    assert "not proof" in verdict.text
    assert verdict.level == worst_level(findings)


@pytest.mark.parametrize(
    ("level", "loading", "use"),
    [("high", "do not load", "purify it"), ("medium", "is loaded", "is used")],
)
def test_a_trigger_speaks_against_the_use_of_a_model_and_a_file_against_loading_it(
    level, loading, use
):
    trigger, file = finding(level, "behaviour-trigger", "patch to 0"), finding(level)
    assert use in record(trigger).verdict.text
    assert loading in record(trigger, file).verdict.text


def test_the_strongest_finding_stands_first():
    ordered = record(finding("low"), finding("high"), finding("medium")).findings
    assert [found.level for found in ordered] == ["high", "medium", "low"]


def test_text_names_everything_and_cannot_steer_the_terminal():
    text = to_text(record(finding(value="x\x1b[2J\n")))
    for word in ("high", "pickle-import", "It runs.", "what it does.", "not proof"):
        assert word in " ".join(text.split())
    assert "\x1b[2J" not in text


def test_findings_that_are_alike_are_shown_as_one_and_kept_with_their_places():
    many = [finding("medium", "weights-spectrum", f"layer{n}", 4.0 + n) for n in range(9)]
    found = record(*many, finding("low", subject="b"))
    text, page = " ".join(to_text(found).split()), to_html(found)
    for shown in (text.replace(" │ │ ", " "), page):
        assert shown.count("weights-spectrum") == 1
        assert "layer0" in shown
        assert "layer8" not in shown
    assert "9 places: layer0, layer1, layer2, layer3, layer4 and 4 more" in page
    assert "9 findings of medium level, of 1 kind:" in found.verdict.text
    assert len(json.loads(to_json(found))["findings"]) == 10
    assert "layer8" in to_sarif(found)


def test_a_few_findings_stand_alone():
    page = to_html(record(*(finding("medium", subject=f"layer{n}") for n in range(3))))
    assert page.count("pickle-import") == 3


def test_a_picture_is_its_own_bytes_or_is_not_shown():
    address = "data:image/png;base64,aGVsbG8="
    assert address in to_html(record(replace(finding(), pictures={"patch to 2": address})))
    for other in ("https://example.org/a.png", "data:text/html;base64,aGVsbG8=", 'data:" onload='):
        assert "<img" not in to_html(record(replace(finding(), pictures={"patch to 2": other})))


def test_json_holds_the_whole_record():
    content = json.loads(to_json(record(finding(value=float("nan")))))
    assert content["findings"][0]["subject"] == "a.pt!data.pkl"
    assert content["findings"][0]["value"] is None
    assert content["files"] == {"a.pt": "00ff"}
    assert content["verdict"]["level"] == "high"


def test_sarif_is_what_the_standard_asks_for():
    low = finding("low", "weights-spectrum", "layers.3.weight", 4.2)
    log = json.loads(to_sarif(record(finding(), finding("medium", subject="b c.pt"), low)))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len(rules) == len({rule["id"] for rule in rules}) == 2
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
    assert [result["level"] for result in run["results"]] == ["error", "warning", "note"]
    places = [result["locations"][0] for result in run["results"]]
    assert places[0]["physicalLocation"]["artifactLocation"]["uri"] == "m/a.pt"
    assert places[1]["physicalLocation"]["artifactLocation"]["uri"] == "m/b%20c.pt"
    assert places[2]["logicalLocations"] == [{"fullyQualifiedName": "layers.3.weight"}]


def test_a_scan_joins_files_and_weights(tmp_path):
    torch.save(torch.nn.Linear(3, 8).state_dict(), tmp_path / "a.pt")
    found = scan(tmp_path)
    assert found.parts == ["files", "weights"]
    assert list(found.files) == ["a.pt"]
    assert found.version


def test_the_weights_of_a_file_that_would_run_code_are_not_read(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    found = scan(tmp_path)
    assert found.parts == ["files"]
    assert found.verdict.level == "high"


def test_a_module_has_no_files():
    found = scan(torch.nn.Linear(3, 8))
    assert (found.parts, found.files, found.model) == (["weights"], {}, "Linear")


def test_sarif_names_the_file_though_its_name_holds_the_mark_of_archives():
    found = [finding(subject=subject) for subject in ("a!b.pt!data.pkl", "a!b.pt", "lost!x")]
    scanned = ScanRecord(
        model="m", findings=found, parts=["files"], files={"a!b.pt": "0", "a": "0"}, version="1"
    )
    results = json.loads(to_sarif(scanned))["runs"][0]["results"]
    places = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in results]
    assert places == ["m/a%21b.pt", "m/a%21b.pt", "m/lost"]
