"""`videoalign demo`: the whole paper in miniature, from rendered clips to aligned and guided generators."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

from ...commands.arms import Arm
from ...datamodules.benchmark import Benchmark
from ...models.files import read_results
from ..world.rendered_sets import ceiling
from .demo_page import write_page
from .demo_table import LEGEND, as_text, summary
from .loop_size import LoopSize, begin
from .pipeline import ALIGNED, BENCHMARKS, MOTION, Loop, shown_sweeps
from .units import Unit, durations
from .workers import work


def units(out: Path, size: LoopSize, seed: int) -> Sequence[Unit]:
    """All stages of the demo.

    Args:
        out: Folder of all results.
        size: Sizes of the sets, models and trainings.
        seed: Seed of everything.
    """
    loop = Loop(out, size, seed)
    arms = {name: Arm(lora=name) for name in (*ALIGNED, MOTION)}
    return [*loop.base(), *loop.alignments(), *loop.comparison("compared", "side by side", arms, shown_sweeps())]


def demo(out: str | Path, seed: int, size: LoopSize | None = None) -> dict[str, Any]:
    """Run all stages; print what they found, and the path of the report.

    Args:
        out: Folder of all results; stages that are finished in it are not repeated.
        seed: Seed of everything.
        size: Sizes of the sets, models and trainings; those of the published demo if not given.

    Returns:
        Accuracies by reward model, benchmark and column, and the numbers of the comparison.
    """
    out, size, started = Path(out).resolve(), size or LoopSize(), time.time()
    begin(out, {"seed": seed, **asdict(size)})
    cores = os.cpu_count() or 1
    processes = min(cores, 4)  # no more stages than that are independent for long
    stages = units(out, size, seed)
    work(out, stages, processes, max(1, cores // processes))
    return _report(out, started, durations(out, stages))


def _report(out: Path, started: float, stages: Sequence[tuple[str, float]]) -> dict[str, Any]:
    found = {
        name: read_results(out / f"bench_{name}/accuracies.json", "a finished demo")
        for name in ("reward_rendered", "reward")
    }
    ceilings = {name: ceiling(Benchmark(out / "world" / name)) for name in BENCHMARKS}
    ceilings["generated"] = ceiling(Benchmark(out / "generated"))
    compared = read_results(out / "compared/comparison.json", "a finished demo")
    page = write_page(out, found, ceilings, compared, stages)
    reward, generator = out / "reward", out / "generator"
    print(
        f"\n{fill(summary(compared), 120)}\n\n{as_text(compared)}\n\n{fill(LEGEND, 120)}\n"
        f"\nreport         {page}   (open it in a browser)"
        f'\nreward model   {reward}   (videoalign score --model {reward} --video V.mp4 --prompt "...")'
        f"\ngenerator      {generator}, adapters {out / 'dpo'}"
        f"\ncurves         tensorboard --logdir {out}   then open http://localhost:6006"
        f"\n{time.time() - started:.0f} seconds"
    )
    return {"accuracies": found, "compared": compared}
