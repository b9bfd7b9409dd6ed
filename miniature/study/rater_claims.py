"""Cell (l): statements about raters with a bias, each of which one number of a seed decides.

The paper says that Bradley-Terry orders better than regression, and not how far its raters agree on the scale. Here it
is measured over the bias of raters, so that the statement has a condition.
"""

from collections.abc import Sequence
from typing import Any

from ...models.dimensions import DIMENSIONS
from ...models.published import TABLE_6
from ..world.annotators import PUBLIC_BIAS
from .paper_claims import Claim, Value

BIASES = (0.0, PUBLIC_BIAS, 2 * PUBLIC_BIAS, 4 * PUBLIC_BIAS)
"""Standard deviations of the raters' levels, in points: none, that of public sets, twice and four times as much."""
VOTED = {"bt": "BT", "btt": "BTT"}
"""Losses of votes, which no bias changes: each is trained once."""
SCORED = {"reg": "regression", "std": "regression, scores standardised by rater"}
"""Regression on scores, and on scores that are standardised by rater: each is trained at every bias."""


def model_name(loss: str, bias: float) -> str:
    """Name of a reward model of this cell.

    Args:
        loss: Key of :data:`VOTED` or :data:`SCORED`.
        bias: The raters' bias, one of :data:`BIASES`.
    """
    return f"raters-{loss}" if loss in VOTED else f"raters-{loss}-{bias:g}"


def accuracy_at(loss: str, bias: float) -> Value:
    """Mean accuracy over the dimensions, without ties, on the benchmark ``recent``, whose labels are unbiased votes.

    Args:
        loss: Key of :data:`VOTED` or :data:`SCORED`.
        bias: The raters' bias, one of :data:`BIASES`.
    """
    name = model_name(loss, bias)

    def of(found: dict[str, Any]) -> float:
        columns = found["reward models"][name]["recent"]
        return sum(columns[d]["without_ties"] for d in DIMENSIONS) / len(DIMENSIONS)

    return of


def ahead(first: str, second: str, bias: float) -> Value:
    """How much more accurate one loss is than another at one bias.

    Args:
        first: Key of :data:`VOTED` or :data:`SCORED`.
        second: Another one.
        bias: The raters' bias, one of :data:`BIASES`.
    """
    one, other = accuracy_at(first, bias), accuracy_at(second, bias)
    return lambda found: one(found) - other(found)


def claims() -> list[Claim]:
    """All claims of the cell. A statement is decided where the paper's raters most likely are: at the public bias."""
    rows, mine = [], "our own: raters"
    for loss, words in VOTED.items():
        paper = f"{_published(loss):.1f} / {_published('reg'):.1f}"
        statement = f"{words} orders better than regression, raters with a bias"
        rows += _over_bias(statement, paper, BIASES, loss, "reg", "Table 6, raters with a bias")
    rows += _over_bias("standardising scores by rater improves regression", "", BIASES[1:], "std", "reg", mine)
    return [
        *rows,
        *_over_bias("BT orders better than regression on standardised scores", "", BIASES, "bt", "std", mine),
    ]


def _over_bias(
    statement: str, paper: str, biases: Sequence[float], first: str, second: str, family: str
) -> list[Claim]:
    """A statement at several biases."""
    return [
        Claim(
            "l",
            f"{statement}, {at(bias)}",
            paper,
            ahead(first, second, bias),
            family,
            statement,
            bias == PUBLIC_BIAS,
            point=f"bias {bias:g}",
        )
        for bias in biases
    ]


def at(bias: float) -> str:
    """A bias in words."""
    return f"rater bias {bias:g}{' (as in public sets)' * (bias == PUBLIC_BIAS)}"


def _published(loss: str) -> float:
    """Mean of the paper's accuracies over the dimensions, without ties, in percent."""
    return sum(TABLE_6[loss][d][0] for d in DIMENSIONS) / len(DIMENSIONS)
