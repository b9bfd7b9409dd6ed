"""The data card of an export: counts, agreement, labels and the protocol, as JSON and as a page for people."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..datamodules.ratings import COLUMNS, share_table
from .overview import overview
from .rated_pairs import RatedPair
from .rounds import Round
from .shown import Shown

WHAT = {"pairs": "pairs", "single": "videos", "ranking": "rankings"}
LABELLED = {
    "pairs": "Where all votes on a pair agree they are the label; elsewhere a reviewer's vote is.",
    "ranking": "Rankings are read as the pairs in them: a label is what more than half of the votes say of a pair, and "
    "a reviewer's where there is no such majority.",
    "single": "Each video was scored from 1 to 5 by itself; `scores.csv` has the means over the raters.",
}
"""How labels come of votes, by kind of round."""


def card_of(
    round_: Round,
    shown: Shown,
    pairs: Sequence[RatedPair],
    exported: Mapping[str, int],
    called: Mapping[str, str],
    margin: float | None,
) -> dict[str, Any]:
    """The content of the data card.

    Args:
        round_: The round.
        shown: What people saw.
        pairs: The exported pairs.
        exported: Number of pairs or videos in each exported set.
        called: What each person is called in the card, by name.
        margin: Difference of mean scores up to which a pair is a tie; None where pairs do not come of scores.
    """
    found = overview(round_)
    for of_the_moment in ("queue", "seconds_left"):
        del found[of_the_moment]
    same = [row for row in round_.pairs if len({*row.sources}) < len(row.keys)]
    return {
        **found,
        "people": [{**person, "name": called[person["name"]]} for person in found["people"]],
        "exported": dict(exported),
        "labels": {c: dict(Counter(p.labels[c] for p in pairs if c in p.labels)) for c in round_.protocol.columns},
        "same_source": len(same),
        "masks": [{"source": mask.source, "box": list(mask.box)} for mask in shown.masks],
        "images": len({*shown.images.values()}),
        **({"margin": margin} if margin is not None else {}),
    }


def card_text(card: dict[str, Any], pairs: Sequence[RatedPair]) -> str:
    """The data card for people, in Markdown.

    Args:
        card: What :func:`card_of` returned.
        pairs: The exported pairs.
    """
    kind = card["protocol"]["kind"]
    exported = ", ".join(f"{count} {split}" for split, count in card["exported"].items())
    states = ", ".join(f"{count} {state}" for state, count in card["states"].items())
    people = sum(person["votes"] > 0 for person in card["people"])
    what = WHAT[kind] if kind == "single" and not pairs else "pairs"
    parts = [
        f"# Data card\n\nExported {what}: {exported}. Of {card['pairs']} {WHAT[kind]}: {states}. "
        f"{card['votes']} votes of {people} people.\nNo prompt is in two splits. {_sources(card)}".rstrip(),
        "Tables that are made for spreadsheets hold an apostrophe before what those would take for a formula, "
        "`decided.csv`\nalways and the others where the export was asked to. All other files are for programs.",
        f"Protocol: {json.dumps(card['protocol'])}.\n{LABELLED[kind]}",
        _fast(card),
        _masks(card),
        f"{card['images']} images were shown beside the prompts; they are in `images`." if card["images"] else "",
        _agreement(card["agreement"]),
    ]
    if pairs:
        table = share_table([{c: pair.labels.get(c, "") for c in COLUMNS} for pair in pairs])
        tie = f" (a difference of mean scores up to {card['margin']} is a tie)" if "margin" in card else ""
        parts.append(f"Labels{tie}:\n\n```\n{table}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _sources(card: dict[str, Any]) -> str:
    if card["protocol"]["kind"] == "single":
        return ""
    is_pair = card["protocol"]["kind"] == "pairs"
    if alike := card["same_source"]:
        which = f"The two videos of {alike} pairs" if is_pair else f"Some videos of {alike} rankings"
        return (
            f"{which} are from one source, or their sources are unknown; win rates of sources leave "
            f"{'these' if is_pair else 'pairs of one source'} out."
        )
    return f"The {'two videos of a pair' if is_pair else 'videos of a ranking'} are from different sources."


def _fast(card: dict[str, Any]) -> str:
    shares = [(person["name"], person["fast"]) for person in card["people"] if person["fast"]]
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    return f"Votes that came before one full play of all videos, among those measured: {told}." if told else ""


def _masks(card: dict[str, Any]) -> str:
    """A sentence on masks, and their table."""
    if not card["masks"]:
        return ""
    rows = "\n".join(
        f"| {mask['source']} | {', '.join(map(json.dumps, mask['box']))} | "
        f"{'shares of the picture' if max(mask['box']) <= 1 else 'pixels'} |"
        for mask in card["masks"]
    )
    return (
        "Grey boxes hide watermarks that would name a source. They are burned into the videos, as people saw them\n"
        "(`*` stands for all sources; also in `masks.csv` of each set):\n\n"
        f"| source | x, y, w, h | unit |\n|---|---|---|\n{rows}"
    )


def _agreement(agreement: Mapping[str, Mapping[str, float]]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None or value != value else f"{value:.3f}"

    names = {
        "alpha": "Krippendorff's alpha (ordinal)",
        "interval": "alpha (interval)",
        "tau": "Kendall's tau",
        "raw": "raw agreement",
        "ties": "ties among votes",
    }
    shown = [name for name in names if any(name in row for row in agreement.values())]
    head = f"| | {' | '.join(names[name] for name in shown)} | votes |\n|{'---|' * (len(shown) + 2)}\n"
    return head + "\n".join(
        f"| {column} | {' | '.join(number(row[name]) for name in shown)} | {row['votes']} |"
        for column, row in agreement.items()
    )
