"""What a comparison of arms shows: tables, the trade-off of guidance, and films of all arms side by side.

Legend: P prompts, N noises of each, columns VQ, MQ, TA and Overall (their sum).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..callbacks import plots
from ..callbacks.run_media import TensorBoardMedia
from ..callbacks.side_clips import enlarge, gif
from ..datamodules.encode_list import clips_of
from ..datamodules.shards import ShardSet
from ..models.dimensions import DIMENSIONS, OVERALL
from ..models.files import write_bytes, write_json, write_text
from ..models.intervals import Interval, mean_interval
from ..models.win_rates import best_of, half_rates, win_rates

COLUMNS = (*DIMENSIONS, OVERALL)
OWN_VIEW = "own view"
"""Name of the ratings by the noisy reward that steers; it is no judge."""
COLOURS = ("#2e7d32", "#4878a8", "#8e5ea2", "#3f9e9e", "#a04848")
"""Colours of the judges in charts, in their order."""


@dataclass
class RatedArm:
    """One arm.

    Attributes:
        ratings: Ratings (P, N, 4) by judge, the first judge first; the noisy reward's under :data:`OWN_VIEW`.
        seconds: Seconds of sampling a video.
        evaluations: Evaluations of the generator's transformer for a video; None for videos of earlier releases.
    """

    ratings: dict[str, Tensor]
    seconds: float
    evaluations: float | None = None


def judges_of(ratings: Iterable[str]) -> list[str]:
    """Those who did not steer, of everyone who rates; the first one says what is better."""
    return [name for name in ratings if name != OWN_VIEW]


def found_of(
    judged: Mapping[str, RatedArm],
    sweeps: Mapping[str, tuple[Mapping[str, float], Sequence[str]]],
    chosen_by: str | None = None,
) -> dict[str, Any]:
    """All numbers of a comparison.

    Args:
        judged: Ratings by arm, the base first.
        sweeps: By name the weights that guidance had, and its arms by ascending strength, the base first.
        chosen_by: The judge that best-of-N chooses by; the first one by default.

    Returns:
        Among the rest, of every arm its rates against the base (:func:`.win_rates`), and by ``halves`` of the noises;
        of the best of n base samples by the judge that chooses, the first judge's means and differences to the base.
    """
    base_name, base = next(iter(judged.items()))
    judges = judges_of(base.ratings)
    judge, chosen_by = judges[0], chosen_by or judges[0]
    chooser = base.ratings[chosen_by][..., 3]
    prompts, samples = chooser.shape
    # Whatever its strength, guidance by one reward is the same work: a median over strengths is less noisy.
    alike = {name: names[1:] for _, names in sweeps.values() for name in names[1:]}
    arms = {}
    for name, arm in judged.items():
        time = median(judged[other].seconds for other in alike.get(name, [name])) / max(base.seconds, 1e-9)
        cost = arm.evaluations / base.evaluations if arm.evaluations and base.evaluations else time
        row: dict[str, Any] = {
            "seconds": arm.seconds,
            "evaluations": arm.evaluations,
            "cost": cost,
            "time": time,
            "means": {j: dict(zip(COLUMNS, r.mean((0, 1)).tolist())) for j, r in arm.ratings.items()},
            "deviations": {
                j: dict(zip(COLUMNS, r.flatten(0, 1).std(0, correction=0).tolist())) for j, r in arm.ratings.items()
            },
        }
        if name != base_name:
            row["against_base"] = {j: win_rates(arm.ratings[j], base.ratings[j]) for j in judges}
            row["halves"] = {j: half_rates(arm.ratings[j], base.ratings[j]) for j in judges}
            row["differences"] = {j: _differences((arm.ratings[j] - base.ratings[j]).mean(1)) for j in judges}
            if cost <= samples:
                draws = max(cost, 1.0)
                rival = best_of(chooser, base.ratings[judge], draws)  # (P, 4)
                gap = arm.ratings[judge].mean(1)[:, 3] - rival[:, 3]
                row["best_of"] = {"draws": draws, **_difference(gap)}
        arms[name] = row
    rivals = {str(n): best_of(chooser, base.ratings[judge], n) for n in range(1, samples + 1)}  # (P, 4) each
    plain = base.ratings[judge].mean(1)  # (P, 4)
    curves = {name: _curve(judged, judge, *sweep) for name, sweep in sweeps.items()}
    return {
        "judge": judge,
        "chosen_by": chosen_by,
        "prompts": prompts,
        "samples": samples,
        "arms": arms,
        "best_of": {n: dict(zip(COLUMNS, best.mean(0).tolist())) for n, best in rivals.items()},
        "best_of_differences": {n: _differences(best - plain) for n, best in rivals.items() if n != "1"},
        "sweeps": curves,
    }


def _difference(values: Tensor) -> dict[str, Any]:
    """Mean of (P,) differences with a 95 % bootstrap interval over prompts."""
    return {"difference": float(values.mean()), "interval": list(mean_interval(values))}


def _differences(values: Tensor) -> dict[str, dict[str, Any]]:
    """Mean differences by column, of (P, 4) means over the noises of a prompt, which are so drawn together."""
    return {column: _difference(values[:, i]) for i, column in enumerate(COLUMNS)}


def _curve(
    judged: Mapping[str, RatedArm], judge: str, weights: Mapping[str, float], names: Sequence[str]
) -> dict[str, Any]:
    """The gains of a sweep as each judge sees them, and where own view and judge part.

    Gains are weighted as the guidance was, over the base, in the base's deviations. Reward hacking begins at the first
    strength above the judge's best at which the own view has risen further, while the judge's fall is outside of its
    95 % interval.
    """
    base = judged[names[0]]
    weight = torch.tensor([weights.get(d, 0.0) for d in DIMENSIONS], dtype=torch.float64)

    def gain(name: str, judge: str) -> Tensor:
        """Gains (P, N). Where all base videos are alike, a dimension has no deviation to measure in: it is left out."""
        spread = base.ratings[judge][..., :3].flatten(0, 1).std(0)  # (3,)
        scale = torch.where(spread > 1e-6, weight / spread.clamp(min=1e-6), 0.0)
        return (judged[name].ratings[judge] - base.ratings[judge])[..., :3] @ scale / weight.abs().sum().clamp(min=1e-9)

    views = {j: torch.stack([gain(name, j) for name in names]) for j in base.ratings}  # (strengths, P, N)
    means = {j: view.mean((1, 2)).tolist() for j, view in views.items()}
    best, own = int(views[judge].mean((1, 2)).argmax()), means.get(OWN_VIEW)
    hacked = None
    for i in range(best + 1, len(names)):
        fall = _difference((views[judge][i] - views[judge][best]).mean(1))
        if fall["interval"][1] < 0 and own and own[i] > own[best]:
            hacked = i
            break
    strengths = [0.0, *(float(name.rpartition("@")[2]) for name in names[1:])]
    return {
        "weights": dict(weights),
        "strengths": strengths,
        "gains": means,
        "best": strengths[best],
        "stay_under": None if hacked is None else strengths[hacked],
    }


# --- for people -----------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """All arms as a Markdown table, and the sweeps' best and hacked strengths as sentences."""
    judges = judges_of(next(iter(found["arms"].values()))["means"])
    head = [
        "arm",
        *(f"{j}: {c}" for j in judges for c in COLUMNS),
        *(f"wins, same noise ({j})" for j in judges),
        *(f"wins, other noise ({j})" for j in judges),
        OWN_VIEW,
        "cost",
        "time",
        "minus best-of-cost",
    ]
    rows = [_cells(name, row, judges) for name, row in found["arms"].items()]
    for number, row in found["best_of"].items():
        if number != "1":
            means = [f"{row[c]:.3f}" if j == found["judge"] else "" for j in judges for c in COLUMNS]
            rows.append([f"best of {number}", *means, *[""] * (2 * len(judges) + 1), number, "", ""])
    explained = (
        f"{found['prompts']} prompts, {found['samples']} noises each. Cost: evaluations of the transformer against the "
        "base's, a pass of the noisy reward being its share of the blocks, and three times that with a gradient "
        "(scoring for best-of-N is not counted). Time: seconds of sampling against the base's. Minus best-of-cost: "
        f"what the {found['judge']} gives beyond choosing among that many base samples by the "
        f"{found['chosen_by']}, with a 95 % interval over prompts."
    )
    advice = [_advice(name, curve, found["judge"]) for name, curve in found["sweeps"].items()]
    return "\n".join([plots.markdown_table(head, rows), "", explained, "", *advice])


