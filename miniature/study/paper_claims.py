"""What the paper found, and what we asked besides, as numbers that a seed of the miniature world either shows or does not.

A seed's findings are a dictionary by cell (see :func:`.paper_page.findings`); a claim reads one number out of it that is
positive where the claim is right. Numbers of the paper are those of its version 2.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from ...models.dimensions import DIMENSIONS, OVERALL

Found = dict[str, Any]
RM, ORACLE = "reward model", "oracle"
SAME, OTHER = "win_rate", "superiority"
"""Wins over the base at the same noise, as the paper counts, and at other noise of the prompt, which the smallest shift does not win."""
COUNTED = {RM: (SAME, "reward model, same noise"), ORACLE: (OTHER, "oracle, other noise")}
"""How claims count a judge's wins: as the paper does, and as strictly as can be."""
SHARES = (0.01, 0.03, 0.1, 0.3)
"""Of the training pairs that cell (b) trains on, besides all of them."""
BETAS = (10.0, 30.0, 100.0, 300.0, 1000.0)
"""Of cell (f)."""

STRENGTHS = [0.0, 3.0, 10.0, 30.0, 100.0]
"""Of guidance; tuning chooses one above 0."""
EVEN = {"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3}
CLAIMED = (10.0, 30.0, 100.0)
"""Strengths that claims are made of: at 3 little moves."""
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
"""Sweeps of guidance: the reward that steers, and its weights (Table 5; Table 7 of v1 for motion alone). ``even`` is what tuning sweeps."""

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
"""What tuning tries of each algorithm: equally many settings."""


@dataclass(frozen=True)
class Claim:
    """One finding.

    Attributes:
        cell: letter. text: what is claimed. paper: its numbers there; empty where the paper claims no such thing, and we ask.
        of: the number of one seed, positive where it holds; raises KeyError where the seed does not have it (yet).
    """

    cell: str
    text: str
    paper: str
    of: Callable[[Found], float]


@dataclass(frozen=True)
class Interval:
    """Mean of the seeds with a 95 % interval (Student's t; infinite with one seed)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        count = len(self.values)
        if count < 2:
            return math.inf
        error = math.sqrt(sum((v - self.mean) ** 2 for v in self.values) / (count - 1) / count)
        return float(stats.t.ppf(0.975, count - 1)) * error

    def verdict(self, words: tuple[str, str]) -> str:
        """The first word where the interval is above 0, the second where it is below, else ``undecided``."""
        if self.mean - self.half > 0:
            return words[0]
        if self.mean + self.half < 0:
            return words[1]
        agree = sum(v > 0 for v in self.values)
        return f"undecided ({agree} of {len(self.values)} seeds for it)"

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half:.3f}" if math.isfinite(self.half) else "")


def accuracy(model: str, benchmark: str, column: str, kind: str = "without_ties") -> Callable[[Found], float]:
    """Of a reward model."""
    return lambda found: found["reward models"][model][benchmark][column][kind]


def wins(cell: str, arm: str, judge: str, column: str = OVERALL, noise: str | None = None) -> Callable[[Found], float]:
    """Share of an arm's videos that beat the base's, at the given noise or as :data:`COUNTED` has it."""
    return lambda found: found[cell]["arms"][arm]["against_base"][judge][column][noise or COUNTED[judge][0]]


def _mean(parts: Sequence[Callable[[Found], float]]) -> Callable[[Found], float]:
    return lambda found: sum(part(found) for part in parts) / len(parts)


def _less(a: Callable[[Found], float] | float, b: Callable[[Found], float] | float) -> Callable[[Found], float]:
    def of(one: Callable[[Found], float] | float, found: Found) -> float:
        return one if isinstance(one, float) else one(found)

    return lambda found: of(a, found) - of(b, found)


def _losses() -> list[Claim]:
    made = [
        (
            "BT orders better than regression, Overall without ties",
            "72.58 / 70.16",
            ("bt", "reg", "recent", OVERALL, "without_ties"),
        ),
        ("BTT above BT with ties, VQ", "60.52 / 52.33", ("btt", "bt", "recent", "VQ", "with_ties")),
        ("BTT above BT with ties, MQ", "64.64 / 59.43", ("btt", "bt", "recent", "MQ", "with_ties")),
        ("BTT above BT with ties, TA", "53.55 / 53.06", ("btt", "bt", "recent", "TA", "with_ties")),
        (
            "separate tokens above a shared one, MQ without ties",
            "74.70 / 72.40",
            ("separate", "btt", "recent", "MQ", "without_ties"),
        ),
        (
            "separate tokens above a shared one, MQ with ties",
            "66.03 / 64.64",
            ("separate", "btt", "recent", "MQ", "with_ties"),
        ),
        (
            "separate tokens above a shared one, TA without ties",
            "72.20 / 72.12",
            ("separate", "btt", "recent", "TA", "without_ties"),
        ),
        (
            "separate tokens above a shared one, older sources (GenAI-Bench), without ties",
            "72.89 / 70.89",
            ("separate", "btt", "older", OVERALL, "without_ties"),
        ),
        (
            "the whole recipe (BTT, separate) above regression, Overall without ties",
            "73.59 / 70.16",
            ("separate", "reg", "recent", OVERALL, "without_ties"),
        ),
        (
            "the whole recipe above regression, Overall with ties",
            "61.26 / 58.39",
            ("separate", "reg", "recent", OVERALL, "with_ties"),
        ),
    ]
    return [
        Claim("a", text, numbers, _less(accuracy(first, *rest), accuracy(second, *rest)))
        for text, numbers, (first, second, *rest) in made
    ]


def of_share(loss: str, share: float) -> Callable[[Found], float]:
    """Mean accuracy over the dimensions, without ties, of a reward model that was trained on a share of the pairs."""
    name = loss if share == 1 else f"{loss}-{100 * share:g}"
    return _mean([accuracy(name, "recent", d) for d in DIMENSIONS])


def _shares() -> list[Claim]:
    return [
        Claim(
            "b",
            f"BT above regression with {share:.0%} of the pairs",
            "above throughout (points not readable)",
            _less(of_share("bt", share), of_share("reg", share)),
        )
        for share in (*SHARES, 1.0)
    ]


def _prompts() -> list[Claim]:
    def moved(tokens: str, dimension: str) -> Callable[[Found], float]:
        return lambda found: found["prompts"][tokens][dimension]

    return [
        Claim(
            "c",
            f"separate tokens keep {d} blind to the prompt; a shared one does not (mean shift, deviations)",
            "by construction; no number",
            _less(moved("shared", d), moved("separate", d)),
        )
        for d in ("VQ", "MQ")
    ]


_TABLE = {  # VideoGen-Eval, Table 3: VQ, MQ, TA
    "sft": (61.27, 76.13, 46.35), "rwr": (59.05, 69.70, 48.35), "dpo-time": (88.44, 91.23, 28.14), "dpo": (90.95, 81.01, 68.26),
}  # fmt: skip
_TA_TABLE = {"sft": 53.81, "rwr": 49.50, "dpo-time": 55.95, "dpo": 65.49}  # VideoGen-Eval, Table 4


def _aligned() -> list[Claim]:
    claims = []
    for judge, (_, by) in COUNTED.items():
        for (name, row), (place, d) in itertools.product(_TABLE.items(), enumerate(DIMENSIONS)):
            share = wins("aligned", name, judge, d)
            text, of = ("raises", _less(share, 0.5)) if row[place] > 50 else ("costs", _less(0.5, share))
            claims.append(Claim("d", f"{name} {text} {d}, {by}", f"{row[place]:.1f} / 50", of))
        mean = {name: _mean([wins("aligned", name, judge, d) for d in DIMENSIONS]) for name in (*_TABLE, "control")}
        paper = {name: f"{sum(row) / 3:.1f}" for name, row in _TABLE.items()}
        order = [("dpo", "sft"), ("dpo", "rwr"), ("dpo", "dpo-time"), ("dpo-time", "sft"), ("sft", "rwr")]
        claims += [
            Claim(
                "d",
                f"{first} above {second}, mean of VQ, MQ and TA, {by}",
                f"{paper[first]} / {paper[second]}",
                _less(mean[first], mean[second]),
            )
            for first, second in order
        ]
        claims += [
            Claim(
                "d",
                f"beta (1 - t)^2 costs text alignment against constant beta, TA, {by}",
                "28.1 / 68.3",
                _less(wins("aligned", "dpo", judge, "TA"), wins("aligned", "dpo-time", judge, "TA")),
            ),
            Claim(
                "d",
                f"beta (1 - t)^2 gives more motion quality than constant beta, MQ, {by}",
                "91.2 / 81.0",
                _less(wins("aligned", "dpo-time", judge, "MQ"), wins("aligned", "dpo", judge, "MQ")),
            ),
            Claim(
                "d",
                f"sft on preferred samples above sft on unselected ones (control), mean of VQ, MQ and TA, {by}",
                "",
                _less(mean["sft"], mean["control"]),
            ),
        ]
    return claims


def _alone() -> list[Claim]:
    claims = []
    for judge, (_, by) in COUNTED.items():
        for name, row in _TA_TABLE.items():
            share = wins("ta", name, judge, "TA")
            text, of = ("raises", _less(share, 0.5)) if row > 50 else ("does not raise", _less(0.5, share))
            claims.append(Claim("e", f"TA alone: {name} {text} TA, {by}", f"{row} / 50", of))
        claims += [
            Claim(
                "e",
                f"TA alone: constant beta above {name}, {by}",
                f"{_TA_TABLE['dpo']} / {_TA_TABLE[name]}",
                _less(wins("ta", "dpo", judge, "TA"), wins("ta", name, judge, "TA")),
            )
            for name in ("sft", "rwr", "dpo-time")
        ]
        claims += [
            Claim(
                "f",
                f"constant beta above beta (1 - t)^2 at beta {b:g}, TA, {by}",
                "above at every beta (points not readable)",
                _less(wins("beta", f"constant-{b:g}", judge, "TA"), wins("beta", f"time-{b:g}", judge, "TA")),
            )
            for b in BETAS
        ]
    return claims


def _guided() -> list[Claim]:
    claims = []
    for (judge, (_, by)), strength in itertools.product(COUNTED.items(), CLAIMED):
        by = f"strength {strength:g}, {by}"

        def at(sweep: str, column: str, judge: str = judge, strength: float = strength) -> Callable[[Found], float]:
            return wins("nrg", f"{sweep}@{strength:g}", judge, column)

        claims += [
            Claim("g", f"weights 0:0:1 raise TA, {by}", "70.42 / 50", _less(at("ta", "TA"), 0.5)),
            Claim("g", f"weights .5:.5:0 raise VQ, {by}", "86.43 / 50", _less(at("vq-mq", "VQ"), 0.5)),
            Claim("g", f"weights .5:.5:0 raise MQ, {by}", "93.23 / 50", _less(at("vq-mq", "MQ"), 0.5)),
            Claim("g", f"weights .5:.5:0 cost TA, {by}", "26.65 / 50", _less(0.5, at("vq-mq", "TA"))),
            Claim(
                "g",
                f"more weight on TA gives more TA (0:0:1 against .5:.5:0), {by}",
                "70.42 / 26.65",
                _less(at("ta", "TA"), at("vq-mq", "TA")),
            ),
            Claim("g", f"MQ alone, noisy reward raises MQ, {by}", "74.6 / 50 (TA-Hard)", _less(at("mq", "MQ"), 0.5)),
            Claim(
                "g",
                f"MQ alone, noisy reward above clean reward, MQ, {by}",
                "74.6 / 38.6 (TA-Hard)",
                _less(at("mq", "MQ"), at("clean-mq", "MQ")),
            ),
        ]
    for strength in STRENGTHS[1:]:
        claims.append(
            Claim(
                "g",
                f"even weights above best-of-N of the same cost (oracle's sum), strength {strength:g}",
                "",
                lambda found, s=strength: found["nrg"]["arms"][f"even@{s:g}"]["best_of"]["difference"],
            )
        )
    for judge, (_, by) in COUNTED.items():
        claims += [
            Claim(
                "h",
                f"{name}: adapters above full training, {by}",
                "full training degrades or collapses; no number",
                _less(wins("aligned", name, judge), wins("aligned", f"{name}-full", judge)),
            )
            for name in ("dpo", "sft")
        ]
    return claims


POOLS = {
    "guided": "pairs drawn with guidance 2", "rendered": "off-policy pairs of rendered clips",
    "many": "24 samples a prompt, pairs at least 1.5 apart", "best": "of 24 samples a prompt the best and the worst",
    "two": "two samples a prompt", "weak": "a judge trained on 1 % of the pairs",
}  # fmt: skip


def _conditions() -> list[Claim]:
    claims = []
    for pool, text in POOLS.items():
        for other in ("sft", "rwr"):
            claims.append(
                Claim(
                    "i",
                    f"Flow-DPO above {other}: {text}, {COUNTED[ORACLE][1]}",
                    "",
                    _less(wins("conditions", f"{pool}-dpo", ORACLE), wins("conditions", f"{pool}-{other}", ORACLE)),
                )
            )
    claims.append(
        Claim(
            "i",
            f"sft on unselected samples drawn with guidance already beats the base (guidance distillation), {COUNTED[ORACLE][1]}",
            "",
            _less(wins("conditions", "guided-control", ORACLE), 0.5),
        )
    )
    return claims


def _judges() -> list[Claim]:
    """What the paper takes for granted: that a judge of other generators' videos can judge one's own."""

    def of(model: str, dimension: str) -> Callable[[Found], float]:
        return lambda found: found["judges"][model]["generated"][dimension]["without_ties"]

    return [
        *(
            Claim(
                "j",
                f"a reward model of rendered clips ranks generated ones better than chance, {d}",
                "",
                _less(of("reward_rendered", d), 0.5),
            )
            for d in DIMENSIONS
        ),
        *(
            Claim(
                "j",
                f"rated pairs of generated clips make it a better judge of them, {d}",
                "",
                _less(of("reward", d), of("reward_rendered", d)),
            )
            for d in DIMENSIONS
        ),
    ]


CLAIMS = sorted(
    [*_losses(), *_shares(), *_prompts(), *_aligned(), *_alone(), *_guided(), *_conditions(), *_judges()],
    key=lambda claim: claim.cell,
)
"""All of them, in the order of the cells."""
