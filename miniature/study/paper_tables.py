"""Tables of the paper's page: means over seeds beside the paper's numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from ...callbacks.plots import markdown_table
from ...commands.comparison import COLUMNS
from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.published import TABLE_3, TABLE_4, TABLE_5, TABLE_6, TABLE_7_OF_V1
from .paper_claims import (
    CLAIMED,
    GUIDES,
    KINDS,
    ORACLE,
    OTHER,
    POOLS,
    RM,
    SAME,
    SHARES,
    Value,
    accuracy,
    of_share,
    wins,
)
from .paper_findings import Seeds, over_seeds
from .paper_verdicts import UNDECIDED
from .rater_tables import rater_table

NAMES = {
    "control": "SFT, unselected samples (control)",
    "sft": "SFT",
    "rwr": "Flow-RWR",
    "dpo-time": "Flow-DPO, beta (1 - t)^2",
    "dpo": "Flow-DPO, constant beta",
    "sft-full": "SFT, full training",
    "dpo-full": "Flow-DPO, constant beta, full training",
}
"""Arms of the comparisons, by their short names."""
NOISES = {SAME: "same noise", OTHER: "other noise"}
MODELS = {"reg": "regression, shared", "bt": "BT, shared", "btt": "BTT, shared", "separate": "BTT, separate"}
"""Reward models of cell (a), by their short names."""


def cell_tables(found: Seeds, studied: Seeds) -> dict[str, str]:
    """The main table of each cell that has results and a table, in Markdown, by the cell's letter.

    Args:
        found: Findings by seed.
        studied: Findings by tuning seed, of cells that study something there.
    """
    main = {name: words for name, words in NAMES.items() if not name.endswith("-full")}
    full = {name: NAMES[name] for name in ("sft", "sft-full", "dpo", "dpo-full")}
    tables = {
        "a": ("reward models", lambda: _models(found)),
        "b": ("reward models", lambda: _shares(found)),
        "c": ("prompts", lambda: _prompts(found)),
        "d": ("aligned", lambda: _arms(found, "aligned", main, {n: _rounded(*row) for n, row in TABLE_3.items()})),
        "e": ("ta", lambda: _arms(found, "ta", main, {name: f"TA {_rounded(row)}" for name, row in TABLE_4.items()})),
        "g": ("nrg", lambda: _guided(found)),
        "h": ("aligned", lambda: _arms(found, "aligned", full, {})),
        "i": ("conditions", lambda: f"{_counts(found)}\n\n{_arms(found, 'conditions', pools(), {})}"),
        "j": ("judges", lambda: _judges(found)),
        "l": ("reward models", lambda: rater_table(found)),
    }
    every = (*found.values(), *studied.values())
    return {letter: table() for letter, (key, table) in tables.items() if any(one.get(key) for one in every)}


def claim_table(rows: Sequence[dict[str, Any]]) -> str:
    """Claims with their differences; a finding's verdict at its primary row, the other rows in brackets.

    Args:
        rows: Some of the rows of :func:`.paper_verdicts.verdicts`.
    """
    body = []
    for row in rows:
        half = f" ± {row['half']:.3f}" if math.isfinite(row["half"]) else ""
        verdict = row["verdict"]
        if not row["primary"]:
            verdict = f"(not counted; alone: {row['alone']})"
        elif not verdict.startswith(UNDECIDED):
            verdict = f"**{verdict}**"
        body.append([row["claim"], row["paper"] or "(not asked)", f"{row['mean']:+.3f}{half}", verdict])
    return markdown_table(["claim", "the paper", "here: difference", "verdict"], body)


def pools() -> dict[str, str]:
    """Arms of cell (i), with the condition and the algorithm of each."""
    return {
        f"{pool}-{name}": f"{NAMES[name]}: {text}"
        for pool, text in POOLS.items()
        for name in ("control", "sft", "rwr", "dpo")
    }


def mean_text(found: Seeds, of: Value) -> str:
    """A number's mean over seeds with its interval; ``-`` where no seed has it."""
    interval = over_seeds(found, of)
    return str(interval) if interval else "-"


def _rounded(*numbers: float, digits: int = 0) -> str:
    """The paper's numbers beside each other. Halves are rounded up: 53.55 is 53.6, which Python's formats make 53.5."""
    step = Decimal(1).scaleb(-digits)
    return " / ".join(str(Decimal(str(number)).quantize(step, ROUND_HALF_UP)) for number in numbers)


