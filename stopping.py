"""How a command stops: one mechanism for Ctrl-C, SIGTERM and SIGHUP in every command.

The first signal raises :class:`Stopped` where the program stands, so that ``with`` and ``finally`` leave nothing half
written behind. Work that may only end between two of its steps calls :func:`defer` and looks at :func:`asked` there.
A second signal ends the process at once, whatever it is doing.
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
"""Seconds within which two signals are one: `timeout` and closing terminals send theirs twice."""
ORPHANED = 0.5
"""Seconds between two looks whether the parent process is still there."""


class Stopped(BaseException):
    """A signal asked the command to end. Not an Exception, so that nothing that handles errors swallows it.

    Attributes:
        signum: Number of the signal.
        kept: What was kept and how to go on, where the one who raises it knows.
    """

    def __init__(self, signum: int, kept: str = "") -> None:
        super().__init__(signum, kept)
        self.signum, self.kept = signum, kept

    @property
    def status(self) -> int:
        """The exit status that shells and schedulers expect."""
        return 128 + self.signum


class _State:
    """What has been heard in this process."""

    owner: int | None = None
    first: int | None = None
    waiting: list[Callable[[], None]] = []
    hooked = False
    following: int | None = None


def asked() -> int | None:
    """The signal that asked this command to end, or None."""
    return _State.first


def check() -> None:
    """End here if a signal asked for it.

    Raises:
        Stopped: Also where the signal itself raised one before, and a destructor or a callback of C code swallowed it.
    """
    if _State.first is not None:
        raise Stopped(_State.first)


def defer(tell: Callable[[], None]) -> None:
    """From here to :func:`resume` a signal interrupts nothing; the work that goes on looks at :func:`asked`.

    Args:
        tell: Called when a signal arrives.
    """
    if tell not in _State.waiting:
        _State.waiting.append(tell)


def resume(tell: Callable[[], None]) -> None:
    """The end of :func:`defer`; nothing where it had not begun."""
    if tell in _State.waiting:
        _State.waiting.remove(tell)


@contextlib.contextmanager
def deferred(tell: Callable[[], None]) -> Iterator[None]:
    """A block that a signal does not interrupt; the command ends behind it.

    Args:
        tell: Called when a signal arrives, so that the block may end early.
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
    """Make signals end the block by :class:`Stopped`; what is ignored before (nohup, a shell's background) stays so.

    Args:
        signals: Their numbers.
    """
    if threading.current_thread() is not threading.main_thread() or _State.owner == os.getpid():
        yield  # another thread cannot listen, and who listens already need not twice
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
    """End the process at the second signal. A thread, because the main one may hang where no handler is called."""
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
    """Behind a fork of a process that listens: workers of data loaders and pools."""
    if _State.owner == os.getppid():
        _State.owner, _State.first, _State.waiting = None, None, []
        follow_parent()


def follow_parent() -> None:
    """Let this worker process leave all signals to its parent, and end when that does, however it ended.

    A signal for a whole group (Ctrl-C, a job's SIGTERM) would otherwise kill a worker that its parent still needs for
    the step it is at, or print the worker's traceback. Only a SIGTERM that the parent itself sends ends it.
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
                    os._exit(0)  # as data loaders expect it
            else:
                time.sleep(ORPHANED)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def outlive_parent(grace: float, step: float) -> None:
    """Let this process stop as by SIGTERM some time after its parent has ended, however that ended.

    Args:
        grace: Seconds that it may take to end by itself, as the other ranks of a run do behind the first one.
        step: Seconds from the SIGTERM on, after which it ends at once.
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
