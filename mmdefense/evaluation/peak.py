"""The peak memory of a piece of work."""

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
    """Return by how many bytes the memory in use grows, at its peak, during ``work``.

    On a GPU it is the memory of the allocator, which is exact. On a CPU it is the resident set of
    this process, after a reset of its peak: accurate to a few MiB for large allocations, such as
    tensors. What is loaded on first use counts too, so run a little of the work once before. Let
    the process return freed memory to the system at once (``MALLOC_MMAP_THRESHOLD_=65536`` in the
    environment), or unused gaps are counted.

    Raises:
        UnsupportedError: If the system does not record such a peak.
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
        _trim()
        (_PROCESS / "clear_refs").write_text("5")  # reset the peak to the current size
        before = _status("VmRSS")
    except OSError as error:
        raise UnsupportedError(
            "the peak of a process can be measured on Linux only; on another system, measure on "
            "a GPU: --device cuda"
        ) from error
    work()
    return max(0, _status("VmHWM") - before)


def _trim() -> None:
    """Let the C library return freed memory to the system, if it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """Return a size of this process in bytes, by its name in ``/proc/self/status``."""
    lines = (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
