"""What the numbers of `videoalign study on-policy` say, in sentences: who wins at which budget, who hacks first, and
what a held-out judge would have told.
"""

from collections import Counter
from itertools import pairwise

from ...models.intervals import Interval
from .paper_claims import ORACLE
from .paper_findings import Seeds, over_seeds
from .policy_findings import FALL, NAMES, curve, gain
from .policy_recipes import RECIPES
from .policy_size import SHARES
from .policy_tables import decided, hacked, picks
from .policy_units import HELD

WORDS = {"quarter": "a quarter of the budget", "half": "half of the budget", "full": "the whole budget"}


def reading(found: Seeds) -> list[str]:
    """Sentences, those that need a comparison which is not finished left out.

    Args:
        found: Findings by seed.
    """
    winners = (_winner(found, share) for share in SHARES)
    lines = (*winners, _decided(found), _raised(found), _hacking(found), _held(found), _alarm(found))
    return [line for line in lines if line]


def _number(interval: Interval) -> str:
    return f"{interval.mean:+.2f}" + (f" ± {interval.half:.2f}" if len(interval.runs) > 1 else "")


def _winner(found: Seeds, share: str) -> str:
    gains = {name: over_seeds(found, lambda f, n=name: gain(f, share, n, ORACLE)) for name in NAMES}
    if share != "full":
        gains.pop("nrg", None)
    known = sorted((name for name, one in gains.items() if one), key=lambda name: -gains[name].mean)
    if len(known) < 2:
        return ""
    first, second = known[:2]
    lead = over_seeds(found, lambda f: gain(f, share, first, ORACLE) - gain(f, share, second, ORACLE))
    decided = "" if lead.low > 0 else ", which these seeds do not decide"
    last = f"{NAMES[known[-1]]} gains least ({_number(gains[known[-1]])})"
    return (
        f"**At {WORDS[share]}** {NAMES[first]} gains most by the oracle ({_number(gains[first])} deviations of the "
        f"base), {_number(lead).removeprefix('+')} more than {NAMES[second]}{decided}; {last}."
    )


def _decided(found: Seeds) -> str:
    """How many pairs of algorithms differ for certain."""
    sure, every = decided(found)
    if not every:
        return ""
    below = Counter(NAMES[other] for _, other, _ in sure)
    said = f"**Of {every} pairs of algorithms {len(sure)} are decided** at {WORDS['full']} by the oracle, after a "
    said += "correction for all pairs (Holm)"
    lower = ", ".join(f"{name} is below {n} other{'s' if n > 1 else ''}" for name, n in below.most_common())
    return f"{said}: {lower}." if sure else f"{said}."


def _raised(found: Seeds) -> str:
    """Whether each algorithm raises its own reward."""
    own = {name: over_seeds(found, lambda f, n=name: gain(f, "full", n, "own")) for name in NAMES}
    own = {name: one for name, one in own.items() if one}
    up = [name for name, one in own.items() if one.low > 0]
    rest = [f"{NAMES[name]} {_number(one)}" for name, one in own.items() if name not in up]
    if not own or len(next(iter(own.values())).runs) < 2:
        return ""
    said = f"{len(up)} of {len(own)} algorithms raise their own reward, each with an interval above 0"
    return f"{said}." if not rest else f"{said}; the others: {', '.join(rest)}."


def _hacking(found: Seeds) -> str:
    """Who hacks first."""
    at = {name: hacked(found, name) for name in NAMES if name != "nrg"}
    at = {name: every for name, every in at.items() if every}
    if not at:
        return ""
    order = list(SHARES)
    firsts = {name: [order.index(s) for s in every.values() if s] for name, every in at.items()}
    some = {name: places for name, places in firsts.items() if places}
    if not some:
        return "**Nobody hacks** at these budgets: nowhere does an own reward rise on while the oracle falls."
    # of most seeds, and among equally many the earliest
    first = min(some, key=lambda name: (-len(some[name]), sum(some[name]) / len(some[name])))
    never = [NAMES[name] for name, places in firsts.items() if not places]
    said = (
        f"**{NAMES[first]} hacks most**: in {len(some[first])} of {len(at[first])} seeds its own reward rises on while "
        f"the oracle falls, first at {WORDS[order[min(some[first])]]}."
    )
    earliest = min(min(places) for places in some.values())
    who = [NAMES[name] for name, places in some.items() if min(places) == earliest]
    said += f" At {WORDS[order[earliest]]}, the first place at which any seed hacks, it is {', '.join(who)}."
    return said + (f" Never: {', '.join(never)}." if never else "")


def _held(found: Seeds) -> str:
    """What a checkpoint costs that is picked by each judge."""
    lost = {}
    for judge in (HELD, "own"):
        of = {seed: [] for seed in found}
        for name in RECIPES:
            for seed, (_, one) in picks(found, name, judge).items():
                of[seed].append(one)
        lost[judge] = [sum(values) / len(values) for values in of.values() if values]
    last = [[max(curve(f, n, ORACLE).values()) - gain(f, "full", n, ORACLE) for n in RECIPES] for f in _whole(found)]
    if not lost[HELD] or not last:
        return ""
    own, held, end = (Interval.over(v) for v in (lost["own"], lost[HELD], [sum(v) / len(v) for v in last]))
    return (
        f"**A {HELD} that picks the checkpoint** loses {_number(held).removeprefix('+')} by the oracle against the "
        f"best checkpoint, in the mean over the algorithms that train; picking by the own reward loses "
        f"{_number(own).removeprefix('+')}, and taking the last one {_number(end).removeprefix('+')}."
    )


def _whole(found: Seeds) -> list:
    """Seeds that have all comparisons."""
    return [one for one in found.values() if set(SHARES) <= {*one.get("compared", {})}]


def _alarm(found: Seeds) -> str:
    """Whether the held-out judge falls where the oracle does, each by more than :data:`FALL`."""
    cases = {(False, False): 0, (False, True): 0, (True, False): 0, (True, True): 0}
    for one in _whole(found):
        for name in RECIPES:
            held, true = (list(curve(one, name, judge).values()) for judge in (HELD, ORACLE))
            for (h0, h1), (t0, t1) in zip(pairwise(held), pairwise(true)):
                cases[t0 - t1 > FALL, h0 - h1 > FALL] += 1
    falls, rises = cases[True, True] + cases[True, False], cases[False, True] + cases[False, False]
    if not falls + rises:
        return ""
    said = f"From one place of a curve to the next the oracle falls by more than {FALL:g} deviations in {falls} "
    said += f"of {falls + rises} cases. "
    if falls:
        said += f"The {HELD} falls too in {cases[True, True]} of these {falls}, "
    return said + f"and it falls as far in {cases[False, True]} of the {rises} others."
