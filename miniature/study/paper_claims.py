"""What a claim is: a statement of the paper, or a question of our own, that a number of every seed decides.

A seed's findings are a dictionary by cell (see :func:`.paper_findings.findings`). A claim reads one number out of it
that is positive where the claim is right. The claims themselves are in ``claims_*.py``, and all of them in
:mod:`.paper_cells`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...models.dimensions import DIMENSIONS, OVERALL

Found = dict[str, Any]
"""Findings of one seed, by cell."""
Value = Callable[[Found], float]
"""Reads a number out of one seed's findings; raises KeyError where the seed does not have it (yet)."""
RM, ORACLE = "reward model", "oracle"
SAME, OTHER = "win_rate", "superiority"
"""Wins over the base: at the same noise, as the paper counts, and at other noise of the prompt, which a tiny shift does
not win."""
COUNTED = {RM: (SAME, "reward model, same noise"), ORACLE: (OTHER, "oracle, other noise")}
"""How claims count a judge's wins: the reward model's as the paper does, the oracle's as strictly as possible."""
KINDS = ("without_ties", "with_ties")
"""Accuracies of a reward model, in the order of the paper's tables."""
SHARES = (0.01, 0.03, 0.1, 0.3)
"""Shares of the training pairs that cell (b) trains on, beside all of them."""
BETAS = (10.0, 30.0, 100.0, 300.0, 1000.0)
"""Values of beta in cell (f)."""

