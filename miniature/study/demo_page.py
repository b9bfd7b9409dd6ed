"""The demo's report: one HTML file that holds all pictures and numbers, for a reader who knows nothing about it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...callbacks.reward_bench import table as accuracy_table
from ...callbacks.side_clips import enlarge, gif
from ...commands.comparison import COLUMNS
from ...datamodules.contents import Content
from ...datamodules.encode_list import clips_of
from ...datamodules.shards import ShardSet
from ...models.dimensions import DIMENSIONS
from ...models.files import read_json, write_text
from ..world.oracle import Oracle
from ..world.sprites import FPS
from .demo_table import BASE, LEGEND, REWARD_MODEL, TRAINED, best_algorithm, named, one_table, summary
from .pages import render

BENCHMARKS = {
    "recent": "rendered clips, newer sources",
    "older": "rendered clips, older sources",
    "generated": "generated clips",
}
"""What each benchmark consists of."""
Table = list[list[str]]
"""Rows of cells; the first row is the head."""
PLACES = {"lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75}
"""Which of the pairs of clips, ranked by how much better the second one is, the page leads with."""


@dataclass(frozen=True)
class Pair:
    """A clip of the base beside one of the best algorithm, from the same prompt and noise.

    Attributes:
        place: Where the pair is among all pairs, ranked by gain.
        gain: What the oracle gives to the second clip more than to the first, in the sum of its qualities.
        prompt: Prompt of both.
        clips: Both clips.
    """

    place: str
    gain: float
    prompt: str
    clips: tuple["Picture", "Picture"]


@dataclass(frozen=True)
class Picture:
    """An image inside of the page.

    Attributes:
        content: The encoded image.
        kind: Its format, ``png`` or ``gif``.
        alt: Text in its place, and the caption of a clip.
    """

    content: bytes
    kind: str
    alt: str

    @property
    def address(self) -> str:
        """The image as a data URL."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.content).decode()}"

    @property
    def clip(self) -> bool:
        """Whether the image is a clip, which is shown small and with its pixels."""
        return self.kind == "gif"


def write_page(
    out: Path,
    accuracies: dict[str, Any],
    ceilings: dict[str, Any],
    compared: dict[str, Any],
    stages: Sequence[tuple[str, float]],
) -> Path:
    """Write ``OUT/report.html``.

    Args:
        out: Folder of a finished demo.
        accuracies: Accuracies by reward model, benchmark and column.
        ceilings: Accuracies of a perfect judge by benchmark and column.
        compared: Numbers of the comparison, see :func:`.comparison.found_of`.
        stages: Name of each stage, and the seconds that it took.
    """
    page = render(
        "report.html",
        compared=compared,
        summary=summary(compared),
        best=best_algorithm(compared),
        best_text=named(best_algorithm(compared), compared),
        pairs=_pairs(out, compared),
        arms=one_table(compared),
        legend=LEGEND,
        accuracies=_accuracies(accuracies, ceilings),
        details=_details(accuracies["reward"], ceilings),
        correlations=_correlations(out),
        extremes=_extremes(list(ShardSet(out / "generated").contents())),
        shown=_shown(compared),
        films=_films(out, compared),
        rewards=_rewards(compared),
        best_of=_best_of(compared),
        wins=_chart(out / "compared/arms.png", "share of clips that beat the base's"),
        sweeps=_sweeps(out, compared),
        stages=[["stage", "seconds"], *([text, f"{seconds:.0f}"] for text, seconds in stages)],
        folder=out.name,
    )
    write_text(out / "report.html", page)
    return out / "report.html"


# --- pictures ---------------------------------------------------------------------------------------------------------


def _chart(path: Path, alt: str) -> Picture:
    return Picture(path.read_bytes(), "png", alt)


def _clip(video: np.ndarray, caption: str) -> Picture:
    """A moving clip (T, H, W, 3)."""
    return Picture(gif([enlarge(frame, 96) for frame in video], FPS), "gif", caption)


