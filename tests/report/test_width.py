"""Every page fits a phone: nothing is cut off, what scrolls says so, and figures can be read."""

from __future__ import annotations

import pytest
from browser import measured, needs_chromium
from records import CHOICE, comparison, purification, row
from test_compare import every_plot, scan, two_records

from mmdefense.report.compare import comparison_page
from mmdefense.report.findings import scan_of
from mmdefense.report.leaderboard import leaderboard
from mmdefense.report.page import page, scan_page

PHONE = 390  # CSS pixels
READABLE = 11  # pixels; ours

NAMES = ["a-rather-long-name/of-an-output", "tsbd", "baeraser"]


def cells():
    same = {"task": "t", "net": "n", "attack": "a", "views": "v", "clean": 0.1, "kind": "seen"}
    names = ("acc_before", "asr_before", "ra_before", "acc_after", "asr_after", "ra_after", "der")
    rates = dict.fromkeys(names, 0.5) | {"asr_retuned": None, "asr_retuned_twin": None}
    return [
        {**same, **rates, "case": case, "defense": f"{name} like it", "seed": seed, "seconds": 1.0}
        | {"record": "x.json"}
        for case in ("digits-badnets", "traffic-signs-blended")
        for name in NAMES
        for seed in (0, 1)
    ]


def pages():
    """Return what makes each page."""
    found = {**scan()["findings"][0], "subject": "encoder.stages.0.layers.1." * 4}
    rows = [row(name, asr=0.4, violated=True, undecided="not decidable") for name in NAMES]
    return {
        "one": lambda: page(purification(choice=CHOICE), every_plot()),
        "defenses": lambda: page(comparison(*rows)),
        "three": lambda: comparison_page([*two_records(), purification()], NAMES),
        "scan": lambda: scan_page(scan_of(scan(findings=[found] * 3), "scan")),
        "leaderboard": lambda: leaderboard(cells()),
    }


@needs_chromium
@pytest.mark.parametrize("kind", pages())
def test_a_page_fits_a_phone(kind, tmp_path):
    seen = measured(pages()[kind](), tmp_path, PHONE)
    assert seen["page"] <= PHONE
    assert seen["beyond"] == []
    assert min(seen["text"], default=READABLE) >= READABLE
