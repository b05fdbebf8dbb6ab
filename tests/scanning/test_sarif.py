"""The SARIF log, as the standard and GitHub's code scanning want it."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import mmdefense as mmd
from mmdefense.findings import Finding, Rule, ScanRecord
from mmdefense.scanning.baseline import compared
from mmdefense.scanning.sarif import to_sarif

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
SCHEMA = json.loads((HERE / "schemas" / "sarif-schema-2.1.0.json").read_text())


def finding(id="pickle-import", level="high", subject="a.pt!data.pkl", value="os.system"):
    return Finding(
        id=id, level=level, subject=subject, measured="an import", value=value,
        reference="names allowed", meaning="It runs.", blind_spot="what it does.",
    )  # fmt: skip


def record(*findings, model="m", files=("a.pt",)):
    parts = ["files", "weights"]
    hashes = dict.fromkeys(files, "00ff")
    return ScanRecord(model=model, findings=findings, parts=parts, files=hashes, version="0.1")


def run_of(scanned):
    import jsonschema  # takes seconds, also in a process that runs none of these tests

    log = json.loads(to_sarif(scanned))
    jsonschema.validate(
        log, SCHEMA, jsonschema.Draft4Validator, format_checker=jsonschema.FormatChecker()
    )
    return log["runs"][0]


def place_of(result):
    return result["locations"][0]["physicalLocation"]["artifactLocation"]


MIXED = record(
    finding(),
    finding(level="medium", subject="odd \udce9 !name:.pt", value="x\x00\x1b"),
    finding("weights-spectrum", "info", "layers.3.weight", float("nan")),
    finding("behaviour-trigger", "medium", "patch to stop", 0.98),
    files=("a.pt", "odd \udce9 !name:.pt"),
)


@pytest.mark.parametrize(
    "scanned", [record(), MIXED, compared(MIXED, frozenset())], ids=["empty", "mixed", "compared"]
)
def test_the_log_meets_the_schema(scanned):
    run_of(scanned)


def test_a_log_that_does_not_meet_the_schema_is_seen(monkeypatch):
    import jsonschema

    monkeypatch.setattr("mmdefense.scanning.sarif._LEVELS", {"high": "severe"})
    with pytest.raises(jsonschema.ValidationError, match="severe"):
        run_of(record(finding()))


def test_each_rule_has_its_severity_and_its_help():
    findings = [finding(level="low"), finding(), finding("code-python", "medium", "a.py")]
    first, second = run_of(record(*findings))["tool"]["driver"]["rules"]
    assert (first["id"], first["properties"]["security-severity"]) == ("pickle-import", "8.0")
    assert (second["id"], second["properties"]["security-severity"]) == ("code-python", "5.5")
    assert first["helpUri"].endswith("docs/findings.md#pickle-import")


def test_every_result_has_a_file_so_that_github_takes_it():
    results = run_of(MIXED)["results"]
    assert len(results) == 4
    assert all(place_of(result)["uri"] for result in results)
    regions = [result["locations"][0]["physicalLocation"]["region"] for result in results]
    assert {region["startLine"] for region in regions} == {1}
    (spectrum,) = [r for r in results if r["ruleId"] == "weights-spectrum"]
    assert place_of(spectrum)["uri"] == "m"
    assert spectrum["locations"][0]["logicalLocations"] == [
        {"fullyQualifiedName": "layers.3.weight"}
    ]


@pytest.mark.parametrize(
    ("model", "uri"),
    [
        ("models/net", "models/net/a.pt"),
        ("./models/../models/net/", "models/net/a.pt"),
        ("{here}/models/net", "models/net/a.pt"),
        (".", "a.pt"),
        ("some/model", "some/model/a.pt"),  # of the hub
        ("models/net/a.pt", "models/net/a.pt"),
        ("../elsewhere", "file://{above}/elsewhere/a.pt"),
    ],
)
def test_paths_are_relative_to_the_working_folder(tmp_path, monkeypatch, model, uri):
    here = tmp_path / "here"
    (here / "models" / "net").mkdir(parents=True)
    (here / "models" / "net" / "a.pt").touch()
    monkeypatch.chdir(here)
    run = run_of(record(finding(), model=model.format(here=here)))
    expected = uri.format(above=tmp_path)
    assert place_of(run["results"][0]) == {"uri": expected, "index": 0}
    assert run["artifacts"][0]["location"]["uri"] == expected


def test_findings_are_told_apart_and_known_again():
    findings = [finding(), finding(value="os.popen"), finding(subject="b.pt")]

    def prints(*found):
        return [
            {result["partialFingerprints"]["primaryLocationLineHash"]}
            for result in run_of(record(*found))["results"]
        ]

    assert len(set.union(*prints(*findings))) == 3
    assert prints(*reversed(findings)) == prints(*findings)[::-1]


def test_every_rule_is_in_the_documents():
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(mmd.__path__, "mmdefense.")
        if found.name.startswith(("mmdefense.scanning", "mmdefense.pipeline"))
    ]
    rules = {
        value.id: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Rule)
    }
    _, *sections = (DOCS / "findings.md").read_text().split("\n## ")
    written = dict(section.strip().split("\n\n", 1) for section in sections)
    assert len(rules) > 40
    assert written.keys() == rules.keys()
    stale = {
        name: said
        for name, rule in rules.items()
        if (said := description(rule)) != " ".join(written[name].split())
    }
    assert stale == {}, "docs/findings.md must say this of these rules"


def description(rule):
    return (
        f"Level: {rule.level}. Measured: {rule.measured}. Compared with: {rule.reference}. "
        f"{rule.meaning} Cannot see: {rule.blind_spot}"
    )