STRENGTHS = [0.0, 3.0, 10.0, 30.0, 100.0]
"""Strengths of guidance that the curves of cell (g) have, beside the one that tuning chose."""
EVEN = {"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3}
"""Weights of guidance by all dimensions alike."""
CLAIMED = (10.0, 30.0, 100.0)
"""Strengths that secondary rows are about, beside the one that tuning chose: at 3 little moves."""
GUIDES: dict[str, tuple[str, dict[str, float]]] = {
    "even": ("noisy_reward", EVEN),
    "ta": ("noisy_reward", {"TA": 1.0}),
    "mostly-ta": ("noisy_reward", {"VQ": 0.1, "MQ": 0.1, "TA": 0.8}),
    "less-ta": ("noisy_reward", {"VQ": 0.1, "MQ": 0.1, "TA": 0.6}),
    "vq-mq": ("noisy_reward", {"VQ": 0.5, "MQ": 0.5}),
    "mq": ("noisy_reward", {"MQ": 1.0}),
    "clean-mq": ("clean_reward", {"MQ": 1.0}),
    "clean-even": ("clean_reward", EVEN),
}
"""Sweeps of guidance: the reward that steers, and its weights (Table 5; Table 7 of version 1 for motion alone). Tuning
sweeps ``even``."""

POOLS = {
    "guided": "pairs drawn with guidance 2", "rendered": "off-policy pairs of rendered clips",
    "many": "24 samples a prompt, pairs at least 1.5 apart", "best": "of 24 samples a prompt the best and the worst",
    "two": "two samples a prompt", "weak": "a judge trained on 1 % of the pairs",
}  # fmt: skip
"""Other conditions under which pairs are made, for cell (i)."""


ALGORITHMS = {
    "control": "SFT on unselected samples", "sft": "SFT", "rwr": "Flow-RWR", "dpo": "Flow-DPO",
    "dpo-time": "Flow-DPO with beta (1 - t)^2",
}  # fmt: skip
"""Algorithms as statements name them. Without a schedule Flow-DPO has a constant beta."""


@dataclass(frozen=True)
class Claim:
    """A row of the page's tables: a statement that one number of every seed decides.

    Several rows may be of the same statement: by two judges, with and without ties, at several strengths. Such a
    statement is one *finding*, and its primary row decides it. Which row that is was fixed before any result:

    - of wins, the oracle's at other noise of the prompt, which neither a small shift nor a fooled reward model wins;
    - of accuracies, the one without ties, unless the statement is about ties;
    - of strengths of guidance, the one that tuning chose on its own seeds;
    - of a curve, the mean over its points; of that over raters' bias, the point of public sets.

    Attributes:
        cell: Letter of the cell on the page.
        text: The statement with what it was measured by.
        paper: The paper's numbers for it, as text; empty for a question of our own.
        of: The number of one seed, positive where the statement holds.
        family: The question that it belongs to, such as ``Table 3``. Findings of a family are corrected together; those
            of the paper and those of our own are never in the same one.
        statement: What all rows of the finding say; the text if not given.
        primary: Whether this row decides the finding.
        dimension: The dimension in which the statement depends on the reward model that labels pairs or guides; its
            accuracy is shown beside the verdict. Empty where it depends on none or on all.
        point: Names a secondary row in the reading, such as ``strength 30``; rows without a name are not in it.
        rate: Whether the number is a difference of rates (wins, accuracies), of which one can ask whether it is below
            .05.
    """

    cell: str
    text: str
    paper: str
    of: Value
    family: str = ""
    statement: str = ""
    primary: bool = True
    dimension: str = ""
    point: str = ""
    rate: bool = True

    @property
    def finding(self) -> tuple[str, str]:
        """Family and statement: what tells findings apart."""
        return self.family or f"cell ({self.cell})", self.statement or self.text


def by_judges(
    cell: str, statement: str, paper: str, of: Callable[[str], Value], family: str, dimension: str = ""
) -> list[Claim]:
    """A finding by the reward model as the paper counts, and by the oracle, which decides it.

    Args:
        cell: Letter of the cell.
        statement: What both rows say.
        paper: The paper's numbers, as text; empty for a question of our own.
        of: Gives the number by the name of the judge.
        family: The question that the finding belongs to.
        dimension: The dimension in which it depends on the reward model.
    """
    return [
        Claim(cell, f"{statement}, {by}", paper, of(judge), family, statement, judge == ORACLE, dimension, by)
        for judge, (_, by) in COUNTED.items()
    ]


# --- numbers of a seed ------------------------------------------------------------------------------------------------


def accuracy(model: str, benchmark: str, column: str, kind: str = "without_ties") -> Value:
    """Accuracy of a reward model.

    Args:
        model: Name of the reward model.
        benchmark: ``recent`` or ``older``.
        column: A dimension, or Overall.
        kind: One of :data:`KINDS`.
    """
    return lambda found: found["reward models"][model][benchmark][column][kind]


def wins(cell: str, arm: str, judge: str, column: str = OVERALL, noise: str | None = None) -> Value:
    """Share of an arm's videos that beat the base's.

    Args:
        cell: Cell of the comparison, such as ``aligned``.
        arm: Name of the arm.
        judge: Judge of the comparison: :data:`RM` or :data:`ORACLE`.
        column: A dimension, or Overall.
        noise: Noise of the compared videos: :data:`SAME` or :data:`OTHER`; by default the judge's in :data:`COUNTED`.
    """
    return lambda found: found[cell]["arms"][arm]["against_base"][judge][column][noise or COUNTED[judge][0]]


def of_share(loss: str, share: float) -> Value:
    """Mean accuracy over the dimensions, without ties, of a reward model that was trained on a share of the pairs."""
    name = loss if share == 1 else f"{loss}-{100 * share:g}"
    return mean([accuracy(name, "recent", d) for d in DIMENSIONS])


def mean(parts: Sequence[Value]) -> Value:
    """Mean of several numbers of a seed.

    Args:
        parts: The numbers.
    """
    return lambda found: sum(part(found) for part in parts) / len(parts)


def less(a: Value | float, b: Value | float) -> Value:
    """Difference of two numbers of a seed.

    Args:
        a: The first number.
        b: The number that is taken from it.
    """

    def of(one: Value | float, found: Found) -> float:
        return one if isinstance(one, float) else one(found)

    return lambda found: of(a, found) - of(b, found)


def side_by_side(*numbers: float, digits: int = 2) -> str:
    """The paper's numbers as text.

    Args:
        numbers: The numbers.
        digits: Digits behind the point.
    """
    return " / ".join(f"{number:.{digits}f}" for number in numbers)