def _models(found: Seeds) -> str:
    places = {**{column: ("recent", column) for column in COLUMNS}, "GenAI-Bench": ("older", OVERALL)}
    rows = []
    for name, words in MODELS.items():
        here = (" / ".join(mean_text(found, accuracy(name, *p, kind)) for kind in KINDS) for p in places.values())
        paper = (_rounded(*TABLE_6[name][place], digits=1) for place in places)
        rows += [[words, *here], ["the paper, %", *paper]]
    return markdown_table(["without / with ties", *COLUMNS, f"{OVERALL}, older"], rows)


def _shares(found: Seeds) -> str:
    rows = [
        [f"{share:.0%}", *(mean_text(found, of_share(loss, share)) for loss in ("bt", "reg"))]
        for share in (*SHARES, 1.0)
    ]
    return markdown_table(["pairs", "BT", "regression"], rows)


def _prompts(found: Seeds) -> str:
    rows = [
        [tokens, *(mean_text(found, lambda f, t=tokens, d=d: f["prompts"][t][d]) for d in DIMENSIONS)]
        for tokens in ("separate", "shared")
    ]
    return markdown_table(["mean shift of a reward under another prompt, deviations", *DIMENSIONS], rows)


def _arms(found: Seeds, cell: str, arms: Mapping[str, str], paper: Mapping[str, str]) -> str:
    """Wins of arms in every dimension by both judges at both noises, and the oracle's means."""
    places = [(judge, noise) for noise in (SAME, OTHER) for judge in (RM, ORACLE)]

    def three(of: Callable[[str], Value]) -> str:
        means = [over_seeds(found, of(d)) for d in DIMENSIONS]
        return " / ".join(f"{i.mean:.2f}" if i else "-" for i in means)

    def won(arm: str, judge: str, noise: str) -> str:
        overall = mean_text(found, wins(cell, arm, judge, noise=noise))
        return f"{three(lambda d: wins(cell, arm, judge, d, noise))}; {overall}"

    def mean(arm: str) -> Callable[[str], Value]:
        return lambda d: lambda f: f[cell]["arms"][arm]["means"][ORACLE][d]

    rows = [["base", *[""] * (len(places) + 1), three(mean("base"))]]
    for arm, words in arms.items():
        if over_seeds(found, wins(cell, arm, ORACLE)):
            rows.append([words, *(won(arm, *place) for place in places), paper.get(arm, ""), three(mean(arm))])
    judged = (f"{judge}, {NOISES[noise]}" for judge, noise in places)
    return markdown_table(["VQ / MQ / TA; overall", *judged, "the paper, %", "oracle's means"], rows)


def _guided(found: Seeds) -> str:
    chosen = next((f["tuned"]["nrg"]["strength"] for f in found.values() if "tuned" in f), None)
    published = _published_guidance()
    parts = []
    for strength in sorted({*CLAIMED, *([chosen] if chosen else [])}):
        arms, paper = {}, {}
        for name, (reward, weights) in GUIDES.items():
            steers = ", ".join(f"{d} {w:.2g}" for d, w in weights.items())
            arms[f"{name}@{strength:g}"] = f"{name} ({steers}; {reward.split('_')[0]} reward)"
            # the paper's strength of 100 is in units of its own
            paper[f"{name}@{strength:g}"] = published.get(name, "")
        title = f"Strength {strength:g}{', which tuning chose' * (strength == chosen)}"
        parts.append(f"{title}:\n\n{_arms(found, 'nrg', arms, paper)}")
    return "\n\n".join(parts)


def _published_guidance() -> dict[str, str]:
    """The paper's wins, by the name of the sweep."""
    alone = {"mq": TABLE_7_OF_V1["noisy"], "clean-mq": TABLE_7_OF_V1["clean"]}
    for name, (reward, weights) in GUIDES.items():
        row = TABLE_5.get(tuple(weights.get(d, 0.0) for d in DIMENSIONS))
        if row and reward == "noisy_reward":
            alone[name] = row
    return {name: _rounded(*row) for name, row in alone.items()}


def _judges(found: Seeds) -> str:
    words = {"reward_rendered": "trained on rendered pairs", "reward": "and on rated pairs of generated clips"}
    rows = [
        [text, *(mean_text(found, lambda f, n=n, d=d: f["judges"][n]["generated"][d][KINDS[0]]) for d in DIMENSIONS)]
        for n, text in words.items()
    ]
    return markdown_table(["accuracy on generated clips of unseen prompts, without ties", *DIMENSIONS], rows)


def _counts(found: Seeds) -> str:
    """How many pairs each condition had to train on."""
    names = {"preferred": "own samples, as in (d)", **POOLS}
    counts = {words: over_seeds(found, lambda f, n=name: f["pairs"][n]) for name, words in names.items()}
    return "Pairs: " + "; ".join(f"{words} {interval.mean:.0f}" for words, interval in counts.items() if interval) + "."
