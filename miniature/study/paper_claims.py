"""Claims of the paper, and questions of our own, each as a number that a seed of the miniature world can decide.

A seed's findings are a dictionary by cell (see :func:`.paper_findings.findings`). A claim reads one number out of it
that is positive where the claim is right.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.published import TABLE_3, TABLE_4, TABLE_5, TABLE_6, TABLE_7_OF_V1
from .rater_claims import rater_rows

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
"""Strengths of guidance; tuning chooses one above 0."""
EVEN = {"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3}
"""Weights of guidance by all dimensions alike."""
CLAIMED = (10.0, 30.0, 100.0)
"""Strengths that claims are made about: at 3 little moves."""
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

_RATES = [{"lr": lr} for lr in (5e-4, 1e-3, 2e-3, 4e-3)]
_FULL_RATES = [{"lr": lr} for lr in (3e-5, 1e-4, 3e-4, 1e-3)]
TRIALS: dict[str, list[dict[str, float]]] = {
    "sft": _RATES,
    "rwr": _RATES,
    "dpo": [{"lr": lr, "beta": beta} for lr, beta in itertools.product((2.5e-4, 5e-4), (30.0, 100.0))],
    # of beta 100 and 500 it was 500 by far: the grid was moved up once
    "dpo-time": [{"lr": lr, "beta": beta} for lr, beta in itertools.product((2.5e-4, 5e-4), (500.0, 2000.0))],
    "sft-full": _FULL_RATES,
    "dpo-full": [{"lr": lr, "beta": beta} for lr, beta in itertools.product((3e-5, 1e-4), (30.0, 100.0))],
}
"""Settings that tuning tries for each algorithm: equally many for all of them."""
POOLS = {
    "guided": "pairs drawn with guidance 2", "rendered": "off-policy pairs of rendered clips",
    "many": "24 samples a prompt, pairs at least 1.5 apart", "best": "of 24 samples a prompt the best and the worst",
    "two": "two samples a prompt", "weak": "a judge trained on 1 % of the pairs",
}  # fmt: skip
"""Other conditions under which pairs are made, for cell (i)."""


@dataclass(frozen=True)
class Claim:
    """A statement that one number decides.

    Attributes:
        cell: Letter of the cell on the page.
        text: The statement.
        paper: The paper's numbers for it, as text; empty for a question of our own.
        of: The number of one seed, positive where the statement holds.
    """

    cell: str
    text: str
    paper: str
    of: Value


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
    return _mean([accuracy(name, "recent", d) for d in DIMENSIONS])


def _mean(parts: Sequence[Value]) -> Value:
    return lambda found: sum(part(found) for part in parts) / len(parts)


def _less(a: Value | float, b: Value | float) -> Value:
    def of(one: Value | float, found: Found) -> float:
        return one if isinstance(one, float) else one(found)

    return lambda found: of(a, found) - of(b, found)


def _side_by_side(*numbers: float, digits: int = 2) -> str:
    """The paper's numbers as text."""
    return " / ".join(f"{number:.{digits}f}" for number in numbers)


# --- claims, cell by cell ---------------------------------------------------------------------------------------------


def _losses() -> list[Claim]:
    compared = [
        ("BT orders better than regression, Overall without ties", "bt", "reg", "recent", OVERALL, 0),
        ("BTT above BT with ties, VQ", "btt", "bt", "recent", "VQ", 1),
        ("BTT above BT with ties, MQ", "btt", "bt", "recent", "MQ", 1),
        ("BTT above BT with ties, TA", "btt", "bt", "recent", "TA", 1),
        ("separate tokens above a shared one, MQ without ties", "separate", "btt", "recent", "MQ", 0),
        ("separate tokens above a shared one, MQ with ties", "separate", "btt", "recent", "MQ", 1),
        ("separate tokens above a shared one, TA without ties", "separate", "btt", "recent", "TA", 0),
        (
            "separate tokens above a shared one, older sources (GenAI-Bench), without ties",
            "separate", "btt", "older", OVERALL, 0,
        ),
        (
            "the whole recipe (BTT, separate) above regression, Overall without ties",
            "separate", "reg", "recent", OVERALL, 0,
        ),
        ("the whole recipe above regression, Overall with ties", "separate", "reg", "recent", OVERALL, 1),
    ]  # fmt: skip
    claims = []
    for text, first, second, benchmark, column, kind in compared:
        place = "GenAI-Bench" if benchmark == "older" else column
        paper = _side_by_side(*(TABLE_6[name][place][kind] for name in (first, second)))
        here = (accuracy(name, benchmark, column, KINDS[kind]) for name in (first, second))
        claims.append(Claim("a", text, paper, _less(*here)))
    return claims


