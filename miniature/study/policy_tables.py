"""Tables of the page of `videoalign study on-policy`: means over seeds with their intervals."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from ...callbacks.plots import markdown_table
from ...commands.comparison import OWN_VIEW
from ...models.dimensions import DIMENSIONS
from ...models.evidence import holm, p_value
from ...models.intervals import Interval
from .paper_claims import KINDS, ORACLE, RM, Value
from .paper_findings import Seeds, over_seeds
from .policy_findings import BASE, JUDGES, NAMES, OWN, chosen_of, evaluations, gain, hacks_at, picked, wins
from .policy_recipes import RECIPES, before, spent, steps_of
from .policy_searches import WAYS
from .policy_size import SHARES, PolicySize
from .policy_units import BENCHED, HELD

READS = {
    "pairs": "labelled pairs of the base's samples",
    "prompts": "groups of its own samples",
    "seeds": "the gradient of its own samples' reward",
}
"""What an algorithm learns from, in words."""
AGAINST = "dpo"
"""Algorithm that the others are compared with: the paper's own."""
LEVEL = 0.05
"""Level at which a difference is decided."""


def text(found: Seeds, of: Value) -> str:
    """A mean over seeds with its interval; ``-`` where no seed has it."""
    interval = over_seeds(found, of)
    return f"{interval.mean:+.2f}" + (f" ± {interval.half:.2f}" if len(interval.runs) > 1 else "") if interval else "-"


def three(found: Seeds, of: Callable[[str], Value]) -> str:
    """Means over seeds of VQ, MQ and TA."""
    means = [over_seeds(found, of(dimension)) for dimension in DIMENSIONS]
    return " / ".join(f"{mean.mean:+.2f}" if mean else "-" for mean in means)


def cost_table(found: Seeds, policies: PolicySize, fresh: int, tuned: Mapping[str, Mapping[str, float]]) -> str:
    """What each algorithm spends, by the rule and as it was counted, and its chosen setting.

    Args:
        found: Findings by seed.
        policies: Budget and sizes.
        fresh: Videos per prompt among the samples that pairs are made of.
        tuned: Chosen settings by algorithm.
    """
    rows = []
    for name, words in NAMES.items():
        if name in RECIPES:
            recipe = RECIPES[name]
            pool, steps = before(recipe, fresh), steps_of(name, policies, fresh)["full"]
            rule, learns = spent(name, policies, fresh)["full"], READS[recipe.reads]
            size = f"{steps} {'iterations' if recipe.on_policy else 'steps'}"
        else:
            way, pool = WAYS[name], 0.0
            count = way.candidates(policies, 1.0) if name != "nrg" else 1
            learns, size = "nothing: it searches", f"{count} candidate{'s' if count > 1 else ''} a video"
            rule = (count * way.each - policies.of_video(0.0)) * (
                policies.budget / (policies.of_video() - policies.of_video(0.0))
            )
        counted = over_seeds(found, lambda f, n=name, p=pool: evaluations(f, n, "full", policies, p))
        values = ", ".join(
            f"{key} {value:g}"
            for key, value in tuned.get(WAYS[name].of if name in WAYS and WAYS[name].of else name, {}).items()
        )
        own = "noisy reward" if OWN[name] == OWN_VIEW else RM
        rows.append(
            [words, learns, own, size, f"{rule:,.0f}", f"{counted.mean:,.0f}" if counted else "-", values or "-"]
        )
    head = ["algorithm", "learns from", "own reward", "size", "evaluations, by the rule", "counted", "setting"]
    return markdown_table(head, rows)


def gain_table(found: Seeds, share: str) -> str:
    """Gains of all algorithms at a share of the budget, by each judge and by dimension.

    Args:
        found: Findings by seed.
        share: Share of the budget.
    """

    def of(name: str, judge: str, column: str = "Overall") -> Value:
        return lambda f: gain(f, share, name, judge, column)

    rows = []
    for name, words in NAMES.items():
        if name == "nrg" and share != "full":
            continue
        rows.append(
            [
                words,
                *(text(found, of(name, judge)) for judge in (*JUDGES[:1], RM, *JUDGES[1:])),
                *(three(found, lambda d, n=name, j=j: of(n, j, d)) for j in (RM, HELD, ORACLE)),
                text(found, lambda f, n=name: wins(f, share, n, ORACLE)).removeprefix("+"),
            ]
        )
    for count in (2, 4, 8):
        oracle = text(found, lambda f, c=count: chosen_of(f, c))
        if share == "full" and oracle != "-":
            dimensions = three(found, lambda d, c=count: lambda f: chosen_of(f, c, d))
            rows.append([f"best of {count} by the reward model", "", "", "", oracle, "", "", dimensions, ""])
    head = ["algorithm", "own reward", RM, HELD, ORACLE, *(f"{j}: VQ / MQ / TA" for j in (RM, HELD, ORACLE))]
    return markdown_table([*head, "wins over the base, oracle"], rows)


def curve_table(found: Seeds) -> str:
    """Gains at each share of the budget, own, held-out and by the oracle.

    Args:
        found: Findings by seed.
    """
    rows = []
    for name, words in NAMES.items():
        if name != "nrg":
            cells = (text(found, lambda f, n=name, s=s, j=j: gain(f, s, n, j)) for j in JUDGES for s in SHARES)
            rows.append([words, *cells])
    return markdown_table(["algorithm", *(f"{judge}, {share}" for judge in JUDGES for share in SHARES)], rows)


