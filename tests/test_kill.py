"""A purification that is killed again and again goes on to the same bits."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file


def killed_after(arguments: list[str], seconds: float) -> bool:
    """Kill the command ``seconds`` after its first sign of progress; say whether it still ran."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmdefense", *arguments],
        cwd=Path(__file__).parent,  # where the class of the model is
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    process.stderr.readline()
    time.sleep(seconds)
    running = process.poll() is None
    process.kill()  # SIGKILL: nothing is tidied up
    process.communicate()
    return running


@pytest.mark.parametrize(
    ("kills", "steps"), [(2, 500), pytest.param(10, 3000, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_at_random_goes_on_to_the_same_bits(place, mmdefense, kills, steps):
    settings = ("--set", f"steps={steps}", "--set", "batch_size=8")
    whole, moments = place.folder / "whole", random.Random(0)
    begin = time.monotonic()
    assert mmdefense(*place.purify(*settings, out=whole)).code == 0
    took = time.monotonic() - begin
    arguments, cut = [*place.purify(*settings), "--resume"], 0
    while cut < kills and not place.out.exists():
        cut += killed_after(arguments, moments.uniform(0, took / kills))
    assert cut
    if not place.out.exists():
        assert mmdefense(*arguments).code == 0
    expected, found = (load_file(at / "model.safetensors") for at in (whole, place.out))
    assert {n: v.tolist() for n, v in found.items()} == {n: v.tolist() for n, v in expected.items()}
    # A kill amid the writing of the output leaves a hidden folder, and what it wrote, behind.
    assert [name for name in place.files() if name[0] != "."] == ["out", "whole"]
    print(f"killed {cut} times")  # last, for the command above takes what was printed before it
