"""The page of `videoalign study on-policy`: ON_POLICY.md with its figures, and the numbers behind them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...callbacks.plots import save_png
from ...models.files import write_json, write_text
from .loop_size import LoopSize
from .pages import render
from .policy_figures import figures
from .policy_findings import FALL, FIGURES, NAMES, earlier, findings, results_of
from .policy_reading import reading
from .policy_size import JUDGED_PROMPTS, SHARES, PolicySize
from .policy_tables import (
    AGAINST,
    against_table,
    cost_table,
    curve_table,
    difference_table,
    gain_table,
    hack_table,
    judge_line,
    pick_table,
)
from .tuning_rounds import TUNING_SEEDS, ends
from .tuning_tables import tuning_tables

PAGE = "ON_POLICY.md"


def write_page(out: Path, seeds: Iterable[int], size: LoopSize, policies: PolicySize) -> dict[str, Any]:
    """Write ``OUT/ON_POLICY.md``, its figures and ``results.json`` from the comparisons that are finished.

    Args:
        out: Folder of all results.
        seeds: Seeds whose folders are read; other seeds that ``results.json`` holds stay on the page.
        size: How much the loop trains and samples.
        policies: Budget and sizes of the study.

    Returns:
        What is saved as ``results.json``.

    Raises:
        VideoAlignError: Where no comparison at the whole budget is finished, which the others are measured by.
    """
    known = {int(seed): found for seed, found in earlier(out, size, policies).get("seeds", {}).items()}
    read = {seed: known.get(seed, {}) | findings(out, seed) for seed in seeds}
    found = {seed: one for seed, one in {**known, **read}.items() if "full" in one.get("compared", {})}
    if not found:
        raise VideoAlignError(f"{out} holds no finished comparison at the whole budget yet")
    results = results_of(out, found, size, policies)
    write_json(out / FIGURES / "results.json", results)
    for name, figure in figures(results["seeds"]).items():
        save_png(figure, out / FIGURES / f"{name}.png")
    lines = reading(results["seeds"])
    write_text(out / PAGE, _page(results, lines, size, policies))
    print("", *(line.replace("**", "") for line in lines), sep="\n")
    print(f"page      {out / PAGE}\nnumbers   {out / FIGURES / 'results.json'}")
    return results


def _page(results: dict[str, Any], lines: list[str], size: LoopSize, policies: PolicySize) -> str:
    found, tuned, tried = results["seeds"], results.get("tuned", {}), results.get("trials")
    return render(
        "on_policy.md.j2",
        seeds=len(found),
        folder=FIGURES,
        reading=lines,
        algorithms=len(NAMES),
        videos=JUDGED_PROMPTS * policies.noises,
        prompts=JUDGED_PROMPTS,
        noises=policies.noises,
        judges=judge_line(found),
        full=gain_table(found, "full"),
        against=NAMES.get(AGAINST, AGAINST),
        differences=against_table(found),
        decided=difference_table(found),
        curves=curve_table(found),
        shares={share: gain_table(found, share) for share in SHARES if share != "full"},
        hacks=hack_table(found),
        fall=f"{FALL:g}",
        picks=pick_table(found),
        budget=f"{policies.budget:,}",
        each=f"{policies.of_video():g}",
        plain=f"{policies.of_video(0.0):g}",
        costs=cost_table(found, policies, size.fresh, tuned),
        trials=_trials(tried),
        tuning_seeds=", ".join(map(str, TUNING_SEEDS)),
        ends=_at_ends(tuned, tried),
        tuning=tuning_tables(tuned, tried) if tried else "The trials themselves are not in this folder.",
    )


def _trials(tried: dict[str, Any] | None) -> str:
    counts = {len(every) for every in (tried or {"trials": {}})["trials"].values()}
    return " or ".join(map(str, sorted(counts))) or "as many"


def _at_ends(tuned: dict[str, Any], tried: dict[str, Any] | None) -> str:
    """Algorithms whose choice lies at an end of what was tried."""
    every = (tried or {"trials": {}})["trials"]
    return ", ".join(
        NAMES[n] for n, chosen in tuned.items() if n in every and ends([t["values"] for t in every[n]], chosen)
    )
