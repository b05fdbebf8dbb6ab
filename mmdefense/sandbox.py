"""Read untrusted files in a child process, so that whatever goes wrong ends in a one-line error.

The child is a fork: it starts in a few hundredths of a second, with all libraries of this process
loaded. Its time and memory are limited, it writes no core dumps, has no network, and may not start
other programs; its result comes back as JSON of limited size. A reader that never ends, needs too
much memory or crashes is a one-line error here, whatever the file does.

The limits grow with the file size; ``MMDEFENSE_READ_SECONDS`` and ``MMDEFENSE_READ_GIB`` override
them, and 0 means no limit. On systems other than Linux, where forking a process with many libraries
is unsafe, the work is done in this process: only the readers' own limits apply there.

The child computes on one thread, like the workers of ``torch.utils.data.DataLoader``, since threads
do not survive a fork; it may use all threads only if nothing was computed before; see
:func:`fresh`.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Literal, NoReturn

from mmdefense.errors import (
    BadInputError,
    DivergenceError,
    LowUtilityError,
    MMDefenseError,
    UnsupportedError,
    one_line,
    printable,
)
from mmdefense.notes import Note, note

__all__ = [
    "BeyondBoundsError",
    "Channel",
    "Network",
    "differentiates_in_child",
    "fresh",
    "in_child",
    "inside",
    "total_size",
]

SECONDS, SPEED = 60.0, 10e6
"""Seconds that a reader may take, plus one second per so many bytes. Our choice."""
BYTES, FACTOR = 4 << 30, 6
"""Memory that a reader may use, plus this multiple of the file's size. Our choice."""
_PATIENCE = 2
"""Wall-clock limit as a multiple of the CPU limit, for readers that wait or share a core."""
OF_A_THREAD = 1 << 27
"""Address space that a thread reserves for its stack and heap, mostly unused."""
MAX_FILE = 5 << 30
"""Bytes of a file that the child may write: archives are unpacked into unnamed temporary files."""
MAX_MESSAGE = 1 << 25

_SECONDS_NAME, _GIB_NAME = "MMDEFENSE_READ_SECONDS", "MMDEFENSE_READ_GIB"
_ABROAD = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg"}
_STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_FULL = ("can't allocate memory", "Cannot allocate memory", "Unable to allocate", "bad alloc")

Network = Literal["never", "later", "always"]
"""When a child may use the network and start other programs: "later" is once its limits are lifted,
to fetch data that the user names; "always" is for the user's own code."""

_state = {"inside": False, "fresh": False, "shut": False}


class BeyondBoundsError(BadInputError):
    """Reading a file exceeded its time or memory limit, or crashed the reader."""


_ERRORS: Mapping[str, type[Exception]] = {
    **{kind.__name__: kind for kind in (BadInputError, UnsupportedError, MMDefenseError)},
    **{kind.__name__: kind for kind in (LowUtilityError, DivergenceError, BeyondBoundsError)},
    **{kind.__name__: kind for kind in (OSError, ImportError)},
}


def total_size(place: Path) -> int:
    """Return the size in bytes of a file, or of all regular files below a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def inside() -> bool:
    """Return whether this is already a child process, which needs no child of its own."""
    return _state["inside"]


def fresh() -> None:
    """Declare that this process computes nothing before it reads: children may use threads."""
    _state["fresh"] = True


class Channel:
    """The channel on which the work in the child reports to this process.

    Without a child the listener is called directly, and there are no limits.
    """

    def __init__(
        self,
        send: Callable[[str, Any], None],
        bounded: bool = True,
        network: Network = "never",
    ) -> None:
        self._send, self._bounded, self._network = send, bounded, network
        self._start = _address_space() if bounded else 0

    def send(self, message: Any) -> None:
        """Send a message of plain JSON values."""
        self._send("message", message)

    def begin(self, what: str, size: int) -> None:
        """Announce what is read next, and restart the time and memory limits for it.

        Args:
            what: The subject of a sentence, such as ``"reading model.bin"``.
            size: Its bytes.
        """
        if self._bounded:
            most = _most_bytes(size)
            _limit(resource.RLIMIT_AS, most and self._start + most)
            used, seconds = time.process_time(), _most_seconds(size)
            most = math.ceil(used + seconds * _threads()) if seconds else 0
            _limit(resource.RLIMIT_CPU, most)
            self._send("begin", [what, size])

    def lift(self) -> None:
        """Lift the limits: what follows is the user's own work."""
        if self._bounded:
            _limit(resource.RLIMIT_AS, 0)
            _limit(resource.RLIMIT_CPU, 0)
            self._send("begin", ["", -1])
            if self._network == "later":
                _offline(False)