def _extremes(contents: list[Content]) -> dict[str, list[Picture]]:
    """Generated clips from the worst to the best by the oracle, for each dimension."""
    clips = {}
    for i, dimension in enumerate(DIMENSIONS):
        ranked = sorted(contents, key=lambda content: content.record["quality"][i])
        places = [0, len(ranked) // 4, len(ranked) // 2, 3 * len(ranked) // 4, -1]
        chosen = [ranked[place] for place in places]
        captions = (f"{c.record['prompt']}: {c.record['quality'][i]:.2f}" for c in chosen)
        clips[dimension] = [_clip(video, caption) for video, caption in zip(clips_of(chosen), captions)]
    return clips


def _pairs(out: Path, compared: dict[str, Any]) -> list[Pair]:
    """Clips of the base and of the best algorithm: neither the best pairs nor the worst, but the quartiles of gain."""
    oracle, sides = Oracle.load(out / "oracle.json"), []
    for arm in (BASE, best_algorithm(compared)):
        contents = sorted(ShardSet(out / "compared/videos" / arm).contents(), key=lambda content: content.key)
        videos, prompts = clips_of(contents), [content.record["prompt"] for content in contents]
        sides.append((arm, videos, oracle(videos, prompts), prompts))
    (_, _, before, prompts), (_, _, after, _) = sides
    gains = (after - before).sum(1)  # (N,)
    ranked = gains.argsort(stable=True).tolist()
    pairs = []
    for place, share in PLACES.items():
        i = ranked[round(share * (len(ranked) - 1))]
        clips = [
            _clip(
                videos[i], f"{arm}: " + " ".join(f"{d}\N{NO-BREAK SPACE}{q:.2f}" for d, q in zip(DIMENSIONS, rated[i]))
            )
            for arm, videos, rated, _ in sides
        ]
        pairs.append(Pair(place, float(gains[i]), prompts[i], (clips[0], clips[1])))
    return pairs


def _shown(compared: dict[str, Any]) -> dict[str, str]:
    """Arms whose clips are shown, and what they are: all trained ones, and guidance at its best strength."""
    guided = (f"{name}@{c['best'] or c['strengths'][1]:g}" for name, c in compared["sweeps"].items())
    return {name: named(name, compared) for name in (*(n for n in compared["arms"] if n in TRAINED), *guided)}


def _films(out: Path, compared: dict[str, Any]) -> list[tuple[str, list[Picture]]]:
    """A few prompts, each with one clip of every shown arm from the same noise."""
    folder = out / "compared/videos"
    by_arm = {arm: sorted(ShardSet(folder / arm).contents(), key=lambda c: c.key) for arm in _shown(compared)}
    films = []
    for number in range(min(4, compared["prompts"])):
        chosen = {arm: contents[number * compared["samples"]] for arm, contents in by_arm.items()}
        prompt = next(iter(chosen.values())).record["prompt"]
        films.append((prompt, [_clip(clips_of([content])[0], arm) for arm, content in chosen.items()]))
    return films


def _sweeps(out: Path, compared: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "chart": _chart(out / f"compared/sweep_{name}.png", name),
            "best": curve["best"],
            "limit": curve["stay_under"],
        }
        for name, curve in compared["sweeps"].items()
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def _accuracies(accuracies: dict[str, Any], ceilings: dict[str, Any]) -> Table:
    """Accuracies of both reward models and of a perfect judge, without ties, on every benchmark."""
    models = {"reward_rendered": "trained on rendered pairs", "reward": "and on generated pairs"}
    rows = [["pairs ordered rightly (ties left out)", *COLUMNS]]
    for benchmark, best in ceilings.items():
        judges = {words: accuracies[model][benchmark] for model, words in models.items()}
        judges["a judge that knows the truth"] = best
        for words, found in judges.items():
            cells = (f"{found[c]['without_ties']:.3f}" if c in found else "-" for c in COLUMNS)
            rows.append([f"{BENCHMARKS[benchmark]}: {words}", *cells])
    return rows


def _details(accuracies: dict[str, Any], ceilings: dict[str, Any]) -> str:
    """Whole tables of the reward model's accuracies, as text."""
    tables = (f"\n{BENCHMARKS[name]}\n{accuracy_table(accuracies[name], best)}\n" for name, best in ceilings.items())
    return "".join(tables)


def _correlations(out: Path) -> Table:
    """How far the oracle can be trusted."""
    check = read_json(out / "oracle_check.json", "a finished demo")
    rows = ([where, *(f"{row[d]:.2f}" for d in DIMENSIONS)] for where, row in check.items())
    return [["rank correlation with the true quality", *DIMENSIONS], *rows]


def _rewards(compared: dict[str, Any]) -> Table:
    """Means of all arms by the reward model."""
    means = {name: row["means"][REWARD_MODEL] for name, row in compared["arms"].items()}
    return [["arm", *COLUMNS], *([name, *(f"{row[c]:+.2f}" for c in COLUMNS)] for name, row in means.items())]


def _best_of(compared: dict[str, Any]) -> Table:
    """Means of the oracle over the best of several base clips by the reward model."""
    rows = (
        [f"best of {n} base clips", *(f"{row[c]:.3f}" for c in COLUMNS)]
        for n, row in compared["best_of"].items()
        if n != "1"
    )
    return [["oracle", *COLUMNS], *rows]
