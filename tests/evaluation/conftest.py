"""A grid of one case and one quick defense."""

from __future__ import annotations

import pytest
from quick import CASE

from mmdefense.evaluation.grid import Grid


@pytest.fixture
def grid(plug):
    plug("defenses", quick="quick:Quick")
    return Grid(cases=[CASE], defenses=["quick"], seeds=(0,))
