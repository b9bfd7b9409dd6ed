"""Claims about generators after training: cells (d), (e), (f), (h) and (i)."""

import itertools
from collections.abc import Callable

from ...models.dimensions import DIMENSIONS
from ...models.published import TABLE_3, TABLE_4
from .paper_claims import (
    ALGORITHMS,
    BETAS,
    COUNTED,
    ORACLE,
    POOLS,
    Claim,
    Value,
    by_judges,
    less,
    mean,
    side_by_side,
    wins,
)

ORDER = (("dpo", "sft"), ("dpo", "rwr"), ("dpo", "dpo-time"), ("dpo-time", "sft"), ("sft", "rwr"))
"""Pairs of algorithms of which the first is better in Table 3, by the mean of its three columns."""
ORDERED = "Table 3, order"
"""Family of what is better in Table 3."""


def claims() -> list[Claim]:
    """All claims of this file."""
    return [*_aligned(), *_schedules(), *_alone(), *_betas(), *_full_training(), *_conditions()]


def _mean_of(name: str) -> Callable[[str], Value]:
    """Mean wins of an arm over the dimensions, by judge."""
    return lambda judge: mean([wins("aligned", name, judge, d) for d in DIMENSIONS])


def _against_half(cell: str, name: str, dimension: str, above: bool) -> Callable[[str], Value]:
    """How far an arm's wins in a dimension are above one half, or below it, by judge."""

    def of(judge: str) -> Value:
        share = wins(cell, name, judge, dimension)
        return less(share, 0.5) if above else less(0.5, share)

    return of


def _between(cell: str, first: str, second: str, dimension: str) -> Callable[[str], Value]:
    """Lead of one arm over another in a dimension, by judge."""
    return lambda judge: less(*(wins(cell, name, judge, dimension) for name in (first, second)))


def _aligned() -> list[Claim]:
    rows, family = [], "Table 3, against the base"
    for (name, row), (place, d) in itertools.product(TABLE_3.items(), enumerate(DIMENSIONS)):
        above = row[place] > 50
        statement = f"{ALGORITHMS[name]} {'raises' if above else 'costs'} {d}"
        of = _against_half("aligned", name, d, above)
        rows += by_judges("d", statement, f"{row[place]:.1f} / 50", of, family, d)
    for first, second in ORDER:
        paper = side_by_side(*(sum(TABLE_3[name]) / 3 for name in (first, second)), digits=1)
        statement = f"{ALGORITHMS[first]} above {ALGORITHMS[second]}, mean of VQ, MQ and TA"
        rows += by_judges("d", statement, paper, _lead(first, second), ORDERED)
    text = f"{ALGORITHMS['sft']} on preferred samples above {ALGORITHMS['control']}, mean of VQ, MQ and TA"
    return [*rows, *by_judges("d", text, "", _lead("sft", "control"), "our own: selection")]


def _lead(first: str, second: str) -> Callable[[str], Value]:
    """Lead of one arm over another in the mean over the dimensions, by judge."""
    return lambda judge: less(_mean_of(first)(judge), _mean_of(second)(judge))


def _schedules() -> list[Claim]:
    """The two schedules of beta against each other."""
    rows = []
    for text, first, second, d in (
        ("beta (1 - t)^2 costs text alignment against constant beta", "dpo", "dpo-time", "TA"),
        ("beta (1 - t)^2 gives more motion quality than constant beta", "dpo-time", "dpo", "MQ"),
    ):
        paper = side_by_side(*(TABLE_3[n][DIMENSIONS.index(d)] for n in ("dpo-time", "dpo")), digits=1)
        rows += by_judges("d", f"{text}, {d}", paper, _between("aligned", first, second, d), ORDERED, d)
    return rows


def _alone() -> list[Claim]:
    rows = []
    for name, row in TABLE_4.items():
        statement = f"TA alone: {ALGORITHMS[name]} {'raises' if row > 50 else 'does not raise'} TA"
        of = _against_half("ta", name, "TA", row > 50)
        rows += by_judges("e", statement, f"{row:g} / 50", of, "Table 4, against the base", "TA")
    for name in ("sft", "rwr", "dpo-time"):
        statement, paper = f"TA alone: Flow-DPO above {ALGORITHMS[name]}, TA", f"{TABLE_4['dpo']:g} / {TABLE_4[name]:g}"
        rows += by_judges("e", statement, paper, _between("ta", "dpo", name, "TA"), "Table 4, order", "TA")
    return rows


def _betas() -> list[Claim]:
    """One statement about two curves."""
    statement = "constant beta above beta (1 - t)^2 at every beta, TA"
    paper, rows = "above at every beta (points not readable)", []
    for judge, (_, by) in COUNTED.items():
        at = {b: _between("beta", f"constant-{b:g}", f"time-{b:g}", "TA")(judge) for b in BETAS}
        over, primary = mean(list(at.values())), judge == ORACLE
        text = f"constant beta above beta (1 - t)^2, TA, mean over all beta, {by}"
        rows.append(Claim("f", text, paper, over, "Figure 6", statement, primary, "TA"))
        for beta, of in at.items():
            text = f"constant beta above beta (1 - t)^2 at beta {beta:g}, TA, {by}"
            point = f"beta {beta:g}" if primary else ""
            rows.append(Claim("f", text, paper, of, "Figure 6", statement, False, "TA", point))
    return rows


def _full_training() -> list[Claim]:
    rows, paper = [], "full training degrades or collapses; no number"
    for name in ("dpo", "sft"):

        def of(judge: str, name: str = name) -> Value:
            return less(wins("aligned", name, judge), wins("aligned", f"{name}-full", judge))

        statement = f"{ALGORITHMS[name]}: adapters above full training, overall"
        rows += by_judges("h", statement, paper, of, "Section 5.2")
    return rows


def _conditions() -> list[Claim]:
    rows, by, family = [], COUNTED[ORACLE][1], "our own: conditions"
    for (pool, text), other in itertools.product(POOLS.items(), ("sft", "rwr")):
        dpo, rival = (wins("conditions", f"{pool}-{name}", ORACLE) for name in ("dpo", other))
        statement = f"Flow-DPO above {ALGORITHMS[other]}: {text}"
        rows.append(Claim("i", f"{statement}, {by}", "", less(dpo, rival), family, statement))
    distilled = "SFT on unselected samples drawn with guidance already beats the base (guidance distillation)"
    won = less(wins("conditions", "guided-control", ORACLE), 0.5)
    return [*rows, Claim("i", f"{distilled}, {by}", "", won, family, distilled)]
