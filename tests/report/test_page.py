from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from records import CHOICE, comparison, purification, row

from mmdefense.plots.activeness import Activeness
from mmdefense.plots.loss_smoothness import LossSmoothness
from mmdefense.plots.pruning_curve import PruningCurve
from mmdefense.plots.recovered_triggers import RecoveredTriggers
from mmdefense.plots.triggered_samples import TriggeredSamples
from mmdefense.plots.weight_change import WeightChange
from mmdefense.report.page import page, render_page, write_analysis

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Document(HTMLParser):
    """Collects the tags and texts of a page, and fails where they do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def all_plots():
    numbers = np.linspace(0, 1, 21)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [
        TriggeredSamples(images, images.flip(3)),
        RecoveredTriggers(images[:2], ["target 0", HOSTILE], [0.9, 0.8], [True, True]),
        PruningCurve(numbers, 1 - numbers, chosen=0.5),
        WeightChange(numbers),
        Activeness(numbers, numbers / 2),
        LossSmoothness(["before", "after"], (90.0, 10.0), lambda_max=(9.0, 1.0)),
    ]


def test_the_page_of_an_analysis_has_its_sentences_and_table_as_text(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_analysis("Title", ["one", HOSTILE], all_plots()[3:4], path, [["order", "1%"], ["a", "9"]])
    text = path.read_text()
    assert "<script" not in text
    assert re.search(r"<th[^>]*><bdi>order</bdi></th>", text)
    assert "<td><bdi>9</bdi></td>" in text
    write_analysis("Title", [], all_plots()[3:4], path)
    assert "<table" not in path.read_text()


@pytest.fixture(scope="module")
def demo() -> Document:
    return Document(page(comparison(), all_plots()))


def test_every_picture_says_in_words_what_it_shows(demo):
    assert len(demo.all("figure")) == 6
    assert all(image["alt"] for image in demo.all("img"))
    assert len(demo.all("img")) == 3 * 4 + 2
    plots = demo.all("svg")
    assert len(plots) == 5
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)


def test_the_page_is_one_file_that_loads_nothing_and_runs_nothing(demo):
    assert not demo.all("script", "link", "iframe", "object")
    for tag, attributes in demo.tags:
        for name, value in attributes.items():
            if name in {"src", "href"}:
                assert (value or "").startswith(("data:image/", "#")), (tag, name)
            assert not name.startswith("on")
            assert name.startswith("xmlns") or not re.search(r"\w+://", value or "")
    css = page(comparison()).split("<style>")[1].split("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css
    (policy,) = [m for m in demo.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policy["content"] or "")


def test_every_table_header_has_a_scope_and_the_page_a_language(demo):
    assert all(header["scope"] in {"col", "row"} for header in demo.all("th"))
    assert demo.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in demo.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_hostile_name_is_shown_and_not_run():
    record = purification(name=HOSTILE, settings={HOSTILE: HOSTILE}, guard={"message": HOSTILE})
    document = Document(page(record))
    assert not document.all("script", "img")
    assert document.text.count(HOSTILE) >= 4
    hostile_row = row(HOSTILE, victim=HOSTILE)
    assert not Document(page(comparison(hostile_row, title=HOSTILE))).all("script", "img")


def test_the_verdict_of_the_guard_stands_once():
    guard = {"drop": 0.15, "drop_high": 0.289, "needed": 41, "message": "bound not decidable: x"}
    shown = page(purification(guard=guard))
    assert "Utility bound not decidable with 36 held-out samples (about 41 would decide)." in shown
    assert shown.count("not decidable") == 1
    assert "bound kept" not in shown


def test_columns_without_a_figure_are_left_out():
    document = Document(page(purification()))
    text = document.text
    assert len([head for head in document.all("th") if head.get("class") == "number"]) == 2
    assert "A dash is" not in text
    assert "Attack success rate: share" not in text
    assert "Attack success rate: share" in Document(page(comparison())).text


def test_the_page_shows_verdict_figures_settings_and_provenance():
    text = Document(page(purification())).text
    for shown in (
        "Utility bound kept",
        "Whether a backdoor was removed was not measured",
        "lower is better",
        "What was changed",
        "Training curves",
        "aa" * 32,
        "bb" * 32,
        "1,234,567",
        "2.15.0",
        "stop",
        "12.3",
    ):
        assert shown in text


def test_the_page_tells_how_a_defense_was_chosen():
    text = Document(page(purification(choice=CHOICE))).text
    assert "How the defense was chosen" in text
    assert all(reason in text for reason in CHOICE.why)
    assert "tsbd, which it took" in text
    assert "How the defense was chosen" not in Document(page(purification())).text


def test_the_same_record_gives_the_same_page(tmp_path: Path):
    render_page(purification(), [], tmp_path / "new" / "a.html")
    assert (tmp_path / "new" / "a.html").read_text(encoding="utf-8") == page(purification())


def test_a_large_run_stays_below_three_megabytes():
    noise = torch.rand(120, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    names = [f"target {number}" for number in range(120)]
    history = [{"stage": "fip", "step": step, "loss": 1.0} for step in range(50_000)]
    triggers = RecoveredTriggers(noise, names, [0.9] * 120, [True] * 120)
    samples = TriggeredSamples(noise[:40], noise[40:80])
    record = purification()
    object.__setattr__(record, "history", tuple(history))
    many = [WeightChange(np.arange(100_000)), Activeness(np.arange(100_000))]
    assert len(page(record, [triggers, samples, *many]).encode()) < 3e6


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not on the PATH")
@pytest.mark.parametrize(("scheme", "paper"), [(1, (253, 252, 249)), (0, (20, 22, 26))])
def test_a_browser_shows_the_page_light_and_dark_without_a_complaint(scheme, paper, tmp_path):
    render_page(comparison(title=HOSTILE), all_plots(), tmp_path / "page.html")
    shot = tmp_path / "page.png"
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-sync")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-component-update",
        *quiet,
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=900,1200",
        f"--screenshot={shot}",
        (tmp_path / "page.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr  # a blocked script or load would be reported there
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert tuple(pixels[2, 2]) == paper
    assert pixels.std() > 10  # there is something on it
