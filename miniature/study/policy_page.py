"""The page of `videoalign study on-policy`: ON_POLICY.md with its figures, and the numbers behind them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...models.files import write_json
from .loop_size import LoopSize
from .policy_findings import FIGURES, earlier, findings, results_of
from .policy_size import PolicySize


def write_page(out: Path, seeds: Iterable[int], size: LoopSize, policies: PolicySize) -> dict[str, Any]:
    """Write ``OUT/ON_POLICY.md``, its figures and ``results.json`` from the comparisons that are finished.

    Args:
        out: Folder of all results.
        seeds: Seeds whose folders are read; other seeds that ``results.json`` holds stay on the page.
        size: How much the loop trains and samples.
        policies: Budget and sizes of the study.

    Returns:
        What is saved as ``results.json``.
    """
    known = {int(seed): found for seed, found in earlier(out, size, policies).get("seeds", {}).items()}
    read = {seed: known.get(seed, {}) | findings(out, seed) for seed in seeds}
    found = {seed: one for seed, one in {**known, **read}.items() if one.get("compared")}
    if not found:
        raise VideoAlignError(f"{out} holds no finished comparison yet")
    results = results_of(out, found, size, policies)
    write_json(out / FIGURES / "results.json", results)
    return results
