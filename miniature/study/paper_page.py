"""The page of `videoalign paper`: RESULTS.md with its figures, and the numbers behind them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...callbacks.plots import save_png
from ...models.dimensions import DIMENSIONS
from ...models.files import write_json, write_text
from ...models.intervals import student
from .loop_size import LoopSize
from .pages import render
from .paper_figures import cell_figure
from .paper_findings import FIGURES, WORDS, earlier, findings, joined, verdicts
from .paper_tables import Seeds, cell_tables, claim_table, mean_text, trials_table

CELLS = {
    "a": "Losses and tokens of the reward model (Table 6)",
    "b": "Accuracy over the share of training pairs (Figure 2)",
    "c": "Do rewards change with the prompt? (section 3.2)",
    "d": "SFT, Flow-RWR and Flow-DPO (Table 3)",
    "e": "Text alignment alone (Table 4)",
    "f": "Sweep of beta, text alignment alone (Figure 6)",
    "g": "Flow-NRG: weights and strengths, noisy and clean rewards, best-of-N (Table 5; Table 7 of v1)",
    "h": "Adapters against full training (section 5.2)",
    "i": "Under which conditions the order of the algorithms holds",
    "j": "Does a judge of rendered clips judge generated ones?",
    "l": "From which rater bias on do comparisons teach more than scores?",
}
"""Titles of the page's parts, by their letters."""


def write_page(out: Path, seeds: Iterable[int], size: LoopSize) -> dict[str, Any]:
    """Write ``OUT/RESULTS.md``, ``OUT/docs/results/*.png`` and ``results.json`` from the cells that are finished.

    Args:
        out: Folder of `videoalign paper`.
        seeds: Seeds whose folders are read; other seeds that ``results.json`` holds stay on the page.
        size: Sizes of all of them.

    Returns:
        What is saved as ``results.json``.
    """
    known = {int(seed): found for seed, found in earlier(out, size).get("seeds", {}).items()}
    read = {seed: joined(known.get(seed, {}), findings(out, seed)) for seed in seeds}
    found = dict(sorted({**known, **read}.items()))
    rows = verdicts(found)
    if not rows:
        raise VideoAlignError(f"{out} holds no finished cell yet")
    tuned = next((one["tuned"] for one in found.values() if "tuned" in one), None)
    results = {"size": asdict(size), "tuned": tuned, "seeds": found, "verdicts": rows}
    write_json(out / FIGURES / "results.json", results)
    most = max(len(row["values"]) for row in rows)
    page = render(
        "results.md.j2",
        tally=tally(rows),
        most=most,
        reach=student(most) if most > 1 else None,
        folder=FIGURES,
        trials=trials_table(tuned),
        oracle=_oracle(found),
        cells=_cells(out / FIGURES, found, rows),
    )
    write_text(out / "RESULTS.md", page)
    print(f"\n{tally(rows)}")
    print(f"results   {out / 'RESULTS.md'}\nnumbers   {out / FIGURES / 'results.json'}")
    return results


def _cells(folder: Path, found: Seeds, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of the page on which any seed has a claim; draws their figures."""
    tables, cells = cell_tables(found), []
    for letter, title in CELLS.items():
        own = [row for row in rows if row["cell"] == letter]
        if not own:
            continue
        if figure := cell_figure(letter, found):
            save_png(figure, folder / f"{letter}.png")
        cells.append(
            {
                "letter": letter,
                "title": title,
                "seeds": max(len(row["values"]) for row in own),
                "figure": figure is not None,
                "table": tables.get(letter),
                "claims": claim_table(own),
            }
        )
    return cells


def tally(rows: Sequence[dict[str, Any]]) -> str:
    """How many claims have each verdict, the paper's claims and our own questions.

    Args:
        rows: What :func:`.paper_findings.verdicts` returns.
    """

    def counts(paper: bool) -> tuple[int, str]:
        own = [row["verdict"] for row in rows if bool(row["paper"]) == paper]
        words = (*WORDS[paper], "undecided")
        return len(own), ", ".join(f"{sum(v.startswith(word) for v in own)} {word}" for word in words)

    return "{} claims of the paper ({}) and {} of our own ({})".format(*counts(True), *counts(False))


def _oracle(found: Seeds) -> str:
    """Rank correlations of the oracle with the truth, by where they were measured."""
    first = next((one for one in found.values() if "oracle" in one), {})
    parts = []
    for where in first.get("oracle", {}):
        each = (f"{d} {mean_text(found, lambda f, w=where, d=d: f['oracle'][w][d])}" for d in DIMENSIONS)
        parts.append(f"{where} {', '.join(each)}")
    return "; ".join(parts)
