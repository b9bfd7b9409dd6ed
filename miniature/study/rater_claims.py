"""Cell (l): statements about raters with a bias, each of which one number of a seed decides.

The paper says that Bradley-Terry orders better than regression, and not how far its raters agree on the scale. Here it
is measured over the bias of raters, so that the statement has a condition.
"""

from ...models.dimensions import DIMENSIONS
from ...models.published import TABLE_6
from ..world.annotators import PUBLIC_BIAS
from .paper_claims import Claim, Found, Value, less

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

    def of(found: Found) -> float:
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
    return less(accuracy_at(first, bias), accuracy_at(second, bias))


def claims() -> list[Claim]:
    """All statements of the cell. The row at the bias of public sets decides: raters most likely have that one."""
    published = {loss: f"{_published(loss):.1f} / {_published('reg'):.1f}" for loss in VOTED}
    family, own = "Table 6 with biased raters", "our own: raters' bias"
    compared = [
        *(
            (f"{words} orders better than regression under raters' bias", loss, "reg", published[loss], family)
            for loss, words in VOTED.items()
        ),
        ("standardising scores by rater improves regression", "std", "reg", "", own),
        ("BT orders better than regression on standardised scores", "bt", "std", "", own),
    ]
    rows = []
    for statement, first, second, paper, group in compared:
        for bias in BIASES[first == "std" :]:  # without a bias there is nothing to standardise
            text, of, decides = f"{statement}, {at(bias)}", ahead(first, second, bias), bias == PUBLIC_BIAS
            rows.append(Claim("l", text, paper, of, group, statement, decides, point=f"bias {bias:g}"))
    return rows


def at(bias: float) -> str:
    """A bias in words."""
    return f"rater bias {bias:g}{' (as in public sets)' * (bias == PUBLIC_BIAS)}"


def _published(loss: str) -> float:
    """Mean of the paper's accuracies over the dimensions, without ties, in percent."""
    return sum(TABLE_6[loss][d][0] for d in DIMENSIONS) / len(DIMENSIONS)
