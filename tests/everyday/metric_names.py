"""Metrics are called by their names, and each is defined: ACC is the accuracy and nothing else."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from everyday.rows import Refused, Row
from language_models import build, texts, tokenizer

import mmdefense as mmd
from mmdefense.evaluation.grid import Cell
from mmdefense.evaluation.tables import markdown
from mmdefense.metrics.backdoor import Rates
from mmdefense.metrics.definitions import DEFINITIONS
from mmdefense.report.page import page
from mmdefense.report.record import Row as Line
from mmdefense_tasks.detection_scenes import digit_scenes
from mmdefense_tasks.detection_victims import small_fcos

ACCEPT = {"accept_low_utility": True}  # the weights are random
ONE_STEP = {"steps": 1, "batch_size": 4, "restarts": 0, **ACCEPT}


@cache
def _language() -> Any:
    return mmd.adapt(build("bart"), tokenizer=tokenizer())


@cache
def _detector() -> Any:
    return mmd.adapt(small_fcos(4))


def _guard(adapter: Any, samples: Any) -> str:
    purified = mmd.purify(adapter, samples, "fine-tuning", **ONE_STEP)
    return purified.guard.message.partition(" went from")[0].rpartition(": ")[2]


def _page(adapter: Any, samples: Any) -> list[str]:
    """Return the heading of the first column of rates on the page, and whether ACC is there."""
    purified = mmd.purify(adapter, samples, "fine-tuning", **ONE_STEP)
    text = page(purified.record())
    heading = re.search(r'class="number">(.*?) <span', text)
    assert heading is not None
    metric = purified.guard.metric
    return [heading[1] == metric, "ACC" in text, DEFINITIONS[metric][:12] in text]


def _tried() -> str:
    attack = {"attack": "rare-token", "target": "7", "settings": {"words": "cf"}}
    return _figures(_language(), texts(), **attack)


def _figures(adapter: Any, samples: Any, **attack: Any) -> str:
    found = mmd.evaluate(adapter, samples, **attack, **ACCEPT)
    return " ".join(name for name, _ in found.values())


def _heading(*tasks: str) -> list[str]:
    rates = Rates(acc=0.5, asr=1.0)
    rows = [Line(defense="fip", before=rates, after=rates, seconds=1.0, victim=t) for t in tasks]
    cells = [Cell(seed=0, row=row, case={"task": row.victim}, versions={}) for row in rows]
    lines = markdown(cells).splitlines()
    return [lines[0].split("|")[3].strip(), lines[2].split("|")[2].strip()]


def _is(value: Any, right: Any) -> bool:
    assert value == right, value
    return True


ROWS = [
    Row(
        "the guard of a language model",
        lambda _: _is(_guard(_language(), texts()), "n-gram accuracy"),
        True,
    ),
    Row(
        "the guard of a detector",
        lambda _: _is(_guard(_detector(), digit_scenes(count=10)), "AP@50"),
        True,
    ),
    Row("the page of a language model", lambda _: _page(_language(), texts()), [1, 0, 1]),
    Row("the page of a detector", lambda _: _page(_detector(), digit_scenes(count=10)), [1, 0, 1]),
    Row(
        "an evaluation of a language model under a trigger",
        lambda _: _is(
            _figures(
                _language(), texts(), attack="rare-token", target="7", settings={"words": "cf"}
            ),
            "BLEU n-gram accuracy perplexity attack ASR RA (n-gram accuracy with the trigger)",
        ),
        True,
    ),
    Row(
        "an evaluation of a detector",
        lambda _: _is(_figures(_detector(), digit_scenes(count=4)), "mAP@50 AP@50"),
        True,
    ),
    Row(
        "pairs of text in memory under a trigger",
        lambda _: mmd.evaluate(
            _language(), [("a b", "c"), ("b", "d")], attack="rare-token", **ACCEPT
        ),
        Refused("RareToken is an attack on language-generation: give TextSamples"),
    ),
    Row(
        "a grid of language",
        lambda _: _is(_heading("language-generation"), ["BLEU", "*before*"]),
        True,
    ),
    Row(
        "a grid of two tasks",
        lambda _: _is(
            _heading("object-detection", "image-classification"),
            ["task metric", "*before*, mAP@50"],
        ),
        True,
    ),
]
