"""Seconds and threads of a run that was cut off and went on."""

from __future__ import annotations

import warnings

import pytest
from clocks import Clock

from mmdefense.checkpoints.runs import RunStore
from mmdefense.notes import Note
from mmdefense.runtime.parts import Parts
from mmdefense.runtime.run import Run


def part_of(tmp_path, clock, threads=1):
    return Run(store=RunStore(tmp_path), parts=Parts(clock, threads=[threads]))


def test_the_next_part_counts_on_from_the_state_that_it_goes_on_from(tmp_path):
    clock = Clock()
    first = part_of(tmp_path, clock)
    clock.now += 40
    first.keep("fisher", {})
    clock.now += 10
    first.keep("train.progress", {})
    clock.now += 500  # cut off, and begun again later
    second = part_of(tmp_path, clock)
    clock.now += 1
    second.recall("fisher")
    second.recall("train.progress")
    clock.now += 20
    assert second.parts.seconds == pytest.approx(71)
    assert second.parts.threads == [1, 1]
    second.part("a milder one").keep("fisher", {})
    second.part("a milder one").recall("fisher")  # its own: nothing is counted twice
    assert second.parts.seconds == pytest.approx(71)


def test_another_number_of_threads_is_said(tmp_path):
    clock = Clock()
    part_of(tmp_path, clock, threads=2).keep("fisher", {})
    other = part_of(tmp_path, clock, threads=1)
    with pytest.warns(Note, match="began with 2 threads and continues with 1"):
        other.recall("fisher")
    assert other.parts.threads == [2, 1]
    same = part_of(tmp_path, clock, threads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.recall("fisher")
