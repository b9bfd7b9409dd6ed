"""Verdicts over seeds: each claim with its interval, each finding decided once, families of findings corrected.

A finding is decided by its primary row (:class:`.paper_claims.Claim`): by Student's t-test over seeds that its mean is
0, corrected within its family by Holm's method at 5 %. A family is one question that is asked of several things, such
as what each algorithm of Table 3 changes against the base, or which of them is better. All findings of a family count
in the correction, those without any result too, so that a verdict does not depend on which cells were finished first.
Secondary rows have an interval and no verdict of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...models.evidence import Spread, false_decisions, holm, p_value, runs_needed
from ...models.intervals import Interval
from .paper_cells import CLAIMS
from .paper_claims import Claim
from .paper_findings import COMPARISONS, Seeds, halved, value_of

WORDS = {True: ("reproduced", "not reproduced"), False: ("confirmed", "refuted")}
"""Verdicts on findings of the paper, and on questions of our own."""
UNDECIDED = "undecided"
LEVEL = 0.05
"""Level of each family, and of tests in computations of power."""
DIFFERENCE = 0.05
"""Difference of two rates that the study is to decide."""
Row = dict[str, Any]
"""A claim's numbers, as JSON."""
Decided = Mapping[tuple[str, str], Row]
"""Primary rows by family and statement."""


def verdicts(found: Seeds, claims: Sequence[Claim] = CLAIMS) -> list[Row]:
    """Every claim on which any seed has a number, with its interval; primary rows with the finding's verdict.

    Args:
        found: Findings by seed.
        claims: The claims, with exactly one primary row for each finding.
    """
    rows = {claim: row for claim in claims if (row := _row(claim, found))}
    families: dict[str, list[Claim]] = {}
    for claim in claims:
        if claim.primary:
            families.setdefault(claim.finding[0], []).append(claim)
    for family in families.values():
        adjusted = holm([rows[claim]["p"] if claim in rows else 1.0 for claim in family])
        for claim, value in zip(family, adjusted):
            if row := rows.get(claim):
                row["adjusted"] = value
                row["verdict"] = _verdict(row)
                if claim.rate and len(row["values"]) > 1:
                    row["power"] = _power(claim, found, len(family))
    return list(rows.values())


def _row(claim: Claim, found: Seeds) -> Row | None:
    values = [value for one in found.values() if (value := value_of(one, claim.of)) is not None]
    if not values:
        return None
    interval, (family, statement) = Interval.over(values), claim.finding
    return {
        "cell": claim.cell,
        "claim": claim.text,
        "paper": claim.paper,
        "family": family,
        "statement": statement,
        "primary": claim.primary,
        "dimension": claim.dimension,
        "point": claim.point,
        "rate": claim.rate,
        "values": values,
        "mean": interval.mean,
        "half": interval.half,
        "p": p_value(values),
        "alone": interval.verdict(("yes", "no")).split(" ")[0],
        "verdict": "",
    }


def _verdict(row: Row) -> str:
    """A finding's verdict after the correction; undecided ones say what is known all the same."""
    if row["adjusted"] <= LEVEL:
        return WORDS[bool(row["paper"])][row["mean"] < 0]
    known = [f"{sum(value > 0 for value in row['values'])} of {len(row['values'])} seeds for it"]
    if row["p"] <= LEVEL:
        known.append("decided but for the correction")
    if row["rate"] and abs(row["mean"]) + row["half"] < DIFFERENCE:
        known.append(f"less than {DIFFERENCE:g} either way")
    return f"{UNDECIDED} ({'; '.join(known)})"


# --- power --------------------------------------------------------------------------------------------------------


def _power(claim: Claim, found: Seeds, tests: int) -> Row:
    """Variance of a finding's number over seeds, in its two parts, and the seeds that would decide a difference.

    Args:
        claim: The finding's primary row.
        found: Findings by seed.
        tests: Number of findings in its family.
    """
    values, halves = [], []
    for one in found.values():
        if (value := value_of(one, claim.of)) is None:
            continue
        values.append(value)
        both = [value_of(halved(one, half), claim.of) for half in range(2)]
        if None not in both:
            halves.append((both[0], both[1]))
    known = halves if len(halves) == len(values) else []
    spread = Spread.of(values, known, judged_videos(found) if known else 1)
    deviation = spread.deviation()
    return {
        **asdict(spread),
        "deviation": deviation,
        "split": bool(known),
        "seeds": runs_needed(deviation, DIFFERENCE, LEVEL),
        "seeds in family": runs_needed(deviation, DIFFERENCE, LEVEL / tests),
    }


def judged_videos(found: Seeds) -> int:
    """Videos of an arm that each seed's comparisons judge; 1 where no comparison says it."""
    sizes = (one[cell] for one in found.values() for cell in COMPARISONS if cell in one)
    return next((size["prompts"] * size["samples"] for size in sizes if "prompts" in size), 1)


# --- the whole ----------------------------------------------------------------------------------------------------


def decided(rows: Sequence[Row]) -> Decided:
    """The findings: primary rows by family and statement.

    Args:
        rows: What :func:`verdicts` returns.
    """
    return {(row["family"], row["statement"]): row for row in rows if row["primary"]}


def tally(rows: Sequence[Row]) -> str:
    """How many findings have each verdict, those of the paper and our own.

    Args:
        rows: What :func:`verdicts` returns.
    """

    def counts(paper: bool) -> tuple[int, str]:
        own = [row["verdict"] for row in decided(rows).values() if bool(row["paper"]) == paper]
        words = (*WORDS[paper], UNDECIDED)
        return len(own), ", ".join(f"{sum(v.startswith(word) for v in own)} {word}" for word in words)

    return "{} findings of the paper ({}) and {} of our own ({})".format(*counts(True), *counts(False))


def by_chance(rows: Sequence[Row]) -> str:
    """What chance alone would give, were nothing true: false decisions, and signs that agree with the paper.

    Args:
        rows: What :func:`verdicts` returns.
    """
    findings = decided(rows).values()
    sizes: dict[str, int] = {}
    for claim in CLAIMS:
        if claim.primary:
            sizes[claim.finding[0]] = sizes.get(claim.finding[0], 0) + 1
    families = {row["family"] for row in findings}
    expected = sum(false_decisions(sizes.get(family, 1), LEVEL) for family in families)
    paper = [row for row in findings if row["paper"]]
    agree = sum(row["mean"] > 0 for row in paper)
    return (
        f"Were nothing true, {expected:.1f} of {len(findings)} findings would be decided by chance after the "
        f"correction (in at most {LEVEL * len(families):.1f} of {len(families)} families), "
        f"{LEVEL * len(findings):.1f} without it. Of {len(paper)} findings of the paper {agree} have its sign; chance "
        f"alone would give {len(paper) / 2:g}."
    )
