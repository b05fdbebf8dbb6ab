"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmdefense.errors import UnsupportedError

__all__ = ["peak_growth"]

_PROCESS = Path("/proc/self")


def peak_growth(work: Callable[[], Any], device: torch.device) -> int:
    """Return by how many bytes memory in use grows at its peak while ``work`` is done.

    On a GPU that is what the allocator has given out, which is exact. On a CPU it is the resident
    set of this process, whose peak Linux is asked to forget before: right to a few MiB for what is
    allocated in large pieces, as tensors are. What is loaded at first use counts too, so do a
    little of the work once before; and let memory that is freed go back to the system at once
    (``MALLOC_MMAP_THRESHOLD_=65536`` in the environment), or gaps are counted that nothing uses.

    Raises:
        UnsupportedError: If the system keeps no such peak.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _give_back()
        (_PROCESS / "clear_refs").write_text("5")  # the peak is the present from now on
        before = _status("VmRSS")
    except OSError as error:
        raise UnsupportedError(
            "the peak of a process can be measured on Linux only; on another system, measure on "
            "a GPU: --device cuda"
        ) from error
    work()
    return max(0, _status("VmHWM") - before)


def _give_back() -> None:
    """Let the C library give freed memory back to the system, where it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """Return a size of this process in bytes, by its name in ``/proc/self/status``."""
    lines = (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