def _cells(name: str, row: dict[str, Any], judges: Sequence[str]) -> list[str]:
    """An arm's row of the table."""
    against, own, rival = row.get("against_base"), row["means"].get(OWN_VIEW), row.get("best_of")
    cells = [name, *(f"{row['means'][j][c]:.3f}" for j in judges for c in COLUMNS)]
    for kind in ("win_rate", "superiority"):
        cells += [f"{against[j][OVERALL][kind]:.3f}" if against else "" for j in judges]
    cells += [f"{own[OVERALL]:+.2f}" if own else "", f"{row['cost']:.2f}", f"{row['time']:.2f}"]
    gap = f"{rival['difference']:+.3f}" if rival else ""
    if rival and not any(map(math.isnan, rival["interval"])):  # of one prompt there is no interval
        gap += " ({:+.3f} to {:+.3f})".format(*rival["interval"])
    return [*cells, gap]


def _advice(name: str, curve: dict[str, Any], judge: str) -> str:
    """A sweep's best strength, and the one to stay under, as a sentence."""
    limit = curve["stay_under"]
    shown = (
        "no reward hacking shown at these strengths"
        if limit is None
        else f"**reward hacking from {limit:g}: stay under it**"
    )
    return f"sweep {name}: best for the {judge} at strength {curve['best']:g}; {shown}"


