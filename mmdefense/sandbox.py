"""Untrusted files are read in a child process, so that what goes wrong there ends in one line.

The child is a fork: it starts in some hundredths of a second, with all libraries of this process
at hand. It has bounds of time and memory, no core dumps, no network, and it may not start other
programs; what it says comes back as JSON, of a bounded size. A reader that never ends, asks for
more memory than the machine has, or crashes is an error of one line here, whatever the file does.

How long and how much is a matter of the file's size; ``MMDEFENSE_READ_SECONDS`` and
``MMDEFENSE_READ_GIB`` say otherwise, and 0 lifts the bound. On systems other than Linux, where a
fork of a process with many libraries is not sound, the work is done in this process: the bounds
that readers have of their own hold there alone.

The child computes on one thread, as the workers of ``torch.utils.data.DataLoader`` do, for threads
do not survive a fork; only where nothing was computed before may it use all; see :func:`fresh`.
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

__all__ = ["BeyondBoundsError", "Channel", "Network", "apart", "fresh", "inside", "total_size"]

SECONDS, SPEED = 60.0, 10e6
"""A reader may take this long, and longer by a second for so many bytes. Ours."""
BYTES, FACTOR = 4 << 30, 6
"""A reader may ask for this much memory, and for so many times the file's size. Ours."""
_PATIENCE = 2
"""A reader that waits, or shares its processor, may take so many times as long by the clock."""
OF_A_THREAD = 1 << 27
"""Address space that a thread reserves for its stack and its heap, and seldom uses."""
MAX_FILE = 5 << 30
"""Bytes of a file that the child may write: archives are unpacked into nameless ones."""
MAX_MESSAGE = 1 << 25

_SECONDS_NAME, _GIB_NAME = "MMDEFENSE_READ_SECONDS", "MMDEFENSE_READ_GIB"
_ABROAD = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg"}
_STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_FULL = ("can't allocate memory", "Cannot allocate memory", "Unable to allocate", "bad alloc")
_TOLD: tuple[type[Warning], ...] = (Note, RuntimeWarning)

Network = Literal["never", "later", "always"]
"""When a child may use the network and start other programs: later is once its bounds are lifted,
to get data that the user names; always is for code of the user's own."""

_state = {"inside": False, "fresh": False, "shut": False}


class BeyondBoundsError(BadInputError):
    """Reading a file took more time or memory than it may, or crashed the reader."""


_ERRORS: Mapping[str, type[Exception]] = {
    **{kind.__name__: kind for kind in (BadInputError, UnsupportedError, MMDefenseError)},
    **{kind.__name__: kind for kind in (LowUtilityError, DivergenceError, BeyondBoundsError)},
    **{kind.__name__: kind for kind in (OSError, ImportError)},
}


def total_size(place: Path) -> int:
    """Return the bytes of a file, or of all plain files below a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def inside() -> bool:
    """Say whether this is a child already, so that none of its own is needed."""
    return _state["inside"]


def fresh() -> None:
    """Say that this process computes nothing before it reads, so that children may use threads."""
    _state["fresh"] = True


class Channel:
    """What the work in the child tells this process by.

    Where there is no child, the listener is called, and there are no bounds.
    """

    def __init__(
        self,
        send: Callable[[str, Any], None],
        bounded: bool = True,
        network: Network = "never",
    ) -> None:
        self._send, self._bounded, self._network = send, bounded, network
        self._start = _address_space() if bounded else 0

    def tell(self, message: Any) -> None:
        """Hand on a message of plain JSON values."""
        self._send("tell", message)

    def begin(self, what: str, size: int) -> None:
        """Say what is read next, and start the clock and the count of memory for it.

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
        """Say that what follows takes as long, and as much memory, as the user's work takes."""
        if self._bounded:
            _limit(resource.RLIMIT_AS, 0)
            _limit(resource.RLIMIT_CPU, 0)
            self._send("begin", ["", -1])
            if self._network == "later":
                _offline(False)


def apart(
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
        work: Gets the :class:`Channel`; what it returns and tells is plain JSON.
        hear: Called with each message that is told.
        what: What the work reads, as the subject of a sentence: ``"reading model.bin"``.
        size: Bytes of that; see :meth:`Channel.begin`.
        network: When the network and other programs may be used.
        quiet: Whether notes of the child are left out, since the same is read again here.

    Raises:
        BeyondBoundsError: If it took too long, too much memory, or crashed.
        MMDefenseError: What the work raises, in its own class.
    """
    if inside() or not sys.platform.startswith("linux"):
        return work(Channel(lambda _, message: hear(message), bounded=False))
    _most_seconds(size), _most_bytes(size)  # a wrong variable is told here
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
        if kind == "tell":
            hear(message)
        elif kind == "begin":
            what, size = printable(message[0]) or what, message[1]
            begun, most = time.monotonic(), 0 if size < 0 else _most_seconds(size)
        elif kind == "note" and not quiet:
            _pass_on(*message)
        elif kind == "full":
            raise _full(what, size)
        elif kind == "error":
            raise _raised(*message)
        elif kind == "done":
            return message


def _pass_on(kind: str, text: str) -> None:
    if kind == "Note":
        note(text)
    else:
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _raised(kind: str, text: str, trace: str) -> Exception:
    """Return the error that a child told of; one that is none of ours is a fault of ours."""
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
    """Return the error for a child that has fallen silent."""
    _, status = os.waitpid(child, 0)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGKILL:
        return BeyondBoundsError(f"{what} was killed, probably for lack of memory: refused")
    if number == signal.SIGXCPU:
        return _too_long(what, size)
    how = signal.Signals(number).name if number else f"exit {os.waitstatus_to_exitcode(status)}"
    return BeyondBoundsError(f"{what} crashed the reader ({how}): refused")


def _end(child: int) -> None:
    """End a child that may have ended already."""
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
    """Be the child: do the work, tell how it ended, and end without a trace of this process."""

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
    except BaseException as error:  # all of it is told
        _limit(resource.RLIMIT_AS, 0)
        with suppress(BaseException):
            send(*_told(error))
    finally:
        os._exit(0)


def _told(error: BaseException) -> tuple[str, Any]:
    """Return the message that tells of an error."""
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
    """Take from this process, a child, what reading does not need."""
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
        if issubclass(category, _TOLD):
            kind = "Note" if issubclass(category, Note) else "RuntimeWarning"
            send("note", [kind, str(message)[:1000]])

    warnings.showwarning = show  # type: ignore[assignment]


def _stay_at_home(network: Network) -> None:
    """Refuse the network and other programs to this process."""
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
    """Set a limit of this process; 0 lifts it, unless none is asked for."""
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
