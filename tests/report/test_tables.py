from __future__ import annotations

import io

import pytest
from records import comparison, purification, row
from rich.console import Console

from mmdefense.report.formats import MINUS, duration, number, percent, points
from mmdefense.report.tables import lines, results_table


def printed(rows) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(rows))
    return console.file.getvalue()


def test_each_victim_stands_once_above_its_defenses():
    rows = [row(d, victim=v) for v in ("BadNets", "Blended") for d in ("fip", "tsbd")]
    names = [line.name for line in lines(rows)]
    assert names == ["before: BadNets", "fip", "tsbd", "before: Blended", "fip", "tsbd"]


def test_cells_are_percent_with_one_decimal_and_the_change_in_points():
    before, after = lines([row("fip", acc=0.9649, asr=0.0049)])
    assert [cell.value for cell in before.cells] == ["97.0", "99.0", "1.0", "–"]  # noqa: RUF001
    assert [cell.value for cell in after.cells] == ["96.5", "0.5", "90.0", "99.0"]
    assert [cell.change for cell in after.cells] == [f"{MINUS}0.5", f"{MINUS}98.5", "+89.0", None]
    assert (after.cells[1].tone, before.cells[1].tone) == ("good", "")


def test_the_terminal_shows_the_same_rows_and_says_which_direction_is_better():
    record = comparison(row("fine-tuning", asr=0.2), row("fip", asr=0.4, baseline="fine-tuning"))
    text = printed(record.rows)
    assert "ACC % ↑" in text
    assert "ASR % ↓" in text
    assert "40.0" in text
    assert "does not beat fine-tuning" in text


def test_names_are_shown_as_they_are_and_not_read_as_markup():
    assert "[red]x[/red]" in printed([row("[red]x[/red]")])


def test_a_table_without_notes_or_attack_figures_still_prints():
    text = printed(purification().rows)
    assert "note" not in text
    assert "96.0" in text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(None), "\N{EN DASH}"),
        (percent(0.0044), "0.4%"),
        (percent(float("nan")), "not measured"),
        (points(-0.00001, signed=True), "0.0"),
        (points(-0.012), f"{MINUS}1.2"),
        (points(0.1), "10.0"),
        (points(-0.1), f"{MINUS}10.0"),
        (duration(9.96), "10.0 s"),
        (duration(125), "2 min 5 s"),
        (duration(3720), "1 h 2 min"),
    ],
)
def test_numbers_are_written_for_a_person(shown, expected):
    assert shown == expected


def test_a_row_says_what_the_guard_took_in_place_of_the_final_state():
    assert "the guard took: step 75" in printed([row("fip", instead="step 75")])
