"""How many seeds and judged videos decide a difference of two rates: the page's tables and advice."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...callbacks.plots import markdown_table
from ...models.evidence import MOST_RUNS, Spread, best_videos, power, runs_needed
from .paper_findings import COMPARISONS
from .paper_verdicts import DIFFERENCE, LEVEL, UNDECIDED, Row, decided
from .units import WORK

VIDEOS, SEEDS = (64, 128, 256, 512), (5, 10, 20)
"""Numbers of judged videos and of seeds in the table of designs."""
CHANCE = 0.8
"""Probability with which a difference is to be decided."""


def undecided_table(rows: Sequence[Row]) -> str:
    """Undecided findings with the seeds that would decide a difference; empty where there are none.

    Args:
        rows: What :func:`.paper_verdicts.verdicts` returns.
    """
    body = []
    for row in _open(rows):
        noise = f"{row['power']['within'] / row['power']['videos'] / row['power']['deviation'] ** 2:.0%}"
        body.append(
            [
                row["statement"],
                f"{row['power']['deviation']:.3f}",
                noise if row["power"]["split"] and row["power"]["deviation"] else "-",
                _count(row["power"]["seeds"]),
                _count(row["power"]["seeds in family"]),
            ]
        )
    head = ["undecided finding", "deviation over seeds", "of its variance, noise of the judged videos"]
    return markdown_table([*head, "seeds needed", "and after the correction"], body) if body else ""


def needed_lines(rows: Sequence[Row]) -> list[str]:
    """What the terminal says of undecided findings: a line for each that needs more seeds.

    Args:
        rows: What :func:`.paper_verdicts.verdicts` returns.
    """
    more = [row for row in _open(rows) if row["power"]["seeds in family"] > len(row["values"])]
    lines = [
        f"  {_count(row['power']['seeds']):>5} (after the correction {_count(row['power']['seeds in family']):>5})  "
        f"{row['statement']}"
        for row in more
    ]
    if small := len(_open(rows)) - len(more):
        lines.append(f"  {small} more would have been decided, were their difference {DIFFERENCE:g} or more")
    return lines and ["seeds that decide a difference of .05 (80 %), of undecided findings:", *lines]


def _open(rows: Sequence[Row]) -> list[Row]:
    """Undecided findings about rates, those that need the fewest seeds first."""
    found = [r for r in decided(rows).values() if r["verdict"].startswith(UNDECIDED) and "power" in r]
    return sorted(found, key=lambda row: row["power"]["seeds"])


def _count(seeds: int) -> str:
    return f"{seeds}" if seeds < MOST_RUNS else f"{MOST_RUNS}+"


def _spreads(rows: Sequence[Row], split: bool) -> list[Spread]:
    """Variances of the findings about rates; with ``split`` those whose two parts are known."""
    powers = (row["power"] for row in decided(rows).values() if "power" in row)
    return [Spread(p["between"], p["within"], p["videos"]) for p in powers if p["split"] or not split]


def design_table(rows: Sequence[Row]) -> str:
    """Share of the findings about win rates in which a design decides a difference; empty before anything is known.

    Args:
        rows: What :func:`.paper_verdicts.verdicts` returns.
    """
    spreads = _spreads(rows, split=True)
    if not spreads:
        return ""
    body = []
    for videos in VIDEOS:
        deviations = [spread.deviation(videos) for spread in spreads]
        shares = (statistics.mean(power(DIFFERENCE, d, seeds) >= CHANCE for d in deviations) for seeds in SEEDS)
        typical = statistics.median(runs_needed(d, DIFFERENCE, LEVEL, CHANCE) for d in deviations)
        body.append([f"{videos}", *(f"{share:.0%}" for share in shares), f"{typical:g}"])
    return markdown_table(["judged videos a seed", *(f"{n} seeds" for n in SEEDS), "seeds needed, median"], body)


def advice(rows: Sequence[Row], seeds: int) -> str:
    """Whether the seeds are enough, and how many to add.

    Args:
        rows: What :func:`.paper_verdicts.verdicts` returns.
        seeds: Number of seeds that there are.
    """
    spreads = _spreads(rows, split=False)
    if not spreads:
        return "With one seed nothing is known of the variance: make at least 5."
    enough = {n: sum(power(DIFFERENCE, spread.deviation(), n) >= CHANCE for spread in spreads) for n in (seeds, *SEEDS)}
    said = (
        f"{seeds} seeds decide a difference of {DIFFERENCE:g} in {enough[seeds]} of {len(spreads)} findings with "
        f"{CHANCE:.0%} probability"
    )
    more = [n for n in SEEDS if n > seeds and enough[n] > enough[seeds]]
    if not more:
        return f"{said}."
    counts = " and ".join(f"{n} seeds in {enough[n]}" for n in more)
    first = " Ten seeds, then, where five do not do it: `videoalign paper --seeds 10`." if 10 in more else ""
    return f"{said}, {counts}.{first}"


def best_line(rows: Sequence[Row], seconds: tuple[float, float] | None) -> str:
    """How many videos a seed should judge, from the median variances and from measured times; empty if unknown.

    Args:
        rows: What :func:`.paper_verdicts.verdicts` returns.
        seconds: What :func:`costs` returns.
    """
    spreads = _spreads(rows, split=True)
    if not spreads or not seconds:
        return ""
    typical = Spread(*(statistics.median(getattr(one, part) for one in spreads) for part in ("between", "within")))
    best = best_videos(typical, *seconds)
    found = f"about {best:.0f}" if math.isfinite(best) else "as many as there is time for"
    return (
        f"A seed takes {seconds[0] / 60:.0f} core-minutes but for its comparisons, and {seconds[1]:.1f} s for one more "
        f"video in each of their arms; for the same time most is decided with {found} judged videos (two-stage "
        "sampling: the root of the variances' ratio times that of the times; Cochran, 1977)."
    )


def costs(out: Path, seeds: Iterable[int], videos: int) -> tuple[float, float] | None:
    """Seconds on one core of a seed without its comparisons, and of one more judged video in all arms of them.

    Args:
        out: Folder of `videoalign paper`, which may lack the records.
        seeds: Seeds whose records are read.
        videos: Number of judged videos of each arm.

    Returns:
        The means over seeds; None where no seed has records of both.
    """
    compared = tuple(f"cells/{cell}/" for cell in COMPARISONS)
    found = []
    for seed in seeds:
        place, parts = out / WORK / f"seed{seed}", [0.0, 0.0]
        for path in place.rglob("*.json"):
            name = path.relative_to(place).as_posix()
            parts[name.startswith(compared)] += json.loads(path.read_text(encoding="utf-8"))["seconds"]
        if all(parts):
            found.append(parts)
    if not found:
        return None
    return statistics.mean(rest for rest, _ in found), statistics.mean(judged for _, judged in found) / videos
