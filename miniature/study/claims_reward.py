"""Claims about reward models: cells (a), (b), (c) and (j)."""

from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.published import TABLE_6
from .paper_claims import KINDS, SHARES, Claim, Value, accuracy, less, mean, of_share, side_by_side

_WHOLE = "the whole recipe (BTT, separate tokens) orders better than regression, overall"
_APART = "separate tokens order better than a shared one"
COMPARED = (
    ("BT orders better than regression, overall", "bt", "reg", "recent", OVERALL, 0),
    ("BTT is more accurate than BT with ties, VQ", "btt", "bt", "recent", "VQ", 1),
    ("BTT is more accurate than BT with ties, MQ", "btt", "bt", "recent", "MQ", 1),
    ("BTT is more accurate than BT with ties, TA", "btt", "bt", "recent", "TA", 1),
    (f"{_APART}, MQ", "separate", "btt", "recent", "MQ", 0),
    (f"{_APART}, MQ", "separate", "btt", "recent", "MQ", 1),
    (f"{_APART}, TA", "separate", "btt", "recent", "TA", 0),
    (f"{_APART}, overall, older sources (GenAI-Bench)", "separate", "btt", "older", OVERALL, 0),
    (_WHOLE, "separate", "reg", "recent", OVERALL, 0),
    (_WHOLE, "separate", "reg", "recent", OVERALL, 1),
)
"""Statements of Table 6: both reward models, benchmark and column, and 0 for accuracy without ties, 1 with them."""


def claims() -> list[Claim]:
    """All claims of this file."""
    return [*_losses(), *_shares(), *_prompts(), *_judges()]


def _losses() -> list[Claim]:
    rows, known = [], set()
    for statement, first, second, benchmark, column, kind in COMPARED:
        place = "GenAI-Bench" if benchmark == "older" else column
        paper = side_by_side(*(TABLE_6[name][place][kind] for name in (first, second)))
        here = (accuracy(name, benchmark, column, KINDS[kind]) for name in (first, second))
        kind_text = KINDS[kind].replace("_", " ")
        text = statement if "ties" in statement else f"{statement}, {kind_text}"
        primary = statement not in known
        rows.append(Claim("a", text, paper, less(*here), "Table 6", statement, primary, point=kind_text))
        known.add(statement)
    return rows


def _shares() -> list[Claim]:
    """One statement about a curve; its end, all of the pairs, is Table 6's and decided there."""
    paper, statement = "above throughout (points not readable)", "BT orders better than regression with fewer pairs"

    def of(share: float) -> Value:
        return less(of_share("bt", share), of_share("reg", share))

    over = f"{statement}, mean over {', '.join(f'{s:.0%}' for s in SHARES)}"
    points = [
        Claim(
            "b",
            f"BT above regression with {s:.0%} of the pairs",
            paper,
            of(s),
            "Figure 2",
            statement,
            False,
            point=f"{s:.0%}",
        )
        for s in (*SHARES, 1.0)
    ]
    return [Claim("b", over, paper, mean([of(s) for s in SHARES]), "Figure 2", statement), *points]


def _prompts() -> list[Claim]:
    def moved(tokens: str, dimension: str) -> Value:
        return lambda found: found["prompts"][tokens][dimension]

    rows = []
    for d in ("VQ", "MQ"):
        text = f"separate tokens keep {d} blind to the prompt; a shared one does not (mean shift, deviations)"
        shift = less(moved("shared", d), moved("separate", d))
        rows.append(Claim("c", text, "by construction; no number", shift, "Section 3.2", rate=False))
    return rows


def _judges() -> list[Claim]:
    """What the paper takes for granted: that a judge of other generators' videos can judge one's own."""

    def of(model: str, dimension: str) -> Value:
        return lambda found: found["judges"][model]["generated"][dimension]["without_ties"]

    better = "a reward model of rendered clips ranks generated ones better than chance"
    taught = "rated pairs of generated clips make it a better judge of them"
    family = "our own: judges"
    return [
        *(Claim("j", f"{better}, {d}", "", less(of("reward_rendered", d), 0.5), family) for d in DIMENSIONS),
        *(
            Claim("j", f"{taught}, {d}", "", less(of("reward", d), of("reward_rendered", d)), family)
            for d in DIMENSIONS
        ),
    ]