def trade_off(name: str, curve: dict[str, Any]) -> Figure:
    """Gains over strength by each judge, and the strength from which the own view alone rises.

    Args:
        name: Name of the sweep.
        curve: The sweep's numbers, see :func:`found_of`.
    """
    figure, (axis,) = plots.panels()
    colours = {**dict(zip(judges_of(curve["gains"]), cycle(COLOURS))), OWN_VIEW: "#c08840"}
    places = range(len(curve["strengths"]))
    for judge, gains in curve["gains"].items():
        axis.plot(places, gains, marker="o", color=colours[judge], label=judge)
    if curve["stay_under"] is not None:
        at = curve["strengths"].index(curve["stay_under"])
        axis.axvspan(at - 0.5, len(places) - 0.5, color=plots.RED, alpha=0.12, label="reward hacking")
    axis.axhline(0, color=plots.GREY, linewidth=0.8)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_xticks(places, [f"{s:g}" for s in curve["strengths"]])
    weights = ", ".join(f"{d} {w:.2g}" for d, w in curve["weights"].items() if w)
    axis.set(title=f"{name} ({weights})", xlabel="strength", ylabel="gain, deviations of the base")
    axis.legend(fontsize=plots.SMALL)
    return figure


def bars(found: dict[str, Any]) -> Figure:
    """Superiority over the base, a group of bars per arm and a bar per column, with intervals.

    Args:
        found: What :func:`found_of` returns.
    """
    judge = found["judge"]
    arms = {name: row["against_base"][judge] for name, row in found["arms"].items() if "against_base" in row}
    kind = "superiority" if found["samples"] > 1 else "win_rate"
    series = {
        column: [Interval(arm[column][kind], *arm[column][f"{kind}_interval"]) for arm in arms.values()]
        for column in COLUMNS
    }
    figure, (axis,) = plots.panels(size=(max(6, 0.9 * len(arms)), 3.6))
    plots.bars(axis, list(arms), series, list(plots.BARS.values()))
    plots.reference_line(axis, 0.5)
    axis.set(ylim=(0, 1), ylabel=f"wins over the base ({judge})")
    plots.legend_below(figure)
    return figure


def film(folder: Path, arms: Iterable[str], prompts: Sequence[str], least: int = 96) -> list:
    """Frames of a grid that moves: a row per prompt, a column per arm, the same noise in each row.

    Args:
        folder: Folder of the comparison.
        arms: Names of the arms to show.
        prompts: Prompts to show, from the first one on.
        least: Least height of a row, pixels; smaller videos are enlarged.
    """
    columns = []
    for arm in arms:
        contents = {content.key: content for content in ShardSet(folder / "videos" / arm).contents()}
        column = []
        for number in range(len(prompts)):
            (video,) = clips_of([contents[f"{number:05d}-000"]])  # (T, H, W, 3)
            column.append(np.pad(video, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255))
        columns.append(np.concatenate(column, 1))
    grid = np.concatenate(columns, 2)  # (T, P H, arms W, 3)
    return [enlarge(np.ascontiguousarray(frame), least * len(prompts)) for frame in grid]


def save(folder: Path, found: dict[str, Any], arms: Iterable[str], prompts: Sequence[str], fps: int, what: str) -> None:
    """Write JSON, table, charts and films; show the same in TensorBoard; print the table.

    Args:
        folder: Folder of the comparison; its arms' videos are in it.
        found: All numbers, see :func:`found_of`.
        arms: Names of all arms, the base first.
        prompts: Prompts in the order of the videos' keys.
        fps: Frame rate of the films.
        what: First line of the text, which says what was compared.
    """
    text = f"{what}\n\n{table(found)}\n"
    write_text(folder / "comparison.md", text)
    pictures = {f"sweep_{name}": trade_off(name, curve) for name, curve in found["sweeps"].items()}
    if len(found["arms"]) > 1:
        pictures["arms"] = bars(found)
    shown = [name for name in arms if "@" not in name]
    for name, curve in found["sweeps"].items():  # each sweep's best strength, and its largest
        shown += [f"{name}@{s:g}" for s in sorted({curve["best"], curve["strengths"][-1]}) if s]
    frames = film(folder, shown, prompts[:6])
    write_bytes(folder / "films.gif", gif(frames, fps))
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        media = TensorBoardMedia(writer)
        media.text("compare", text, 0)
        media.animation(f"compare/{', '.join(shown)}"[:200], frames, fps, 0)
        for name, picture in pictures.items():
            plots.save_png(picture, folder / f"{name}.png")
            media.figure(f"compare/{name}", picture, 0)
    write_json(folder / "comparison.json", found)  # last: where it is, all of it is
    print(
        f"\n{text}\nsaved in {folder}: comparison.json and .md, charts, films.gif ({', '.join(shown)}); "
        f"TensorBoard: --logdir {folder}"
    )