def in_child(
    work: Callable[[Channel], Any],
    hear: Callable[[Any], None] = lambda _: None,
    *,
    what: str,
    size: int,
    network: Network = "never",
    quiet: bool = False,
) -> Any:
    """Do work that reads untrusted files in a child process, and return what it returns.

    Args:
        work: Gets the :class:`Channel`; what it returns and sends is plain JSON.
        hear: Called with each message from the work.
        what: What the work reads, as the subject of a sentence: ``"reading model.bin"``.
        size: Bytes of that; see :meth:`Channel.begin`.
        network: When the network and other programs may be used.
        quiet: Whether to drop the child's notes, because the same file is read again here.

    Raises:
        BeyondBoundsError: If it took too long, too much memory, or crashed.
        MMDefenseError: What the work raises, in its own class.
    """
    if inside() or not sys.platform.startswith("linux"):
        return work(Channel(lambda _, message: hear(message), bounded=False))
    _most_seconds(size), _most_bytes(size)  # a wrong variable fails here
    receiving, sending = Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, on forks beside threads
        child = os.fork()
    if child == 0:
        receiving.close()
        _live(work, sending, what, size, network)
    sending.close()
    try:
        return _heard(child, receiving, hear, what, size, quiet)
    finally:
        receiving.close()
        _end(child)


def differentiates_in_child() -> bool:
    """Return whether a child can compute gradients.

    It cannot if PyTorch has started threads for gradients here, as it does for the first gradient
    on a machine with an accelerator. It does not tell, so a child tries.
    """
    if inside() or not sys.platform.startswith("linux"):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, on forks beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            import torch

            torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
            code = 0
        finally:  # whatever it raises, nothing of the parent's work goes on here
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _heard(
    child: int,
    receiving: Connection,
    hear: Callable[[Any], None],
    what: str,
    size: int,
    quiet: bool,
) -> Any:
    """Listen to a child until it is done."""
    begun, most = time.monotonic(), _most_seconds(size)
    while True:
        left = begun + _PATIENCE * most - time.monotonic() if most else None
        if not receiving.poll(left if left is None else max(left, 0)):
            raise _too_long(what, size)
        try:
            kind, message = json.loads(receiving.recv_bytes(MAX_MESSAGE))
        except (EOFError, OSError, ValueError):
            raise _crashed(child, what, size) from None
        if kind == "message":
            hear(message)
        elif kind == "begin":
            what, size = printable(message[0]) or what, message[1]
            begun, most = time.monotonic(), 0 if size < 0 else _most_seconds(size)
        elif kind == "note" and not quiet:
            note(str(message))
        elif kind == "full":
            raise _full(what, size)
        elif kind == "error":
            raise _raised(*message)
        elif kind == "done":
            return message


def _raised(kind: str, text: str, trace: str) -> Exception:
    """Return the error that a child reported; an error class that is not ours is a bug of ours."""
    known = _ERRORS.get(kind)
    error = known(text) if known else type(kind, (RuntimeError,), {})(text)
    if os.environ.get("MMDEFENSE_DEBUG"):
        error.add_note(trace)
    return error


def _beyond(what: str, how: str, variable: str, most: float) -> BeyondBoundsError:
    return BeyondBoundsError(
        f"{what} {how} and was refused; if you trust it, raise the limit with "
        f"{variable}={max(1, 10 * round(most))}"
    )


def _too_long(what: str, size: int) -> BeyondBoundsError:
    most = _most_seconds(size)
    return _beyond(what, f"took more than {most:.0f} s", _SECONDS_NAME, most)


def _full(what: str, size: int) -> BeyondBoundsError:
    most = _most_bytes(size) / 2**30
    if not most:
        return BeyondBoundsError(f"{what} needs more memory than is available: refused")
    return _beyond(what, f"took more than {most:.1f} GiB of memory", _GIB_NAME, most)


def _crashed(child: int, what: str, size: int) -> BeyondBoundsError:
    """Return the error for a child that stopped reporting."""
    _, status = os.waitpid(child, 0)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGKILL:
        return BeyondBoundsError(f"{what} was killed, probably for lack of memory: refused")
    if number == signal.SIGXCPU:
        return _too_long(what, size)
    how = signal.Signals(number).name if number else f"exit {os.waitstatus_to_exitcode(status)}"
    return BeyondBoundsError(f"{what} crashed the reader ({how}): refused")


