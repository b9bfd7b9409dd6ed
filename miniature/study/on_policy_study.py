"""`videoalign study on-policy`: training on own samples, along a reward's gradient, and search, at equal evaluations.

It works in the folder of `videoalign paper`: of each seed it needs the loop's world, generator, reward models and
labelled samples, which are not made again where they exist, and adds a judge that nothing is trained against.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...models.files import read_json
from .loop_size import STUDY, LoopSize, begin
from .policy_findings import earlier
from .policy_page import write_page
from .policy_size import PolicySize
from .policy_tuning import TRIED, TUNED, choosing
from .policy_units import PLACE, Policies
from .tuning_rounds import TUNING_SEEDS, reported, tuning_place
from .units import Unit, leading_to
from .whole_study import whole_study
from .workers import work


def units(out: Path, size: LoopSize, policies: PolicySize, seeds: Iterable[int]) -> list[Unit]:
    """All units that can be planned by now: while settings are not chosen, none that needs them.

    Args:
        out: Folder of all results.
        size: How much the loop trains and samples.
        policies: Budget and sizes of the study.
        seeds: The seeds.
    """
    tuned = read_json(out / TUNED, "settings") if (out / TUNED).exists() else None
    found, wanted = [], []
    for seed in TUNING_SEEDS:
        one = Policies(out, size, seed, tuning_place(seed), policies)
        own = one.tuning()
        found += [*one.base(), *own]
        wanted += own
    wanted.append(choosing(out, policies))
    found.append(wanted[-1])
    for seed in seeds:
        one = Policies(out, size, seed, f"seed{seed}", policies)
        base = one.base()
        own = [*one.held_out(), *(one.algorithms(tuned) if tuned else [])]
        found += [*base, *own]
        wanted += own
        if not tuned:  # what the algorithms will need is made beside the trials
            ready = {one.place + name for name in ("latents/preferred", "noisy_reward")}
            wanted += [unit for unit in base if unit.name in ready]
    return leading_to(found, [unit.name for unit in wanted])


def on_policy(
    out: str | Path,
    seeds: int = 5,
    first: int = 0,
    processes: int | None = None,
    size: LoopSize | None = None,
    policies: PolicySize | None = None,
) -> dict[str, Any]:
    """Do the study; write ``OUT/ON_POLICY.md``, its figures and the numbers behind them.

    Args:
        out: Folder of all results, which may be that of `videoalign paper`; several machines that see it may be called
            at once, and each takes what is left.
        seeds: Number of seeds; a later call with more adds the missing ones.
        first: The first seed.
        processes: Number of processes that work at once on this machine; one per core if not given.
        size: How much the loop trains and samples; :data:`.loop_size.STUDY` if not given.
        policies: Budget and sizes of the study.

    Returns:
        The numbers that are saved as ``OUT/docs/results/on_policy/results.json``.

    Raises:
        VideoAlignError: Where units failed; the page shows what there is all the same.
    """
    out, size, policies = Path(out).resolve(), size or STUDY, policies or PolicySize()
    chosen = reported(seeds, first)
    begin(out, asdict(size))
    begin(out / PLACE, asdict(policies))

    def do(processes: int, threads: int) -> None:
        if not (out / TUNED).exists():
            print("tuning, beside everything that needs no chosen setting", flush=True)
            work(out, units(out, size, policies, chosen), processes, threads)
        work(out, units(out, size, policies, chosen), processes, threads)

    known, settings = earlier(out, size, policies), {"trials": TRIED, "tuned": TUNED}
    return whole_study(out, known, settings, processes, do, lambda: write_page(out, chosen, size, policies))
