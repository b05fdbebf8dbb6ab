"""A page is made again from what an output holds, and several outputs stand on one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from browser import needs_chromium, shown
from records import purification
from test_page import HOSTILE, Document, all_plots

from mmdefense.errors import BadInputError
from mmdefense.plots.embedding_map import EmbeddingMap
from mmdefense.plots.recovered_triggers import RecoveredTriggers
from mmdefense.plots.triggered_texts import TriggeredTexts
from mmdefense.report.archive import read_plots, write_plots
from mmdefense.report.compare import compare, comparison_page, rebuild
from mmdefense.report.findings import scan_of
from mmdefense.report.page import page
from mmdefense.report.record import LayerChange, read_record
from mmdefense.report.statement import write_statement


def every_plot():
    random = np.random.default_rng(0)
    points = random.random((30, 5))
    return [
        *all_plots(),
        EmbeddingMap.by_tsne(points, points[::-1], np.arange(30) % 3, names=("x", HOSTILE, "z")),
        TriggeredTexts(["a b"], ["a x b"], ["right"], ["wrong"]),
    ]


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write_plots(every_plot(), folder / "report.npz")
    write_statement(purification(), folder)
    return folder


def test_the_page_that_is_made_again_is_the_same(out, tmp_path):
    wanted = page(purification(), every_plot())
    assert rebuild(out) == out / "report.html"
    assert (out / "report.html").read_text("utf-8") == wanted
    rebuild(out, tmp_path / "elsewhere.html")
    assert (tmp_path / "elsewhere.html").read_text("utf-8") == wanted


def test_long_rows_say_how_long_they_were(tmp_path):
    images = torch.rand(120, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    given = [RecoveredTriggers(images, [f"t{n}" for n in range(120)], [1.0] * 120, [True] * 120)]
    write_plots(given, tmp_path / "a.npz")
    assert page(purification(), read_plots(tmp_path / "a.npz")) == page(purification(), given)


def test_a_page_is_made_of_the_record_alone(out):
    (out / "report.npz").unlink()
    rebuild(out)
    assert (out / "report.html").read_text("utf-8") == page(purification())


class Bomb:
    def __reduce__(self):
        return print, ("pwned",)


@pytest.mark.parametrize(
    "tree",
    [
        np.asarray(Bomb(), dtype=object),
        np.asarray('[{"kind": "Path", "fields": {}}]'),
        np.asarray('[{"kind": "mmdefense.plots.panels.Bars", "fields": {"labels": []}}]'),
        np.asarray('[{"kind": "mmdefense.plots.weight_change.WeightChange", "fields": {}}]'),
        np.asarray("{"),
    ],
)
def test_plots_that_are_none_are_refused_and_not_run(tree, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", tree=tree)
    with pytest.raises(BadInputError, match="cannot be read"):
        read_plots(tmp_path / "a.npz")
    assert "pwned" not in capsys.readouterr().out


def scan(**changes):
    found = {
        "id": "weights-head-row",
        "level": "medium",
        "subject": HOSTILE,
        "value": 7.123456,
        "reference": "3.5",
        "measured": "rows",
        "meaning": "It stands apart.",
        "blind_spot": "intent.",
    }
    verdict = {"level": "medium", "text": "1 finding of medium level."}
    files = {"net.safetensors": "cc" * 32}
    held = {"model": "net", "findings": [found], "verdict": verdict, "files": files}
    return held | {"parts": ["files"], "version": "1"} | changes


def test_what_a_scan_found_stands_on_the_page(out):
    before = {"net.safetensors": "cc" * 32}
    record = purification()
    record = dataclasses.replace(
        record, model=dataclasses.replace(record.model, files_before=before)
    )
    write_statement(record, out)
    (out / "scan.json").write_text(json.dumps(scan()))
    document = Document(rebuild(out).read_text("utf-8"))
    for text in ("1 finding of medium level", "weights-head-row", "7.12", "intent.", HOSTILE):
        assert text in document.text
    assert "other weights" not in document.text
    (out / "scan.json").write_text(json.dumps(scan(files={"other": "dd" * 32})))
    assert "other weights" in Document(rebuild(out).read_text("utf-8")).text


def test_the_purifications_own_scan_stands_first_and_nothing_twice(out):
    own = scan_of(scan(), "scan")
    record = dataclasses.replace(purification(), scan=own)
    write_statement(record, out)
    assert read_record(out / "purification.json").scan == own
    spectrum = {"nodes": [-0.1, 0.0, 9.0], "weights": [0.1, 0.8, 0.1]}
    smooth = {"id": "behaviour-smoothness", "level": "info", "subject": "the model", "value": "x"}
    more = {**scan()["findings"][0], **smooth, "numbers": spectrum}
    (out / "scan.json").write_text(json.dumps(scan(findings=[*scan()["findings"], more])))
    html = rebuild(out).read_text("utf-8")
    assert html.count("weights-head-row</bdi>") == 1
    assert html.index("before anything was done") < html.index("From scan.json")
    assert "Spectrum of the Hessian" in html


@pytest.mark.parametrize("nodes", [None, [], [1.0], ["x", 1.0], [1e300, 1.0], [None, 1.0], 3])
def test_a_spectrum_that_is_none_is_not_drawn(out, nodes):
    bad = {**scan()["findings"][0], "numbers": {"nodes": nodes, "weights": [0.5, 0.5]}}
    (out / "scan.json").write_text(json.dumps(scan(findings=[bad])))
    html = rebuild(out).read_text("utf-8")
    assert "weights-head-row" in html
    assert "Spectrum of the Hessian" not in html


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "x"}', json.dumps(scan(findings=[3]))])
def test_another_file_of_that_name_is_no_scan(out, text):
    (out / "scan.json").write_text(text)
    assert "Findings" not in rebuild(out).read_text("utf-8")


def two_records():
    first = purification(measured={"lambda_max_before": 9.0, "lambda_max_after": 1.0})
    layers = (*first.layers, LayerChange(layer="head", change=0.25))
    second = purification(
        settings={"steps": 9, "extra": HOSTILE}, guard={"violated": True, "after": 0.5}
    )
    return [first, dataclasses.replace(second, layers=layers, title=HOSTILE)]


def test_a_comparison_shows_all_side_by_side():
    document = Document(comparison_page(two_records(), ["a", HOSTILE]))
    assert not document.all("script", "img")
    for text in (
        "Utility bound",
        "kept",
        "✕ Too much utility lost",
        "97.0%",
        "50.0%",
        "stem",
        "head",
        "extra",
        "λmax before",
        "What was changed",
    ):
        assert text in document.text
    assert len(document.all("svg")) == 1
    bold = [row for row in document.all("tr") if row.get("class") == "differs"]
    assert bold


def test_a_comparison_opens_with_the_table_and_says_what_is_alike_once():
    names = ["a", "b", "c"]
    html = comparison_page([purification()] * 3, names)
    assert html.index('id="before-after"') < html.index("Whether a backdoor was removed")
    assert html.count("Whether a backdoor was removed") == 1
    assert html.count("No attack success rate") == 1
    assert html.count("Removal not measured") == 1  # a value that all have stands once
    one, *others = two_records()
    assert "differs" in comparison_page([one, *others, one], names)


def test_outputs_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        folder = tmp_path / parent / "out"
        folder.mkdir(parents=True)
        write_statement(purification(), folder)
    compare([tmp_path / "x" / "out", tmp_path / "y" / "out"], tmp_path / "page.html")
    text = Document((tmp_path / "page.html").read_text("utf-8")).text
    assert "x/out" in text
    assert "y/out" in text
    assert str(tmp_path) not in text


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="record"):
        rebuild(tmp_path)
    with pytest.raises(BadInputError, match="record"):
        compare([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@needs_chromium
@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_browser_shows_every_image_and_complains_of_nothing(kind, tmp_path):
    html = (
        page(purification(), every_plot())
        if kind == "one"
        else comparison_page(two_records(), ["a", "b"])
    )
    seen = shown(html, tmp_path)
    assert seen.complaints == []
    assert len(seen.images) == html.count("<img ")
    assert all(width > 0 for width in seen.images)
    assert len(seen.drawings) == html.count("<svg ")
    assert all(width > 50 for width in seen.drawings)