def _shares() -> list[Claim]:
    paper = "above throughout (points not readable)"
    return [
        Claim(
            "b", f"BT above regression with {s:.0%} of the pairs", paper, _less(of_share("bt", s), of_share("reg", s))
        )
        for s in (*SHARES, 1.0)
    ]


def _prompts() -> list[Claim]:
    def moved(tokens: str, dimension: str) -> Value:
        return lambda found: found["prompts"][tokens][dimension]

    claims = []
    for d in ("VQ", "MQ"):
        text = f"separate tokens keep {d} blind to the prompt; a shared one does not (mean shift, deviations)"
        shift = _less(moved("shared", d), moved("separate", d))
        claims.append(Claim("c", text, "by construction; no number", shift))
    return claims


def _aligned() -> list[Claim]:
    claims = []
    for judge, (_, by) in COUNTED.items():
        for (name, row), (place, d) in itertools.product(TABLE_3.items(), enumerate(DIMENSIONS)):
            share = wins("aligned", name, judge, d)
            text, of = ("raises", _less(share, 0.5)) if row[place] > 50 else ("costs", _less(0.5, share))
            claims.append(Claim("d", f"{name} {text} {d}, {by}", f"{row[place]:.1f} / 50", of))
        mean = {name: _mean([wins("aligned", name, judge, d) for d in DIMENSIONS]) for name in (*TABLE_3, "control")}
        for first, second in (
            ("dpo", "sft"), ("dpo", "rwr"), ("dpo", "dpo-time"), ("dpo-time", "sft"), ("sft", "rwr")
        ):  # fmt: skip
            paper = _side_by_side(*(sum(TABLE_3[name]) / 3 for name in (first, second)), digits=1)
            text = f"{first} above {second}, mean of VQ, MQ and TA, {by}"
            claims.append(Claim("d", text, paper, _less(mean[first], mean[second])))
        claims += _schedules(judge, by)
        text = f"sft on preferred samples above sft on unselected ones (control), mean of VQ, MQ and TA, {by}"
        claims.append(Claim("d", text, "", _less(mean["sft"], mean["control"])))
    return claims


def _schedules(judge: str, by: str) -> list[Claim]:
    """The two schedules of beta against each other."""
    claims = []
    for text, first, second, d in (
        ("beta (1 - t)^2 costs text alignment against constant beta", "dpo", "dpo-time", "TA"),
        ("beta (1 - t)^2 gives more motion quality than constant beta", "dpo-time", "dpo", "MQ"),
    ):
        more, less = (wins("aligned", name, judge, d) for name in (first, second))
        paper = _side_by_side(*(TABLE_3[n][DIMENSIONS.index(d)] for n in ("dpo-time", "dpo")), digits=1)
        claims.append(Claim("d", f"{text}, {d}, {by}", paper, _less(more, less)))
    return claims


def _alone() -> list[Claim]:
    claims = []
    for judge, (_, by) in COUNTED.items():
        won = {name: wins("ta", name, judge, "TA") for name in TABLE_4}
        for name, row in TABLE_4.items():
            text, of = ("raises", _less(won[name], 0.5)) if row > 50 else ("does not raise", _less(0.5, won[name]))
            claims.append(Claim("e", f"TA alone: {name} {text} TA, {by}", f"{row:g} / 50", of))
        for name in ("sft", "rwr", "dpo-time"):
            text, paper = f"TA alone: constant beta above {name}, {by}", f"{TABLE_4['dpo']:g} / {TABLE_4[name]:g}"
            claims.append(Claim("e", text, paper, _less(won["dpo"], won[name])))
        for beta in BETAS:
            text = f"constant beta above beta (1 - t)^2 at beta {beta:g}, TA, {by}"
            constant, time = (wins("beta", f"{name}-{beta:g}", judge, "TA") for name in ("constant", "time"))
            claims.append(Claim("f", text, "above at every beta (points not readable)", _less(constant, time)))
    return claims


