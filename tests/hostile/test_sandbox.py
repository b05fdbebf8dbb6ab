"""The child that reads untrusted files: whatever happens in it ends in one line here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch

from mmdefense.errors import BadInputError, LowUtilityError
from mmdefense.notes import Note, note
from mmdefense.sandbox import BeyondBoundsError, in_child, inside

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="children are forked on Linux alone"
)


def done(work, hear=lambda _: None, **options):
    return in_child(work, hear, what="reading it", size=0, **options)


def test_what_is_returned_and_told_comes_back():
    heard = []

    def work(channel):
        channel.send({"part": [1, None, "\udc80"]})
        return inside(), os.getpid()

    within, process = done(work, heard.append)
    assert heard == [{"part": [1, None, "\udc80"]}]
    assert (within, inside()) == (True, False)
    assert process != os.getpid()


def test_an_error_of_ours_keeps_its_class_and_another_its_name():
    def refuse(_):
        raise LowUtilityError("too low\x1b[2J")

    with pytest.raises(LowUtilityError, match=r"^too low\\x1b\[2J$"):
        done(refuse)
    with pytest.raises(RuntimeError, match="division by zero") as fault:
        done(lambda _: 1 / 0)
    assert type(fault.value).__name__ == "ZeroDivisionError"


def test_a_note_is_heard_unless_the_same_is_read_again():
    def work(_):
        note("something was assumed")

    with pytest.warns(Note, match="something was assumed"):
        done(work)
    done(work, quiet=True)  # pytest would not mind, but the next line tells
    assert done(lambda _: 1, quiet=True) == 1


def crash(number):
    return lambda _: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda _: len(bytearray(6 * 10**9)), "more than 4.0 GiB of memory"),
        (lambda _: torch.empty(10**10).numel(), "more than 4.0 GiB of memory"),
        (crash(signal.SIGSEGV), "crashed the reader (SIGSEGV)"),
        (crash(signal.SIGABRT), "crashed the reader (SIGABRT)"),
        (crash(signal.SIGKILL), "was killed"),
        (lambda _: os._exit(3), "crashed the reader (exit 3)"),
        (lambda _: "x" * (1 << 26), "a message of"),
    ],
    ids=["bytes", "tensor", "segfault", "abort", "killed", "exit", "flood"],
)
def test_a_flood_or_a_crash_is_one_line(work, said):
    with pytest.raises(BeyondBoundsError) as refused:
        done(work)
    assert str(refused.value).startswith("reading it ")
    assert said in str(refused.value)


@pytest.mark.parametrize("wait", [lambda: None, threading.Event().wait], ids=["computes", "waits"])
def test_what_never_ends_is_ended(monkeypatch, wait):
    monkeypatch.setenv("MMDEFENSE_READ_SECONDS", "0.5")

    def work(_):
        while True:
            wait()

    with pytest.raises(BeyondBoundsError, match="MMDEFENSE_READ_SECONDS"):
        done(work)


def test_the_bounds_can_be_raised_and_lifted(monkeypatch):
    monkeypatch.setenv("MMDEFENSE_READ_GIB", "0")
    assert done(lambda _: torch.empty(5 << 30, dtype=torch.uint8).numel()) == 5 << 30
    monkeypatch.setenv("MMDEFENSE_READ_GIB", "1")
    with pytest.raises(BeyondBoundsError, match="MMDEFENSE_READ_GIB=10"):
        done(lambda _: torch.empty(2 << 30, dtype=torch.uint8).numel())
    monkeypatch.setenv("MMDEFENSE_READ_GIB", "much")
    with pytest.raises(BadInputError, match="MMDEFENSE_READ_GIB must be a number"):
        done(lambda _: 1)


@pytest.mark.parametrize(
    "work",
    [
        lambda _: socket.create_connection(("127.0.0.1", 9), timeout=1),
        lambda _: socket.getaddrinfo("localhost", 80),
        lambda _: os.system("true"),
        lambda _: subprocess.run(["true"], check=True),
    ],
    ids=["connects", "looks up", "system", "starts"],
)
def test_neither_network_nor_programs(work):
    with pytest.raises(OSError, match="is not allowed while untrusted files are read"):
        done(work)


def test_no_child_is_left(monkeypatch):
    monkeypatch.setenv("MMDEFENSE_READ_SECONDS", "0.2")
    heard = []

    def work(channel):
        channel.send(os.getpid())
        threading.Event().wait()

    with pytest.raises(BeyondBoundsError):
        done(work, heard.append)
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)
