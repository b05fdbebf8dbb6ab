"""Every result that is printed as a table is there as CSV, JSON and a data frame, too."""

from __future__ import annotations

import csv
import io
import json
import math
import sys

import pytest
from commands import fitted_net, small_images
from records import comparison, purification, row

import mmdefense as mmd
from mmdefense.errors import UnsupportedError
from mmdefense.findings import Finding, ScanRecord
from mmdefense.report.compare import comparison_table
from mmdefense.report.statement import write_statement
from mmdefense.tabular import Table


def rows_in(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_all_forms_hold_the_same_values():
    table = Table([{"name": "a", "rate": 0.5}, {"name": "b", "count": 3}], "Some")
    assert rows_in(table.to_csv()) == [
        {"name": "a", "rate": "0.5", "count": ""},
        {"name": "b", "rate": "", "count": "3"},
    ]
    assert json.loads(table.to_json())[1] == {"name": "b", "rate": None, "count": 3}
    frame = table.to_pandas()
    assert list(frame.columns) == table.columns == ["name", "rate", "count"]
    assert frame["rate"][0] == 0.5
    assert math.isnan(frame["rate"][1])
    assert len(table) == 2


def test_a_table_without_rows_is_empty_in_all_forms():
    assert (Table([]).to_csv(), json.loads(Table([]).to_json()), len(Table([]).to_pandas())) == (
        "",
        [],
        0,
    )
    assert "<table>" in Table([])._repr_html_()
    assert repr(Table([], "None")) == "None"


def test_what_is_not_finite_is_no_value():
    table = Table([{"x": math.nan}, {"x": math.inf}])
    assert json.loads(table.to_json()) == [{"x": None}, {"x": None}]


def test_hostile_names_are_neither_formulas_nor_markup_nor_steer_a_terminal():
    table = Table([{"<b>": '=HYPERLINK("x")', "y": "<i>\x1b[2J", "drop": -0.1}])
    (found,) = rows_in(table.to_csv())
    assert found["<b>"] == '\'=HYPERLINK("x")'
    assert found["drop"] == "-0.1"  # a number is none
    assert "<b>" not in table._repr_html_()
    assert "<i>" not in table._repr_html_()
    assert "\x1b" not in repr(table) + table._repr_html_()


def test_without_pandas_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match="a data frame needs the package 'pandas'"):
        Table([{"x": 1}]).to_pandas()


def test_a_comparison_of_defenses_is_a_row_each():
    record = comparison(row("fip", asr=0.4), row("tsbd", violated=True))
    first, second = record.table().rows
    assert (first["defense"], first["asr_before"], first["asr_after"]) == ("fip", 0.99, 0.4)
    assert second["guard_violated"] is True
    assert "tsbd" in repr(record)
    assert "<td>tsbd</td>" in record._repr_html_()


def test_a_purification_says_in_a_line_what_it_is():
    record = purification()
    assert repr(record) == (
        "PurificationRecord of net.safetensors by fip: accuracy 0.970 to 0.960, kept"
    )
    assert record.table().rows[0]["acc_after"] == 0.96
    assert "<table>" in record._repr_html_()


def test_a_scan_is_a_row_for_each_finding():
    found = Finding(
        id="x", level="low", subject="=s", measured="m", value=1.5, reference="r", meaning="",
        blind_spot="",
    )  # fmt: skip
    table = ScanRecord(model="net", findings=[found, found], parts=["files"]).table()
    assert [row["level"] for row in table.rows] == ["low", "low"]
    assert rows_in(table.to_csv())[0]["subject"] == "'=s"


def test_a_finding_does_not_print_its_pictures():
    address = "data:image/png;base64," + "A" * 9000
    found = Finding(
        id="x", level="low", subject="s", measured="m", value=1.5, reference="r", meaning="",
        blind_spot="", pictures={"patch to 2": address},
    )  # fmt: skip
    assert len(repr(found)) < 400
    assert "patch to 2" in repr(found)


def test_a_purification_and_an_evaluation_in_memory_are_tables():
    images, labels = small_images()
    purified = mmd.purify(fitted_net(), (images, labels), "fine-tuning", steps=2, progress=False)
    (found,) = purified.table().rows
    assert found["utility_before"] == purified.guard.before
    assert found["defense"] == "FineTuning"
    measured = mmd.evaluate(fitted_net(), (images, labels))
    (rate,) = measured.table().rows
    assert (rate["name"], rate["value"], rate["count"]) == ("accuracy", measured.value, 30)


def test_outputs_side_by_side_are_a_row_each(tmp_path, mmdefense):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_statement(purification(), tmp_path / name)
    table = comparison_table([tmp_path / "one", tmp_path / "two"])
    assert [row["output"] for row in table.rows] == ["one", "two"]
    assert table.rows[0]["after"] == 0.96
    said = mmdefense("report", tmp_path / "one", tmp_path / "two", "--format", "csv")
    assert said.code == 0, said.err
    assert said.out == table.to_csv()
    target = tmp_path / "both.json"
    outs = (tmp_path / "one", tmp_path / "two")
    assert mmdefense("report", *outs, "--format", "json", "-o", target).code == 0
    assert target.read_text() == table.to_json()
    assert mmdefense("report", *outs, "--format", "json", "-o", target).code == 2  # it is there


@pytest.mark.parametrize(
    ("command", "column"),
    [
        (("list",), "kind"),
        (("list", "defenses"), "about"),
        (("list", "defenses", "fip"), "default"),
        (("doctor",), "state"),
    ],
)
def test_listings_are_data_too(command, column, mmdefense):
    read = json.loads(mmdefense(*command, "--format", "json").out)
    assert len(read) > 3
    rows = rows_in(mmdefense(*command, "--format", "csv").out)
    assert [set(row) for row in rows] == [set(row) for row in read]
    assert all(column in row for row in rows)


def test_an_unknown_format_is_refused_before_anything_is_done(mmdefense, tmp_path):
    for command in (("doctor",), ("list",), ("demo", "-o", tmp_path / "out")):
        said = mmdefense(*command, "--format", "yaml")
        assert said.code == 2
        assert "--format must be one of text, csv, json, got 'yaml'" in said.err
    assert not (tmp_path / "out").exists()


def test_evaluate_and_scan_print_data(place, mmdefense):
    model = (place.model, "--arch", "commands:Net")
    said = mmdefense("evaluate", *model, "--data", place.data, "--format", "csv")
    assert said.code == 0, said.err
    assert rows_in(said.out)[0]["name"] == "accuracy"
    found = json.loads(mmdefense("scan", *model, "--format", "json").out)["findings"]
    rows = rows_in(mmdefense("scan", *model, "--format", "csv").out)
    assert [row["id"] for row in rows] == [finding["id"] for finding in found]
