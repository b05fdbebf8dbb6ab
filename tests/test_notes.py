"""Notes: a warning in Python, one line on standard error in the command line."""

from __future__ import annotations

import warnings

import pytest

from mmdefense.notes import Note, note, notes_written
from mmdefense.runtime.run import Event, silent


def test_a_note_is_a_warning_in_python():
    with pytest.warns(Note, match="3 files were skipped"):
        note("3 files were skipped")


def test_a_note_points_to_the_users_line():
    with pytest.warns(Note) as told:
        silent(Event("guard", 0, 1, note="14 held-out samples are too few to decide"))
    assert told[0].filename == __file__


def test_the_command_line_writes_each_note_once(capsys):
    with notes_written():
        for text in ("one", "two", "one"):
            note(text)
    assert capsys.readouterr().err == "mmdefense: note: one\nmmdefense: note: two\n"


def test_other_warnings_are_left_as_they_are(capsys):
    with notes_written(), pytest.warns(RuntimeWarning, match="of others"):
        warnings.warn("of others", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == ""
