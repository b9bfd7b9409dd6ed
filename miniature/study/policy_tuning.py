"""Settings of `videoalign study on-policy`: chosen on seeds that are not reported, by what the reward model prefers.

Every algorithm with a setting has four trials at the whole budget: a learning rate, or the strength of a search.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ... import VideoAlignError
from ...models.dimensions import OVERALL
from ...models.files import read_json, write_json
from .paper_claims import ORACLE, OTHER, RM
from .policy_recipes import RECIPES, Values
from .policy_searches import trials
from .policy_size import PolicySize
from .policy_units import PLACE
from .tuning_rounds import TUNING_SEEDS, Trial, choice, tuning_place
from .units import Unit

TUNED, TRIED = f"{PLACE}/tuned.json", f"{PLACE}/trials.json"
"""The chosen settings by algorithm, and all trials with their numbers by seed."""


def grid(size: PolicySize) -> dict[str, list[Values]]:
    """Settings that are tried, by algorithm.

    Args:
        size: Budget and sizes.
    """
    rates = {name: [{"lr": rate} for rate in recipe.rates] for name, recipe in RECIPES.items()}
    return rates | {name: [values for values, _ in tried] for name, tried in trials(size).items()}


def compared(seed: int) -> str:
    """Name of the comparison of a tuning seed's trials."""
    return f"{tuning_place(seed)}/{PLACE}/trials/compared/comparison.json"


def choose(out: Path, size: PolicySize) -> None:
    """Write the chosen settings, and all trials.

    Args:
        out: Folder of all results.
        size: Budget and sizes.
    """
    found = [(path, read_json(path, "a comparison")["arms"]) for path in (out / compared(s) for s in TUNING_SEEDS)]
    tried = {
        name: [
            Trial(values, *(tuple(_liked(*one, f"{name}-{number}", judge) for one in found) for judge in (RM, ORACLE)))
            for number, values in enumerate(every)
        ]
        for name, every in grid(size).items()
    }
    numbers = {name: [asdict(one) for one in every] for name, every in tried.items()}
    write_json(out / TRIED, {"seeds": TUNING_SEEDS, "trials": numbers})
    write_json(out / TUNED, {name: choice(every).values for name, every in tried.items()})


def _liked(path: Path, arms: Mapping, name: str, judge: str) -> float:
    if name not in arms:
        raise VideoAlignError(f"{path} has no trial {name}: it was begun with other trials; name another --out")
    return arms[name]["against_base"][judge][OVERALL][OTHER]


def choosing(out: Path, size: PolicySize) -> Unit:
    """The unit that chooses.

    Args:
        out: Folder of all results.
        size: Budget and sizes.
    """
    needs = tuple(compared(seed) for seed in TUNING_SEEDS)
    return Unit(TUNED, "choosing settings of the on-policy study", partial(choose, out, size), needs, 1)
