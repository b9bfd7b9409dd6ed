"""What seeds of `videoalign study on-policy` found, as numbers: gains over the base by each judge, over cost.

A *gain* is the difference of an arm's mean rating to the base's, in standard deviations of the base's own videos: so
judges with different units are on one scale. A training's *places* are the base (nothing spent) and its checkpoints.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...commands.comparison import OWN_VIEW
from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.files import read_json
from .loop_size import LoopSize
from .paper_claims import ORACLE, OTHER, RM, Found
from .paper_findings import bare
from .policy_recipes import RECIPES
from .policy_searches import PLAIN, WAYS
from .policy_size import SHARES, PolicySize
from .policy_tuning import TRIED, TUNED
from .policy_units import BENCHED, HELD, PLACE
from .step_exports import COUNTED

FIGURES = "docs/results/on_policy"
"""Folder of the figures and of ``results.json``."""
COLUMNS = (*DIMENSIONS, OVERALL)
NAMES = {**{name: recipe.text for name, recipe in RECIPES.items()}, **{name: way.text for name, way in WAYS.items()}}
"""All algorithms by name, as people call them."""
OWN = {**{name: recipe.own for name, recipe in RECIPES.items()}, **dict.fromkeys(WAYS, OWN_VIEW)}
"""Whose ratings are the own reward of each."""
BASE = "base"
FALL = 0.1
"""Gain that must be lost before a fall counts: about the noise of a mean over 128 videos, in deviations."""
JUDGES = ("own", HELD, ORACLE)
"""Judges of the page: the one that an algorithm is trained against, one that nothing is, and the truth."""


def findings(out: Path, seed: int) -> Found:
    """Everything that one seed's folder holds by now.

    Args:
        out: Folder of all results.
        seed: The seed.
    """
    place, found = out / f"seed{seed}" / PLACE, {}
    for share in SHARES:
        if (path := place / "compared" / share / "comparison.json").exists():
            compared = bare(read_json(path, "a comparison"))
            kept = {"arms", "prompts", "samples", "best_of", "chosen_by"}
            found.setdefault("compared", {})[share] = {key: compared[key] for key in kept}
    for name in RECIPES:
        for share in SHARES:
            if (path := place / name / share / COUNTED).exists():
                found.setdefault("counted", {}).setdefault(name, {})[share] = read_json(path, "a training's count")
    for name in BENCHED:
        if (path := place / "bench" / name / "accuracies.json").exists():
            found.setdefault("judges", {})[name] = bare(read_json(path, "accuracies"))
    return found


def earlier(out: Path, size: LoopSize, policies: PolicySize) -> dict[str, Any]:
    """Read a folder's ``results.json``, of this machine or another one; empty where there is no such file.

    Args:
        out: Folder of all results.
        size: How much the loop trains and samples here.
        policies: Budget and sizes here.

    Raises:
        VideoAlignError: Its seeds have other sizes or settings, and cannot be averaged with those of this folder.
    """
    path = out / FIGURES / "results.json"
    if not path.exists():
        return {}
    results = read_json(path, "results")
    own = {"size": asdict(size), "policies": asdict(policies)}
    if (out / TUNED).exists():
        own["tuned"] = read_json(out / TUNED, "settings")
    for name, here in own.items():
        if not isinstance(results, dict) or results.get(name) != json.loads(json.dumps(here)):
            raise VideoAlignError(
                f"{path} holds seeds of another {name}, or none at all; name another --out, or remove it"
            )
    return results


def results_of(out: Path, seeds: Mapping[int, Found], size: LoopSize, policies: PolicySize) -> dict[str, Any]:
    """Everything that is saved as ``results.json``.

    Args:
        out: Folder of all results.
        seeds: Findings by seed.
        size: How much the loop trains and samples.
        policies: Budget and sizes of the study.
    """
    known = {key: read_json(out / name, "settings") for key, name in (("tuned", TUNED), ("trials", TRIED))
             if (out / name).exists()}  # fmt: skip
    return {"size": asdict(size), "policies": asdict(policies), **known, "seeds": dict(sorted(seeds.items()))}


# --- numbers of a seed ------------------------------------------------------------------------------------------------


def gain(found: Found, share: str, name: str, judge: str, column: str = OVERALL) -> float:
    """Gain of an algorithm over the base.

    Args:
        found: Findings of a seed.
        share: Share of the budget, or :data:`BASE`, whose gain is 0.
        name: Name of the algorithm.
        judge: One of the comparison's judges, or ``own``.
        column: Dimension, or Overall.

    Raises:
        KeyError: If the seed does not have it (yet).
    """
    judge = OWN[name] if judge == "own" else judge
    at = "full" if name == "nrg" else share
    arms, full = found["compared"]["full" if share == BASE else at]["arms"], found["compared"]["full"]["arms"]
    start = full[PLAIN] if judge == OWN_VIEW else full[BASE]
    mean, deviation = (start[key][judge][column] for key in ("means", "deviations"))
    arm = start if share == BASE else arms[name]
    return (arm["means"][judge][column] - mean) / max(deviation, 1e-9)


def wins(found: Found, share: str, name: str, judge: str, column: str = OVERALL) -> float:
    """Share of an algorithm's videos that a judge prefers to the base's at other noise.

    Args:
        found: Findings of a seed.
        share: Share of the budget.
        name: Name of the algorithm.
        judge: One of the comparison's judges.
        column: Dimension, or Overall.
    """
    return found["compared"][share]["arms"][name]["against_base"][judge][column][OTHER]


def evaluations(found: Found, name: str, share: str, policies: PolicySize, pool: float) -> float:
    """Counted evaluations of an algorithm: of its training with its pairs, or of a search beyond plain samples.

    Args:
        found: Findings of a seed.
        name: Name of the algorithm.
        share: Share of the budget.
        policies: Budget and sizes.
        pool: Evaluations of the samples that pairs are made of.
    """
    if name in RECIPES:
        own = pool if RECIPES[name].reads == "pairs" else 0.0
        return own + found["counted"][name][share]["evaluations"]
    compared = found["compared"][share]
    each = compared["arms"][name]["evaluations"] - compared["arms"][BASE]["evaluations"]
    return each * compared["prompts"] * compared["samples"]


def curve(found: Found, name: str, judge: str, column: str = OVERALL) -> dict[str, float]:
    """Gains at the base and at each share of the budget.

    Args:
        found: Findings of a seed.
        name: Name of the algorithm.
        judge: One of the comparison's judges, or ``own``.
        column: Dimension, or Overall.
    """
    return {share: gain(found, share, name, judge, column) for share in (BASE, *SHARES)}


def hacks_at(found: Found, name: str) -> str | None:
    """The first share at which the own reward is above an earlier place, and the oracle :data:`FALL` below it.

    Args:
        found: Findings of a seed.
        name: Name of the algorithm.

    Returns:
        The share, or None where the oracle never falls while the own reward rises.
    """
    own, true = (list(curve(found, name, judge).items()) for judge in ("own", ORACLE))
    for place in range(1, len(own)):
        if any(true[i][1] - true[place][1] > FALL and own[place][1] > own[i][1] for i in range(place)):
            return own[place][0]
    return None


def picked(found: Found, name: str, judge: str) -> tuple[str, float]:
    """The place that a judge would have picked, and what that loses by the oracle against the oracle's own pick.

    Args:
        found: Findings of a seed.
        name: Name of the algorithm.
        judge: One of the comparison's judges, or ``own``.
    """
    seen, true = curve(found, name, judge), curve(found, name, ORACLE)
    place = max(seen, key=lambda share: seen[share])
    return place, max(true.values()) - true[place]


def chosen_of(found: Found, count: int, column: str = OVERALL) -> float:
    """Gain by the oracle of the best of some base videos, chosen by the reward model on decoded frames.

    Args:
        found: Findings of a seed.
        count: Number of videos of which one is chosen.
        column: Dimension, or Overall.
    """
    full = found["compared"]["full"]
    if full["chosen_by"] != RM:
        raise KeyError(RM)
    start = full["arms"][BASE]
    return (full["best_of"][str(count)][column] - start["means"][ORACLE][column]) / max(
        start["deviations"][ORACLE][column], 1e-9
    )
