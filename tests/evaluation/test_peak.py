"""The peak of a known allocation, freed before the end, is found; what was there before is not."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from mmdefense.evaluation.peak import peak_growth

CPU, MIB = torch.device("cpu"), 2**20
RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "memory.py"))
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the peak is kept by Linux")


def allocate(mib):
    torch.ones(mib * MIB // 4)  # float32, written to, and let go of at once


@ON_LINUX
@pytest.mark.parametrize("mib", [64, 256])
def test_a_known_allocation_on_a_cpu(mib):
    held = torch.ones(100 * MIB // 4)
    allocate(400)  # an earlier peak, which does not count
    found = peak_growth(lambda: allocate(mib), CPU) / MIB
    assert mib - 4 <= found <= mib + 16
    assert peak_growth(lambda: None, CPU) < 16 * MIB
    assert len(held)


@pytest.mark.gpu
def test_a_known_allocation_on_a_gpu():
    device = torch.device("cuda")
    held = torch.ones(MIB, device=device)
    found = peak_growth(lambda: torch.ones(16 * MIB, device=device), device)
    assert found == 64 * MIB
    assert len(held)


@ON_LINUX
@pytest.mark.parametrize("again", [(), ("--again",)])
@pytest.mark.parametrize("side", RECIPE["SIDES"])
def test_each_side_of_the_recipe_is_measured(side, again, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--smoke", "--device", "cpu", "--one", side, *again])
    RECIPE["main"]()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["growth"] >= 0
    is_part = side.startswith(("Fast", "LoRA"))
    assert (found["trained"] < 0.2 * found["weights"]) == is_part


def test_the_table_has_a_line_a_side():
    row = {"trained": 5, "weights": 100, "plain": [MIB, 3 * MIB, 2 * MIB], "again": [MIB]}
    text = RECIPE["table"]({"FIP": row}, RECIPE["SMOKE"], "cpu")
    assert text.splitlines()[-1] == "| FIP | 5 | 5.00% | 2 (1 to 3) | 1 (1 to 1) |"
