"""What a terminal and a log show of progress, by a clock that is moved by hand."""

from __future__ import annotations

import io

import pytest
from clocks import Clock
from rich.console import Console

from mmdefense.report.terminal import CellsDisplay, ProgressDisplay
from mmdefense.runtime.run import Event

UNLEARN = Event("unlearn", 43, 1000, {"loss": 2.0})


@pytest.fixture
def show():
    """Return a function that shows events, each after some seconds, and what was written."""

    def written(*events, terminal):
        screen, clock = io.StringIO(), Clock()
        console = Console(file=screen, force_terminal=terminal, width=120, color_system=None)
        with ProgressDisplay(console, clock) as progress:
            for seconds, event in events:
                clock.now += seconds
                progress(event)
        return screen.getvalue()

    return written


def test_a_log_has_a_line_for_each_stage_at_its_end(show):
    said = show(
        (0, Event("reading", 0, 1)),
        (2, Event("reading", 1, 1)),
        (0, Event("guard", 0, 0)),
        (3, Event("guard", 1, 0)),
        (0, Event("purify", 0, 20)),
        (9, Event("purify", 20, 20, {"loss": 0.25})),
        terminal=False,
    )
    assert said.splitlines() == [
        "reading: done in 2 s",
        "guard: done in 3 s",
        "purify: 20 of 20 in 9 s, loss 0.25",
    ]


def test_a_log_tells_that_a_long_stage_runs_and_where_it_stopped(show):
    begin, end = (0, Event("unlearn", 0, 1000)), (1, Event("prune", 0, 5))
    said = show(begin, (11, UNLEARN), (10, UNLEARN), end, terminal=False)
    assert said.splitlines() == [
        "unlearn: 43 of 1000 after 11 s",
        "unlearn: stopped at 43 of 1000 in 22 s",
        "prune: stopped at 0 of 5 in 0 s",
    ]
    assert "\x1b" not in said


@pytest.mark.parametrize("last", [Event("fine-tune", 0, 9), Event("unlearn", 43, 1000, ended=True)])
def test_the_clock_of_a_stage_that_ended_stands_still(show, last):
    more = (60, Event("fine-tune", 0, 9))
    said = show((0, Event("unlearn", 0, 1000)), (5, UNLEARN), (0, last), more, terminal=True)
    line = [line for line in said.splitlines() if "unlearn" in line][-1]
    assert "stopped at   43/1000" in line
    assert "0:00:05" in line


def test_a_stage_that_runs_shows_the_time_that_is_left(show):
    events = ((10, Event("purify", step, 100)) for step in (0, 10, 20, 30))
    drawn = (0, Event("memory", 0, 1, note="a note, with which the bars are drawn again"))
    assert "left 0:01:10" in show(*events, drawn, terminal=True)


@pytest.mark.parametrize(("seconds", "rate"), [(0.5, "20/s"), (100, "10 s each")])
def test_a_stage_that_runs_shows_its_rate_until_it_ends(show, seconds, rate):
    events = ((seconds, Event("purify", step, 100)) for step in (0, 10, 20, 30))
    drawn = (0, Event("memory", 0, 1, note="a note, with which the bars are drawn again"))
    assert rate in show(*events, drawn, terminal=True)
    over = [(seconds, Event("purify", step, 20)) for step in (0, 10, 20)]
    assert rate not in show(*over, terminal=True).splitlines()[-1]


def test_nothing_is_shown_where_it_is_to_be_quiet(capsys):
    with ProgressDisplay(quiet=True) as progress, CellsDisplay(quiet=True) as cells:
        progress(Event("purify", 1, 1, note="a note"))
        progress(Event("purify", 1, 1))
        cells.show(1, 0, 2, ["a cell"])
        cells.say("a sentence")
    assert capsys.readouterr().err == ""


def test_a_stage_that_comes_again_counts_anew(show):
    once = ((0, Event("guard", 0, 0)), (4, Event("guard", 1, 0)))
    said = show(*once, (1, Event("purify", 1, 1)), *once, terminal=False)
    assert [line for line in said.splitlines() if line.startswith("guard")] == [
        "guard: done in 5 s",  # up to the first word of the next stage
        "guard: done in 4 s",
    ]


def test_cells_are_a_line_each_time_one_is_done_and_say_what_is_left():
    clock = Clock()
    console = Console(file=io.StringIO(), width=100)
    with CellsDisplay(console, clock) as display:
        display.show(2, 0, 8, [], 1)
        display.show(2, 0, 8, [], 1)
        display.show(2, 0, 8, [])
        clock.now += 30
        display.show(2, 0, 8, ["a", "b"])
        display.show(3, 1, 8, ["a"])
        display.say("worker 1 was \x1b[2J killed")
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "2 of 8 cells done, 0 failed, 0 running, 1 victim in training",
        "2 of 8 cells done, 0 failed, 0 running",
        "3 of 8 cells done, 1 failed, 1 running, about 1 min 0 s left",
        r"worker 1 was \x1b[2J killed",
    ]


def test_cells_are_a_live_table_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with CellsDisplay(console) as display:
        display.show(1, 0, 4, ["digits-badnets/0: fip"])
    shown = console.file.getvalue()
    assert "1 of 4 cells done, 0 failed, 1 running" in shown
    assert "digits-badnets/0: fip" in shown
