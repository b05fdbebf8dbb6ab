"""Everyday inputs, a row each: the right value, or the exit code and the line.

Each row was wrong without a word once. The rows lie in ``tests/everyday``, a module for each kind
of fault, which gives them as ``ROWS``.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from everyday.rows import Command, Refused

_FOLDER = Path(__file__).with_name("everyday")
_MODULES = sorted(p.stem for p in _FOLDER.glob("*.py") if p.stem not in {"rows", "__init__"})
ROWS = {
    f"{module}: {row.name}": row
    for module in _MODULES
    for row in importlib.import_module(f"everyday.{module}").ROWS
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_an_everyday_input(row, tmp_path, mmdefense, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(row, Command):
        done = mmdefense(*row.make(tmp_path))
        written = done.out + done.err
        assert done.code == row.code, written
        assert re.search(row.said, written), written
        if row.check is not None:
            row.check(tmp_path)
    elif isinstance(row.right, Refused):
        with pytest.raises(row.right.error, match=row.right.line) as refusal:
            row.read(tmp_path)
        assert "\n" not in str(refusal.value)
    else:
        found = row.read(tmp_path)
        assert _same(found, row.right), found


def _same(found, right) -> bool:
    """Compare values, numbers within 1e-6, in lists and tuples of any depth."""
    if isinstance(right, list | tuple) and isinstance(found, list | tuple):
        return len(found) == len(right) and all(map(_same, found, right))
    exact = right is None or isinstance(right, bool | str)
    return found == (right if exact else pytest.approx(right, rel=1e-6, abs=1e-6))