def decided(found: Seeds) -> tuple[list[tuple[str, str, Interval]], int]:
    """Pairs of algorithms whose gains differ at the whole budget by the oracle, after Holm's correction for all pairs.

    Args:
        found: Findings by seed.

    Returns:
        The better one's name, the other one's and the difference, the largest first; and the number of all pairs.
    """
    pairs = []
    for one, other in combinations(NAMES, 2):
        between = over_seeds(found, lambda f, a=one, b=other: gain(f, "full", a, ORACLE) - gain(f, "full", b, ORACLE))
        if between and len(between.runs) > 1:
            runs = between.runs if between.mean >= 0 else [-run for run in between.runs]
            pairs.append(((one, other) if between.mean >= 0 else (other, one), Interval.over(runs)))
    corrected = holm([p_value(between.runs) for _, between in pairs])
    sure = [(*names, between) for (names, between), p in zip(pairs, corrected) if p <= LEVEL]
    return sorted(sure, key=lambda row: -row[2].mean), len(pairs)


def difference_table(found: Seeds) -> str:
    """The differences that are decided.

    Args:
        found: Findings by seed.
    """
    rows = [[NAMES[one], NAMES[other], f"{d.mean:.2f} ± {d.half:.2f}"] for one, other, d in decided(found)[0]]
    return markdown_table(["above", "below", "by"], rows) if rows else "None is."


def against_table(found: Seeds) -> str:
    """Every algorithm's gain minus that of :data:`AGAINST` at the same share of the budget, by the oracle.

    Args:
        found: Findings by seed.
    """
    rows = []
    for name, words in NAMES.items():
        cells = [
            text(found, lambda f, n=name, s=share: gain(f, s, n, ORACLE) - gain(f, s, AGAINST, ORACLE))
            for share in SHARES
        ]
        rows += [[words, *cells]] if name != AGAINST else []
    best = text(found, lambda f: chosen_of(f, 8) - gain(f, "full", AGAINST, ORACLE))
    rows += [["best of 8 by the reward model", "", "", best]] if best != "-" else []
    return markdown_table(["algorithm", *SHARES], rows)


def hack_table(found: Seeds) -> str:
    """How far own reward and oracle part, and from where on the one rises while the other falls.

    Args:
        found: Findings by seed.
    """
    rows = []
    for name, words in NAMES.items():
        at = hacked(found, name)
        if name == "nrg" or not at:
            continue
        apart = text(found, lambda f, n=name: gain(f, "full", n, "own") - gain(f, "full", n, ORACLE))
        held = text(found, lambda f, n=name: gain(f, "full", n, HELD) - gain(f, "full", n, ORACLE))
        counts = Counter(share for share in at.values() if share)
        rows.append([words, apart, held, *(f"{counts[share]} of {len(at)}" for share in SHARES)])
    head = ["algorithm", "own gain minus the oracle's, full", f"{HELD}'s minus the oracle's"]
    return markdown_table([*head, *(f"first hacks at {share}, seeds" for share in SHARES)], rows)


def hacked(found: Seeds, name: str) -> dict[int, str | None]:
    """By seed the share at which an algorithm first hacks its own reward, or None; seeds without it are left out.

    Args:
        found: Findings by seed.
        name: Name of the algorithm.
    """
    return _each(found, lambda f: hacks_at(f, name))


def _each(found: Seeds, of: Callable[[Any], Any]) -> dict[int, Any]:
    known = {}
    for seed, one in found.items():
        try:
            known[seed] = of(one)
        except KeyError:
            continue
    return known


def picks(found: Seeds, name: str, judge: str) -> dict[int, tuple[str, float]]:
    """By seed the place that a judge would have picked of an algorithm's curve, and what it loses by the oracle.

    Args:
        found: Findings by seed.
        name: Name of the algorithm.
        judge: One of the comparison's judges, or ``own``.
    """
    return _each(found, lambda f: picked(f, name, judge))


def pick_table(found: Seeds) -> str:
    """Which checkpoint each judge would have picked, and what that loses by the oracle.

    Args:
        found: Findings by seed.
    """
    rows = []
    for name in RECIPES:
        cells = []
        for judge in (HELD, "own"):
            every = picks(found, name, judge)
            counts = Counter(place for place, _ in every.values())
            places = ", ".join(f"{share} {counts[share]}" for share in (BASE, *SHARES) if counts[share])
            cells += [places or "-", _mean([lost for _, lost in every.values()])]
        last = text(found, lambda f, n=name: _last(f, n)).removeprefix("+")
        rows.append([NAMES[name], *cells, last])
    head = ["algorithm", f"the {HELD}'s pick, seeds", "it loses", "the own reward's pick, seeds", "it loses"]
    return markdown_table([*head, "the last checkpoint loses"], rows)


def _last(found: Any, name: str) -> float:
    """What the last checkpoint loses by the oracle."""
    return max(gain(found, share, name, ORACLE) for share in (BASE, *SHARES)) - gain(found, "full", name, ORACLE)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    interval = Interval.over(values)
    return f"{interval.mean:.2f}" + (f" ± {interval.half:.2f}" if len(values) > 1 else "")


def judge_line(found: Seeds) -> str:
    """Accuracies of both judges on generated clips of unseen prompts; empty where they are not known."""
    parts = []
    for name, words in zip(BENCHED, ("the judge that is trained against", f"the {HELD}")):
        columns = (*DIMENSIONS, "Overall")
        means = [over_seeds(found, lambda f, n=name, c=c: f["judges"][n]["generated"][c][KINDS[0]]) for c in columns]
        if all(means):
            parts.append(f"{words} {', '.join(f'{c} {mean.mean:.2f}' for c, mean in zip(columns, means))}")
    return "; ".join(parts)
