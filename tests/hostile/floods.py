"""Runs the command line in a process of its own, with bounds that no input may reach."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import mmdefense.pipeline.evaluating  # noqa: F401  # here, so that each command need not
import mmdefense.pipeline.scan  # noqa: F401
from mmdefense.cli.app import main

SECONDS, PATIENCE, BYTES = 30, 120, 2 << 30


@dataclass(frozen=True)
class Ended:
    """How a command ended; the code is less than 0 where it was killed, since the time was up."""

    code: int
    out: str
    err: str


def bounded(folder: Path, *arguments: object) -> Ended:
    """Run a command with 2 GiB of memory beyond what this process has, and 30 seconds of work."""
    said = [folder / "out.txt", folder / "err.txt"]
    child = os.fork()
    if child == 0:
        _be_the_command(said, arguments)
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], PATIENCE)[0]:
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(ended)
    out, err = (path.read_text(errors="replace") for path in said)
    return Ended(os.waitstatus_to_exitcode(status), out, err)


def _be_the_command(said: list[Path], arguments: tuple[object, ...]) -> None:
    code: object = 70
    try:
        os.setpgid(0, 0)
        for stream, path in enumerate(said, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", 1) for stream in (1, 2))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        sys.argv = ["mmdefense", *map(str, arguments)]
        main()
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
