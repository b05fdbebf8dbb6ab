"""Nothing hides from the scan by being written in a way that only some unpickler reads."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from crafted import CRAFTED

from mmdefense.findings import worst_level
from mmdefense.scanning.files import scan_files

LIVE = [row for row in CRAFTED if row.load]


def names(rows):
    return [row.name for row in rows]


@pytest.mark.parametrize("row", CRAFTED, ids=names(CRAFTED))
def test_a_crafted_file_is_high_and_not_run(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / row.file).write_bytes(row.make(Path("sentinel")))
    found = scan_files(folder)
    assert worst_level(found) == "high", found
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("row", LIVE, ids=names(LIVE))
def test_a_crafted_file_is_real(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    (tmp_path / row.file).write_bytes(row.make(Path("sentinel")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row.load(tmp_path / row.file)
        except Exception as error:  # most break behind the call
            print(repr(error))
    assert (tmp_path / "sentinel").is_dir()