def _end(child: int) -> None:
    """Kill a child that may have ended already."""
    with suppress(ChildProcessError, ProcessLookupError):
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _most_seconds(size: int) -> float:
    return _from_environment(_SECONDS_NAME, SECONDS + max(size, 0) / SPEED)


def _most_bytes(size: int) -> int:
    return int(_from_environment(_GIB_NAME, (BYTES + FACTOR * max(size, 0)) / 2**30) * 2**30)


def _from_environment(name: str, otherwise: float) -> float:
    """Return the bound that a variable sets, 0 for none.

    Raises:
        BadInputError: If it is no such number.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else otherwise
        if not 0 <= value < 1e9:
            raise ValueError(text)
    except ValueError:
        raise BadInputError(
            f"{name} must be a number from 0 (no limit) to 1e9, got {text!r:.60}"
        ) from None
    return value


def _live(
    work: Callable[[Channel], Any], sending: Connection, what: str, size: int, network: Network
) -> NoReturn:
    """Run as the child: do the work, report the outcome, and exit without cleanup."""

    def send(kind: str, message: Any) -> None:
        content = json.dumps([kind, message]).encode()
        if len(content) > MAX_MESSAGE:
            raise BeyondBoundsError(f"{what} returned a message of {len(content)} bytes: refused")
        sending.send_bytes(content)

    try:
        _confine(send, network)
        channel = Channel(send, network=network)
        channel.begin(what, size)
        done = work(channel)
        send("done", done)
    except BaseException as error:  # all of it is reported
        _limit(resource.RLIMIT_AS, 0)
        with suppress(BaseException):
            send(*_error_message(error))
    finally:
        os._exit(0)


def _error_message(error: BaseException) -> tuple[str, Any]:
    """Return the message that reports an error."""
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(one, MemoryError) for one in chain) or any(w in str(error) for w in _FULL):
        return "full", None
    kind = type(error).__name__
    for known in (ImportError, OSError):
        kind = known.__name__ if isinstance(error, known) else kind
    text = printable(str(error)) if isinstance(error, MMDefenseError) else one_line(error)
    trace = "".join(traceback.format_exception(error))
    return "error", [kind, text[:4000], trace[-20_000:]]


def _confine(send: Callable[[str, Any], None], network: Network) -> None:
    """Drop from this process, a child, everything that reading does not need."""
    _state["inside"] = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # as long as the process
    faulthandler.disable()
    _die_with_parent()
    _limit(resource.RLIMIT_CORE, 0, none=True)
    _limit(resource.RLIMIT_FSIZE, MAX_FILE)
    if torch := sys.modules.get("torch"):
        # Also makes PyTorch's thread pool anew, which two threads of a reader must not do at once.
        torch.set_num_threads(torch.get_num_threads() if _state["fresh"] else 1)
    if network != "always":
        _stay_at_home(network)

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, Note):
            send("note", str(message)[:1000])

    warnings.showwarning = show  # type: ignore[assignment]


def _stay_at_home(network: Network) -> None:
    """Deny this process the network and other programs."""
    if network == "never" and hasattr(os, "unshare"):  # from Python 3.12, where it is permitted
        with suppress(OSError):
            os.unshare(os.CLONE_NEWNET)  # type: ignore[attr-defined,unused-ignore]
    _offline(True)

    def refuse(event: str, _: Any) -> None:
        if _state["shut"] and (event in _ABROAD or event in _STARTS):
            raise PermissionError(f"{event} is not allowed while untrusted files are read")

    sys.addaudithook(refuse)


def _offline(shut: bool) -> None:
    """Tell the clients of the hub whether there is a network, and the hook below them."""
    _state["shut"] = shut
    for name in _OFFLINE:
        os.environ[name] = "1" if shut else "0"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = shut


def _die_with_parent() -> None:
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _limit(kind: int, value: int, none: bool = False) -> None:
    """Set a limit of this process; 0 removes it, None leaves it."""
    _, hard = resource.getrlimit(kind)
    wanted = value if value or none else hard
    if hard != resource.RLIM_INFINITY and (wanted > hard or wanted == resource.RLIM_INFINITY):
        wanted = hard
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (wanted, hard))


def _address_space() -> int:
    """Return the bytes that this process has reserved, and its threads may reserve."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize() + OF_A_THREAD * _threads()


def _threads() -> int:
    """Return how many threads a child may compute on."""
    return (os.cpu_count() or 1) if _state["fresh"] else 1
