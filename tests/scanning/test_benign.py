"""What training, saving and sharing models leaves behind is not called high."""

from __future__ import annotations

import pytest
from benign import BENIGN

from mmdefense.scanning.files import scan_files


@pytest.mark.parametrize("name", BENIGN)
def test_no_false_alarm(tmp_path, name):
    if "." not in name:
        (tmp_path / name).mkdir()
    BENIGN[name](tmp_path / name)
    found = scan_files(tmp_path)
    assert [f"{f.id} {f.subject} {f.value}" for f in found if f.level == "high"] == []


def test_there_are_enough_of_them():
    assert len(BENIGN) >= 40
