"""Results of seeds: read from their folders, and joined with those of other machines."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...models.files import read_json
from ...models.intervals import Interval
from .loop_size import LoopSize
from .paper_claims import POOLS, Found, Value
from .tuning_rounds import TUNED, TUNING_SEEDS, tuning_place

FIGURES = "docs/results"
"""Folder of the figures and of ``results.json``, beside RESULTS.md."""
FILES = {"prompts": "cells/prompts.json", "outputs": "cells/outputs.json", "oracle": "oracle_check.json"}
"""Files of a seed's folder that are taken whole, by their keys in the findings."""
COMPARISONS = ("aligned", "ta", "beta", "nrg", "conditions")
"""Comparisons of a seed, by the names of their cells."""
Seeds = Mapping[int, Found]
"""Findings by seed."""


def findings(out: Path, seed: int) -> Found:
    """Everything that one seed's folder holds by now, without intervals within the seed.

    Args:
        out: Folder of `videoalign paper`.
        seed: The seed, whose folder is in it; it may be one that settings are chosen on.
    """
    place = out / (tuning_place(seed) if seed in TUNING_SEEDS else f"seed{seed}")
    found: Found = {"reward models": {}, "judges": {}}
    for path in sorted((place / "bench").glob("*/accuracies.json")):
        found["reward models"][path.parent.name] = bare(read_json(path, "a cell"))
    for name in ("reward_rendered", "reward"):
        if (path := place / f"bench_{name}/accuracies.json").exists():
            found["judges"][name] = bare(read_json(path, "a cell"))
    if "reward_rendered" in found["judges"]:
        found["reward models"]["separate"] = found["judges"]["reward_rendered"]
    for key, path in {**{key: place / name for key, name in FILES.items()}, "tuned": out / TUNED}.items():
        if path.exists():
            found[key] = read_json(path, "a cell")
    for name in ("preferred", "preferred_ta", *(f"pairs/{pool}" for pool in POOLS)):
        if (path := place / name / "index.json").exists():
            shards = read_json(path, "a set")["shards"]
            found.setdefault("pairs", {})[name.removeprefix("pairs/")] = sum(shard["samples"] for shard in shards)
    for cell in COMPARISONS:
        if (path := place / f"cells/{cell}/comparison.json").exists():
            found[cell] = bare(read_json(path, "a comparison"))
    return found


def bare(found: Any) -> Any:
    """Nested numbers without the intervals within a seed, to the sixth digit: no difference between seeds is finer."""
    if isinstance(found, dict):
        return {key: bare(value) for key, value in found.items() if "interval" not in key}
    return round(found, 6) if isinstance(found, float) else found


def earlier(out: Path, size: LoopSize) -> dict[str, Any]:
    """Read a folder's ``results.json``, of this machine or another one; empty where there is no such file.

    Args:
        out: Folder of `videoalign paper`.
        size: Sizes of the seeds that are made here.

    Raises:
        VideoAlignError: Its seeds have other sizes or settings, and cannot be averaged with those of this folder.
    """
    path, tuned = out / FIGURES / "results.json", out / TUNED
    if not path.exists():
        return {}
    results = read_json(path, "results")
    if not isinstance(results, dict):
        raise VideoAlignError(f"{path} holds no results; remove it")
    own = {"size": json.loads(json.dumps(asdict(size)))}
    if tuned.exists():
        own["tuned"] = read_json(tuned, "settings")
    for name, here in own.items():
        if here is not None and results.get(name) != here:
            raise VideoAlignError(
                f"{path} holds seeds of another {name} ({results.get(name)}, here {here}); name another --out, or "
                "remove it"
            )
    return results


def joined(known: Found, found: Found) -> Found:
    """Join what is known of a seed with its folder, which may hold less; where both have a number, the folder's counts.

    Args:
        known: Findings of the seed in ``results.json``.
        found: Findings of the seed in its folder.
    """
    both = {
        key: {**known[key], **found[key]}
        for key in ("reward models", "judges", "pairs")
        if key in known and key in found
    }
    return {**known, **found, **both}


def halved(found: Found, half: int) -> Found:
    """A seed's win rates by one half of the noises alone.

    Args:
        found: Findings of the seed.
        half: 0 or 1.

    Returns:
        Findings with these rates in place of those by all noises, and but for the chosen settings nothing else.
    """
    rates = {
        cell: {
            "arms": {
                name: {"against_base": {judge: both[half] for judge, both in arm["halves"].items() if both}}
                for name, arm in found[cell]["arms"].items()
                if "halves" in arm
            }
        }
        for cell in COMPARISONS
        if cell in found
    }
    return {**rates, **{key: found[key] for key in ("tuned",) if key in found}}


def value_of(found: Found, of: Value) -> float | None:
    """A seed's number; None where the seed does not have it, or it is not finite.

    Args:
        found: Findings of the seed.
        of: Reads the number out of them.
    """
    try:
        value = of(found)
    except KeyError:
        return None
    return value if value is not None and math.isfinite(value) else None


def over_seeds(found: Seeds, of: Value) -> Interval | None:
    """A number's interval over the seeds that have it; None where no seed has it.

    Args:
        found: Findings by seed.
        of: Reads the number out of a seed's findings.
    """
    values = [value for one in found.values() if (value := value_of(one, of)) is not None]
    return Interval.over(values) if values else None