def _guided() -> list[Claim]:
    claims = []
    ta, vq_mq = TABLE_5[0, 0, 1], TABLE_5[0.5, 0.5, 0]
    noisy, clean = TABLE_7_OF_V1["noisy"][1], TABLE_7_OF_V1["clean"][1]
    for (judge, (_, counted)), strength in itertools.product(COUNTED.items(), CLAIMED):
        at = {
            (name, d): wins("nrg", f"{name}@{strength:g}", judge, d)
            for name, d in itertools.product(("ta", "vq-mq", "mq", "clean-mq"), DIMENSIONS)
        }
        for text, paper, of in (
            ("weights 0:0:1 raise TA", f"{ta[2]:.2f} / 50", _less(at["ta", "TA"], 0.5)),
            ("weights .5:.5:0 raise VQ", f"{vq_mq[0]:.2f} / 50", _less(at["vq-mq", "VQ"], 0.5)),
            ("weights .5:.5:0 raise MQ", f"{vq_mq[1]:.2f} / 50", _less(at["vq-mq", "MQ"], 0.5)),
            ("weights .5:.5:0 cost TA", f"{vq_mq[2]:.2f} / 50", _less(0.5, at["vq-mq", "TA"])),
            (
                "more weight on TA gives more TA (0:0:1 against .5:.5:0)",
                _side_by_side(ta[2], vq_mq[2]),
                _less(at["ta", "TA"], at["vq-mq", "TA"]),
            ),
            ("MQ alone, noisy reward raises MQ", f"{noisy:.1f} / 50 (TA-Hard)", _less(at["mq", "MQ"], 0.5)),
            (
                "MQ alone, noisy reward above clean reward, MQ",
                f"{_side_by_side(noisy, clean, digits=1)} (TA-Hard)",
                _less(at["mq", "MQ"], at["clean-mq", "MQ"]),
            ),
        ):
            claims.append(Claim("g", f"{text}, strength {strength:g}, {counted}", paper, of))
    return claims


def _against_best_of_n() -> list[Claim]:
    def ahead(strength: float) -> Value:
        return lambda found: found["nrg"]["arms"][f"even@{strength:g}"]["best_of"]["difference"]

    text = "even weights above best-of-N of the same cost (oracle's sum), strength"
    return [Claim("g", f"{text} {strength:g}", "", ahead(strength)) for strength in STRENGTHS[1:]]


def _full_training() -> list[Claim]:
    claims = []
    for (judge, (_, by)), name in itertools.product(COUNTED.items(), ("dpo", "sft")):
        adapters, full = (wins("aligned", arm, judge) for arm in (name, f"{name}-full"))
        text, paper = f"{name}: adapters above full training, {by}", "full training degrades or collapses; no number"
        claims.append(Claim("h", text, paper, _less(adapters, full)))
    return claims


def _conditions() -> list[Claim]:
    claims, by = [], COUNTED[ORACLE][1]
    for (pool, text), other in itertools.product(POOLS.items(), ("sft", "rwr")):
        dpo, rival = (wins("conditions", f"{pool}-{name}", ORACLE) for name in ("dpo", other))
        claims.append(Claim("i", f"Flow-DPO above {other}: {text}, {by}", "", _less(dpo, rival)))
    distilled = "sft on unselected samples drawn with guidance already beats the base (guidance distillation)"
    won = _less(wins("conditions", "guided-control", ORACLE), 0.5)
    return [*claims, Claim("i", f"{distilled}, {by}", "", won)]


def _judges() -> list[Claim]:
    """What the paper takes for granted: that a judge of other generators' videos can judge one's own."""

    def of(model: str, dimension: str) -> Value:
        return lambda found: found["judges"][model]["generated"][dimension]["without_ties"]

    better = "a reward model of rendered clips ranks generated ones better than chance"
    taught = "rated pairs of generated clips make it a better judge of them"
    return [
        *(Claim("j", f"{better}, {d}", "", _less(of("reward_rendered", d), 0.5)) for d in DIMENSIONS),
        *(Claim("j", f"{taught}, {d}", "", _less(of("reward", d), of("reward_rendered", d))) for d in DIMENSIONS),
    ]


def _raters() -> list[Claim]:
    return [Claim("l", row.text, row.paper, row.of) for row in rater_rows()]


_CELLS = (
    _losses, _shares, _prompts, _aligned, _alone, _guided, _against_best_of_n, _full_training, _conditions, _judges,
    _raters,
)  # fmt: skip
CLAIMS = sorted((claim for cell in _CELLS for claim in cell()), key=lambda claim: claim.cell)
"""All claims, in the order of the cells."""
