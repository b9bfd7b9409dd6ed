"""Claims about guidance by a reward on noisy latents: cell (g)."""

from collections.abc import Callable

from ...models.dimensions import DIMENSIONS
from ...models.published import TABLE_5, TABLE_7_OF_V1
from .paper_claims import CLAIMED, COUNTED, ORACLE, STRENGTHS, Claim, Found, Value, less, side_by_side, wins

TUNED_STRENGTH = "the strength that tuning chose"
AtStrength = Callable[[float], Value]
"""Gives a number of a seed by the strength of guidance."""


def claims() -> list[Claim]:
    """All claims of this file."""
    return [*_guided(), *_against_best_of_n()]


def at_tuned(of: AtStrength) -> Value:
    """A number at the strength that tuning chose.

    Args:
        of: Gives the number by strength.
    """

    def value(found: Found) -> float:
        return of(found["tuned"]["nrg"]["strength"])(found)

    return value


def _statements(judge: str) -> list[tuple[str, str, str, AtStrength, str]]:
    """Family, statement, the paper's numbers, the number by strength, and the dimension."""
    ta, vq_mq = TABLE_5[0, 0, 1], TABLE_5[0.5, 0.5, 0]
    noisy, clean = TABLE_7_OF_V1["noisy"][1], TABLE_7_OF_V1["clean"][1]

    def won(name: str, d: str) -> AtStrength:
        return lambda strength: wins("nrg", f"{name}@{strength:g}", judge, d)

    def raises(name: str, d: str, sign: int = 1) -> AtStrength:
        of = won(name, d)
        return lambda s: less(of(s), 0.5) if sign > 0 else less(0.5, of(s))

    def lead(first: str, second: str, d: str) -> AtStrength:
        return lambda s: less(won(first, d)(s), won(second, d)(s))

    found = [
        ("Table 5", f"guidance by VQ and MQ alike raises {d}", f"{vq_mq[place]:.2f} / 50", raises("vq-mq", d), d)
        for place, d in enumerate(DIMENSIONS[:2])
    ]
    return [
        ("Table 5", "guidance by TA alone raises TA", f"{ta[2]:.2f} / 50", raises("ta", "TA"), "TA"),
        *found,
        ("Table 5", "guidance by VQ and MQ alike costs TA", f"{vq_mq[2]:.2f} / 50", raises("vq-mq", "TA", -1), "TA"),
        (
            "Table 5", "guidance by TA alone gives more TA than guidance by VQ and MQ alike",
            side_by_side(ta[2], vq_mq[2]), lead("ta", "vq-mq", "TA"), "TA",
        ),
        (
            "Table 7 of version 1", "guidance by MQ alone, noisy reward, raises MQ",
            f"{noisy:.1f} / 50 (TA-Hard)", raises("mq", "MQ"), "MQ",
        ),
        (
            "Table 7 of version 1", "guidance by MQ alone, noisy reward above clean reward, MQ",
            f"{side_by_side(noisy, clean, digits=1)} (TA-Hard)", lead("mq", "clean-mq", "MQ"), "MQ",
        ),
    ]  # fmt: skip


def _guided() -> list[Claim]:
    rows = []
    for judge, (_, by) in COUNTED.items():
        for family, statement, paper, of, d in _statements(judge):
            text = f"{statement}, {TUNED_STRENGTH}, {by}"
            rows.append(Claim("g", text, paper, at_tuned(of), family, statement, judge == ORACLE, d))
            for strength in CLAIMED:
                text = f"{statement}, strength {strength:g}, {by}"
                point = f"strength {strength:g}" if judge == ORACLE else ""
                rows.append(Claim("g", text, paper, of(strength), family, statement, False, d, point))
    return rows


def _against_best_of_n() -> list[Claim]:
    def ahead(strength: float) -> Value:
        return lambda found: found["nrg"]["arms"][f"even@{strength:g}"]["best_of"]["difference"]

    statement, family = "even weights above best-of-N of the same cost (oracle's sum)", "our own: best-of-N"
    return [
        Claim("g", f"{statement}, {TUNED_STRENGTH}", "", at_tuned(ahead), family, statement, rate=False),
        *(
            Claim(
                "g",
                f"{statement}, strength {s:g}",
                "",
                ahead(s),
                family,
                statement,
                False,
                "",
                f"strength {s:g}",
                False,
            )
            for s in STRENGTHS[1:]
        ),
    ]
