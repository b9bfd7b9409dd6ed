"""Stopping a command: one mechanism for Ctrl-C, SIGTERM and SIGHUP in every command.

The first signal raises :class:`Stopped` at the line that is executed, so that ``with`` and ``finally`` leave nothing
half written behind. Work that may end only between two of its steps calls :func:`defer` and looks at :func:`asked`
there. A second signal ends the process at once, whatever it is doing.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAME = 0.25
"""Seconds within which two signals count as one: `timeout` and closing terminals send theirs twice."""
ORPHANED = 0.5
"""Seconds between two checks whether the parent process still runs."""


class Stopped(BaseException):
    """A signal asked the command to end. It is no Exception, so that no handler of errors swallows it.

    Args:
        signum: Number of the signal.
        kept: Sentence that says what was saved and how to go on; empty where nothing was.
    """

    def __init__(self, signum: int, kept: str = "") -> None:
        super().__init__(signum, kept)
        self.signum, self.kept = signum, kept

    @property
    def status(self) -> int:
        """The exit status that shells and schedulers expect: 128 plus the signal's number."""
        return 128 + self.signum


class _State:
    """The signals that this process has received, and what it does about them.

    Attributes:
        owner: Process that listens; a forked child inherits the value, but does not listen itself.
        first: Number of the first signal that arrived.
        waiting: Functions to call when a signal arrives; while there are any, signals interrupt nothing.
        hooked: Whether :func:`_in_child` is registered for forks.
        following: Process that already follows its parent.
    """

    owner: int | None = None
    first: int | None = None
    waiting: list[Callable[[], None]] = []
    hooked = False
    following: int | None = None


def asked() -> int | None:
    """The signal that asked this command to end, or None."""
    return _State.first


def check() -> None:
    """End the command here if a signal has asked for it.

    Raises:
        Stopped: Where a signal has arrived, even if it has raised this error before: a destructor or a callback of C
            code may have swallowed that one.
    """
    if _State.first is not None:
        raise Stopped(_State.first)


def defer(tell: Callable[[], None]) -> None:
    """Let signals interrupt nothing from here to :func:`resume`; the work that goes on looks at :func:`asked`.

    Args:
        tell: Function without arguments that is called when a signal arrives.
    """
    if tell not in _State.waiting:
        _State.waiting.append(tell)


def resume(tell: Callable[[], None]) -> None:
    """Let signals interrupt the program again after :func:`defer`; without a call of that it does nothing.

    Args:
        tell: Function that :func:`defer` was given.
    """
    if tell in _State.waiting:
        _State.waiting.remove(tell)


@contextlib.contextmanager
def deferred(tell: Callable[[], None]) -> Iterator[None]:
    """Run a block that signals do not interrupt; the command ends after it.

    Args:
        tell: Function without arguments that is called when a signal arrives, so that the block may end early.

    Raises:
        Stopped: Where a signal has arrived.
    """
    defer(tell)
    try:
        yield
    finally:
        resume(tell)
    check()


def _heard(signum: int, frame: object) -> None:
    if _State.owner != os.getpid() or _State.first is not None:
        return
    _State.first = signum
    if not _State.waiting:
        raise Stopped(signum)
    if sys.stderr.isatty():
        os.write(2, b"\nstopping at the end of this step; a second signal ends at once\n")
    for tell in [*_State.waiting]:
        tell()


@contextlib.contextmanager
def listening(signals: tuple[int, ...] = SIGNALS) -> Iterator[None]:
    """Let signals end a block by :class:`Stopped`. Signals that are ignored already (nohup, background jobs) stay
    ignored.

    Args:
        signals: Numbers of the signals to listen to.
    """
    if threading.current_thread() is not threading.main_thread() or _State.owner == os.getpid():
        yield  # only the main thread can listen, and one listener is enough
        return
    _State.owner, _State.first, _State.waiting = os.getpid(), None, []
    if not _State.hooked:
        os.register_at_fork(after_in_child=_in_child)
        _State.hooked = True
    before = {s: signal.getsignal(s) for s in signals if signal.getsignal(s) not in (signal.SIG_IGN, None)}
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    wakeup = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=_second, args=(ear, {*before}), name="second-signal", daemon=True).start()
    for number in before:
        signal.signal(number, _heard)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(mouth)
        _State.owner = _State.first = None


def _second(ear: int, signals: set[int]) -> None:
    """End the process at the second signal. This runs in a thread: the main one may hang where no handler is called."""
    first = None
    while number := os.read(ear, 1):
        if number[0] not in signals:
            continue
        now = time.monotonic()
        first = first or now
        if now - first > SAME:
            os._exit(128 + number[0])
    os.close(ear)


def _in_child() -> None:
    """Set up the child of a process that listens, right after the fork: a worker of a data loader or a pool."""
    if _State.owner == os.getppid():
        _State.owner, _State.first, _State.waiting = None, None, []
        follow_parent()


def follow_parent() -> None:
    """Let this worker process ignore signals, which its parent handles, and end when the parent ends for any reason.

    A signal to a whole process group (Ctrl-C, a job's SIGTERM) would otherwise kill a worker that its parent still
    needs for the current step, or print the worker's traceback. Only a SIGTERM that the parent itself sends ends the
    worker.
    """
    if _State.following == os.getpid():
        return
    _State.following, parent = os.getpid(), os.getppid()
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    heeds = hasattr(signal, "sigtimedwait")  # not on macOS, where SIGTERM keeps its effect
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if heeds:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            if heeds:
                heard = signal.sigtimedwait({signal.SIGTERM}, ORPHANED)
                if heard and heard.si_pid == parent:
                    os._exit(0)  # the status that data loaders expect
            else:
                time.sleep(ORPHANED)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def outlive_parent(grace: float, step: float) -> None:
    """Let this process stop by SIGTERM some time after its parent has ended for any reason.

    Args:
        grace: Seconds in which it may end by itself, as the other ranks of a run do after the first one.
        step: Seconds between the SIGTERM and the end of the process, whatever it is doing.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHANED)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(step)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="outlive-parent", daemon=True).start()
