"""Units for test_units.py, in a module that a spawned process can import."""

import os
import time
from functools import partial
from pathlib import Path

from videoalign import VideoAlignError
from videoalign.miniature.study.units import Unit


def write(path, needs=(), seconds=0.0):
    """Write a result, and beside it which process did it; each need must be there."""
    assert all(Path(need).exists() for need in needs)
    time.sleep(seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.runs", "a") as file:
        file.write(f"{os.getpid()}\n")
    path.write_text("done")


def fail(switch):
    """Fail until somebody creates the switch."""
    if not switch.exists():
        raise VideoAlignError("the disk is on fire")


def chain(out, names="abc", seconds=0.0):
    """Units of which each needs all before it."""
    return [
        Unit(
            name, f"making {name}", partial(write, out / name, [out / n for n in names[:i]], seconds), tuple(names[:i])
        )
        for i, name in enumerate(names)
    ]


def many(out, count, seconds):
    return [Unit(f"u/{i}", f"unit {i}", partial(write, out / f"u/{i}", (), seconds)) for i in range(count)]


def mend(switch, result):
    fail(switch)
    result.write_text("mended")


def broken(out):
    """A unit that fails, one that needs it, and one that does not."""
    return [
        Unit("bad", "burning", partial(mend, out / "switch", out / "bad")),
        Unit("after", "needs the bad one", partial(write, out / "after", [out / "bad"]), ("bad",)),
        Unit("other", "on its own", partial(write, out / "other")),
    ]


def empty(out):
    return [Unit("nothing", "leaving nothing", partial(print, "no result"))]


def loud(out):
    return [Unit("said", "speaking", partial(_speak, out / "said"))]


def _speak(path):
    print("to the log")
    os.write(2, b"from below python\n")
    path.write_text("done")
