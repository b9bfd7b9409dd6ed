"""The page of `videoalign paper`: RESULTS.md with its figures, and the numbers behind them."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...callbacks.plots import save_png
from ...models.dimensions import DIMENSIONS
from ...models.files import read_json, write_json, write_text
from ...models.intervals import student
from .loop_size import LoopSize
from .pages import render
from .paper_cells import CELLS
from .paper_figures import cell_figure
from .paper_findings import FIGURES, Seeds, earlier, findings, joined
from .paper_power import advice, best_line, costs, design_table, needed_lines, undecided_table
from .paper_reading import judge_line, reading
from .paper_tables import cell_tables, claim_table, mean_text
from .paper_verdicts import Row, by_chance, judged_videos, tally, verdicts
from .tuning_rounds import TRIED, TUNING_SEEDS
from .tuning_tables import tuning_tables, tuning_text


def write_page(out: Path, seeds: Iterable[int], size: LoopSize) -> dict[str, Any]:
    """Write ``OUT/RESULTS.md``, ``OUT/docs/results/*.png`` and ``results.json`` from the cells that are finished.

    Args:
        out: Folder of `videoalign paper`.
        seeds: Seeds whose folders are read; other seeds that ``results.json`` holds stay on the page.
        size: Sizes of all of them.

    Returns:
        What is saved as ``results.json``.
    """
    before = earlier(out, size)
    known = {int(seed): found for seed, found in before.get("seeds", {}).items()}
    read = {seed: joined(known.get(seed, {}), findings(out, seed)) for seed in seeds}
    found = dict(sorted({**known, **read}.items()))
    rows = verdicts(found)
    if not rows:
        raise VideoAlignError(f"{out} holds no finished cell yet")
    results = {
        "size": asdict(size),
        "tuned": next((one["tuned"] for one in found.values() if "tuned" in one), None),
        "trials": read_json(out / TRIED, "trials") if (out / TRIED).exists() else before.get("trials"),
        "tuning seeds": _studied(out, before.get("tuning seeds", {})),
        "seeds": found,
        "verdicts": rows,
    }
    write_json(out / FIGURES / "results.json", results)
    write_text(out / "RESULTS.md", _page(out, results))
    print(f"\n{tally(rows)}\n{by_chance(rows)}")
    print(*needed_lines(rows), advice(rows, max(len(row["values"]) for row in rows)), sep="\n")
    print(f"results   {out / 'RESULTS.md'}\nnumbers   {out / FIGURES / 'results.json'}")
    return results


def _studied(out: Path, known: dict[str, Any]) -> dict[int, Any]:
    """Findings of the seeds that settings are chosen on, where cells study something there."""
    before = {int(seed): found for seed, found in known.items()}
    return {seed: joined(before.get(seed, {}), findings(out, seed)) for seed in TUNING_SEEDS}


def _page(out: Path, results: dict[str, Any]) -> str:
    """The page's text; draws its figures."""
    found, rows = results["seeds"], results["verdicts"]
    most = max(len(row["values"]) for row in rows)
    return render(
        "results.md.j2",
        reading=reading(found, rows),
        questions=reading(found, rows, paper=False),
        judge=judge_line(found),
        tally=tally(rows),
        chance=by_chance(rows),
        most=most,
        reach=student(most) if most > 1 else None,
        folder=FIGURES,
        advice=advice(rows, most),
        undecided=undecided_table(rows),
        designs=design_table(rows),
        videos=judged_videos(found),
        best=best_line(rows, costs(out, found, judged_videos(found))),
        tuning=tuning_text(results["trials"]),
        trials=tuning_tables(results["tuned"], results["trials"]),
        oracle=_oracle(found),
        cells=_cells(out / FIGURES, results),
    )


def _cells(folder: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of the page that have a claim or a table by now; draws their figures."""
    found, rows = results["seeds"], results["verdicts"]
    tables, cells = cell_tables(found, results["tuning seeds"]), []
    for letter, title in CELLS.items():
        own: list[Row] = [row for row in rows if row["cell"] == letter]
        if not own and not tables.get(letter):
            continue
        if figure := cell_figure(letter, found):
            save_png(figure, folder / f"{letter}.png")
        cells.append(
            {
                "letter": letter,
                "title": title,
                "seeds": max((len(row["values"]) for row in own), default=0),
                "figure": figure is not None,
                "table": tables.get(letter),
                "claims": claim_table(own) if own else "",
                "rows": len(own),
            }
        )
    return cells


def _oracle(found: Seeds) -> str:
    """Rank correlations of the oracle with the truth, by where they were measured."""
    first = next((one for one in found.values() if "oracle" in one), {})
    parts = []
    for where in first.get("oracle", {}):
        each = (f"{d} {mean_text(found, lambda f, w=where, d=d: f['oracle'][w][d])}" for d in DIMENSIONS)
        parts.append(f"{where} {', '.join(each)}")
    return "; ".join(parts)
