"""What holds for every test: one thread, and a clear word where a test cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest_plugins = ["commands"]  # the fixtures of the command line

DATA = os.environ.get("MMDEFENSE_DATA", "")
# For each marker of pyproject.toml: whether its tests can run, and what to say where they cannot.
NEEDS = {
    "real_data": (
        bool(DATA) and Path(DATA).is_dir(),
        f"MMDEFENSE_DATA must name the folder of the real data sets, got {DATA!r}",
    ),
    "gpu": (torch.cuda.is_available(), "there is no CUDA device"),
    "slow": ("MMDEFENSE_SLOW" in os.environ, "MMDEFENSE_SLOW must be set, for they take minutes"),
}


def pytest_configure():
    # Two test processes share two cores; the variable is for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        for marker, (fulfilled, reason) in NEEDS.items():
            if not fulfilled and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    for marker, (_, reason) in NEEDS.items():
        count = sum(marker in report.keywords for report in skipped)
        if count:
            terminalreporter.write_line(f"left out: {count} {marker} tests, as {reason}")
    others = [r for r in skipped if not any(marker in r.keywords for marker in NEEDS)]
    for report in others:
        terminalreporter.write_line(f"left out: {report.nodeid}, {_reason(report)}")


def _reason(report) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
