"""Cell (m): statements about the judge on the output of aligned generators, each decided by one number of a seed."""

from ...models.dimensions import DIMENSIONS, OVERALL
from .paper_claims import ORACLE, RM, SAME, Claim, Found, Value, wins

GUIDED = "even"
"""Sweep of guidance whose clips at the chosen strength are judged."""
JUDGED = {
    "sft": "SFT", "rwr": "Flow-RWR", "dpo-time": "Flow-DPO, beta (1 - t)^2", "dpo": "Flow-DPO, constant beta",
    "nrg": "Flow-NRG, all dimensions alike",
}  # fmt: skip
"""Arms that statements are made about: every alignment of adapters, and guidance at the chosen strength."""


def orders(arm: str, column: str | None = None, who: str = "judge") -> Value:
    """Accuracy on pairs of an arm's clips, without ties.

    Args:
        arm: Name of the arm; ``base`` for the generator before alignment.
        column: A dimension, or Overall; the mean over the dimensions if not given.
        who: ``judge``, or ``ceiling`` for the oracle.
    """

    def of(found: Found) -> float:
        row = found["outputs"][arm][who]
        return row[column] if column else sum(row[d] for d in DIMENSIONS) / len(DIMENSIONS)

    return of


def drop(arm: str, column: str | None = None) -> Value:
    """How much less accurate the judge is on an arm's clips than on the base's.

    Args:
        arm: Name of the arm.
        column: A dimension, or Overall; the mean over the dimensions if not given.
    """
    base, own = orders("base", column), orders(arm, column)
    return lambda found: base(found) - own(found)


def further(arm: str, column: str | None = None) -> Value:
    """How much further the judge is below the ceiling on an arm's clips than on the base's.

    Args:
        arm: Name of the arm.
        column: A dimension, or Overall; the mean over the dimensions if not given.
    """
    base, own, fallen = orders("base", column, "ceiling"), orders(arm, column, "ceiling"), drop(arm, column)
    return lambda found: fallen(found) - (base(found) - own(found))


def won(arm: str, judge: str, column: str = OVERALL) -> Value:
    """Share of an arm's clips that a judge prefers to the base's at the same noise.

    Args:
        arm: Name of the arm.
        judge: Name of the judge in the comparison.
        column: A dimension, or Overall.
    """
    if arm != "nrg":
        return wins("aligned", arm, judge, column, SAME)

    def of(found: Found) -> float:
        return wins("nrg", f"{GUIDED}@{found['tuned']['nrg']['strength']:g}", judge, column, SAME)(found)

    return of


def overstated(arm: str, column: str = OVERALL) -> Value:
    """How much the judge's wins at the same noise exceed the oracle's.

    Args:
        arm: Name of the arm.
        column: A dimension, or Overall.
    """
    judge, oracle = won(arm, RM, column), won(arm, ORACLE, column)
    return lambda found: judge(found) - oracle(found)


QUESTIONS = {
    "does the judge fall off": ("the judge orders its clips less well than the base's", drop),
    "does it fall off for want of knowledge": (
        "the judge is further below the ceiling on its clips than on the base's", further
    ),
    "do its wins overstate": ("the judge's wins over the base, same noise, overstate the oracle's", overstated),
}  # fmt: skip
"""What is asked of every arm: a family each. Accuracies are means of VQ, MQ and TA, wins are overall."""


def claims() -> list[Claim]:
    """All statements of the cell."""
    return [
        Claim("m", f"{words}: {statement}", "", of(arm), f"our own: {family}")
        for family, (statement, of) in QUESTIONS.items()
        for arm, words in JUDGED.items()
    ]
