"""What a grid says about backdoors that come back."""

from __future__ import annotations

import dataclasses

import pytest
from quick import CASE

from mmdefense.errors import BadInputError
from mmdefense.evaluation.export import rows_of
from mmdefense.evaluation.spec import read_spec
from mmdefense.evaluation.tables import markdown
from mmdefense.report.leaderboard import leaderboard
from mmdefense.store import Store


def test_purified_models_are_retuned_beside_a_clean_twin_where_that_is_asked_for(grid, tmp_path):
    grid, store = dataclasses.replace(grid, baselines=False), Store(tmp_path)
    assert grid.run(tmp_path)[0].row.after.retuned is None
    assert "ASR after retuning" not in leaderboard(rows_of(store))
    (cell,) = dataclasses.replace(grid, retune=3).run(tmp_path)
    twins = [store.content(entry)["case"]["attack"] for entry in store.entries("victim")]
    assert sorted(map(str, twins)) == ["None", "badnets"]
    assert 0 <= cell.row.after.retuned <= 1
    assert 0 <= cell.row.retuned_twin <= 1
    head, _, before, after = markdown([cell]).splitlines()
    assert "| DER | ASR after retuning | seconds |" in head
    assert f"| {100 * cell.row.after.retuned:.1f} | " in after
    assert f"clean twin after retuning: {100 * cell.row.retuned_twin:.1f} |" in after
    assert head.count("|") == before.count("|") == after.count("|")
    rows = rows_of(store)
    assert [row["asr_retuned"] is None for row in rows] == [True, False]
    assert "ASR after retuning" in leaderboard(rows)


def test_a_clean_victim_is_not_retuned(grid):
    clean = dataclasses.replace(CASE, attack=None)
    (cell,) = dataclasses.replace(grid, cases=[clean], baselines=False, retune=3).planned()
    assert (cell.retune, cell.twin) == (0, None)


def test_too_few_samples_to_retune_on_cost_no_other_measurement(grid, tmp_path):
    (cell,) = dataclasses.replace(grid, baselines=False, retune=1000).run(tmp_path)
    assert cell.row.note.startswith("not retuned: the retuning attack must have between 1 and")
    assert cell.row.after.retuned is None
    assert cell.row.after.acc is not None


def test_a_spec_says_on_how_many_samples(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text("cases = ['digits-badnets']\nretune = 5\ndefenses = ['fip']\n")
    assert read_spec(path).retune == 5
    path.write_text("defenses = ['fip']\nretune = 'a few'\n")
    with pytest.raises(BadInputError, match="must be a number of poisoned samples"):
        read_spec(path)
