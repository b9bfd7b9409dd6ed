"""What a study does around its units: settings that are known, processes, and a page of what is finished."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...models.files import write_json


def whole_study(
    out: Path,
    known: Mapping[str, Any],
    settings: Mapping[str, str],
    processes: int | None,
    do: Callable[[int, int], None],
    show: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Do a study's units, and write its page.

    Args:
        out: Folder of all results.
        known: Earlier numbers, which may hold settings that were chosen in another folder: all seeds share them.
        settings: Keys of these settings in ``known``, and their files under ``out``.
        processes: Number of processes that work at once on this machine; one per core if not given.
        do: Does all units, given the number of processes and the number of threads of each.
        show: Writes the page, and returns its numbers.

    Raises:
        VideoAlignError: Where units failed; the page shows what there is all the same.
    """
    for key, name in settings.items():
        if known.get(key) and not (out / name).exists():
            write_json(out / name, known[key])
    cores = os.cpu_count() or 1
    processes = processes or cores
    try:
        do(processes, max(1, cores // processes))
    except VideoAlignError:
        with contextlib.suppress(VideoAlignError):
            show()
        raise
    return show()
