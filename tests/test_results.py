"""The published figures: the page's tables are those of the file, and a moved cell is noticed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from scripts import load_script

ROOT = Path(__file__).parents[1]
recipe = load_script(ROOT / "recipes" / "results.py")
CELLS = recipe.read()


def test_the_tables_of_the_page_are_those_of_the_file():
    text = recipe.PAGE.read_text("utf-8")
    assert recipe.with_tables(text, CELLS) == text


def test_each_table_stands_on_the_page():
    text = recipe.PAGE.read_text("utf-8")
    for name in recipe.TABLES:
        assert text.count(f"<!-- results: {name} -->") == 1


def test_the_file_is_written_as_it_was_read(tmp_path):
    recipe.write(CELLS, tmp_path / "copy.csv")
    assert (tmp_path / "copy.csv").read_bytes() == recipe.PUBLISHED.read_bytes()


def test_each_cell_stands_once_and_says_of_which_commit_it_is():
    assert len({cell.key for cell in CELLS}) == len(CELLS)
    assert all(len(cell.commit) >= 7 for cell in CELLS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"asr": 7.9}, []),
        ({"asr": 8.1}, ["asr moved by +6.1, more than 6.0"]),
        ({"asr": 12.0, "asr_sd": 5.0}, []),
        ({"metric": 91.9}, ["metric moved by -3.1, more than 2.0"]),
        ({"ra": math.nan}, []),
    ],
)
def test_a_cell_is_off_beyond_its_spread(changed, said):
    cell = dataclasses.replace(
        CELLS[0], metric=95.0, metric_sd=0.5, asr=2.0, asr_sd=3.0, ra=90.0, ra_sd=1.0
    )
    assert recipe.differences(cell, dataclasses.replace(cell, **changed)) == said
