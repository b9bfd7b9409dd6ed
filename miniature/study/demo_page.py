"""The demo's report: one HTML file with everything in it, for a reader who knows none of this."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...callbacks.reward_bench import table as accuracy_table
from ...callbacks.tensorboard import enlarge, gif
from ...commands.comparison import COLUMNS
from ...datamodules.encode_list import clips_of
from ...datamodules.shards import Content, ShardSet
from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.files import read_json, write_text
from ..world.sprites import FPS

ARMS = {
    "base": "the generator as it was", "control": "fine-tuned on samples that nobody selected: what any further training does",
    "sft": "fine-tuned on the preferred samples", "rwr": "Flow-RWR: samples weighted by their reward",
    "dpo": "Flow-DPO, constant beta", "dpo-time": "Flow-DPO, beta (1 - t)²",
}  # fmt: skip
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ccc}
img{max-width:100%;height:auto}.clip{image-rendering:pixelated;width:96px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}
td,th{border-bottom:1px solid #ddd;padding:.25rem .5rem;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left;white-space:normal;min-width:8rem}
.row{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;width:112px}figcaption{font-size:.72rem;color:#555;line-height:1.25}
pre{overflow-x:auto;background:#f5f5f5;padding:.6rem;font-size:.78rem}.bad{color:#b03030}
"""


def write_page(
    out: Path,
    accuracies: dict[str, Any],
    ceilings: dict[str, Any],
    compared: dict[str, Any],
    stages: Sequence[tuple[str, float]],
) -> Path:
    """Write ``OUT/report.html``.

    Args:
        out: a finished demo. accuracies: by reward model, benchmark and column. ceilings: by benchmark and column.
        compared: what :func:`.comparison.found_of` found. stages: what was done, and how many seconds it took.
    """
    generated = ShardSet(out / "generated")
    sections = [
        ("What happened", _story(compared)),
        ("How well the reward model judges", _accuracies(accuracies, ceilings)),
        ("The oracle: how good a clip really is", _correlations(out) + _extremes(list(generated.contents()))),
        ("The generators side by side", _films(out, compared) + _table(compared)),
        ("Wins over the base", _image(out / "compared/arms.png", "share of clips that beat the base's")),
        ("Guidance, and reward hacking", _hacking(out, compared)),
        ("Every stage, and how long it took", _stages(stages)),
        ("Where to go on", _onwards(out)),
    ]
    body = "".join(f"<h2>{html.escape(title)}</h2>\n{content}\n" for title, content in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>videoalign: the paper in miniature</title><style>{STYLE}</style></head><body>"
        f"<h1>Video generation with human feedback, in miniature</h1>{body}</body></html>\n"
    )
    path = out / "report.html"
    write_text(path, page)
    return path


def _embedded(content: bytes, kind: str, alt: str, style: str = "") -> str:
    encoded = base64.b64encode(content).decode()
    return f'<img class="{style}" alt="{html.escape(alt)}" src="data:image/{kind};base64,{encoded}">'


def _image(path: Path, alt: str) -> str:
    return _embedded(path.read_bytes(), "png", alt)


def _clip(video: np.ndarray, caption: str) -> str:
    """A moving clip (T, H, W, 3) with words under it."""
    frames = [enlarge(frame, 96) for frame in video]
    return f"<figure>{_embedded(gif(frames, FPS), 'gif', caption, 'clip')}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _cells(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _story(compared: dict[str, Any]) -> str:
    return (
        "<p>A small text-to-video world was rendered: coloured shapes that move, some clips faded, stained, frozen or wrong. Simulated "
        "annotators compared pairs of clips in visual quality (VQ), motion quality (MQ) and text alignment (TA). A <b>reward model</b>, a "
        "miniature Qwen2-VL, learned to judge as they do. Meanwhile a <b>generator</b>, a miniature Wan, learned to make such clips from "
        "text, flaws included. Annotators rated pairs of its clips, and the reward model learned from these too. Then it labelled fresh "
        "samples, and four algorithms <b>aligned</b> the generator to its judgement; Flow-NRG <b>guides</b> it while it samples instead.</p>"
        f"<p>All are compared on {compared['prompts']} prompts that no training but the caption pre-training saw, from the same noise, {compared['samples']} clips each: by the "
        "reward model, which may be fooled, and by an <b>oracle</b>, which reads the truth off the pixels. Its "
        "numbers enter no training; the annotators of generated clips see with its eyes.</p>"
    )


def _accuracies(accuracies: dict[str, Any], ceilings: dict[str, Any]) -> str:
    rows = [["pairs ordered rightly (ties left out)", *COLUMNS]]
    names = {
        "recent": "rendered clips, newer sources",
        "older": "rendered clips, older sources",
        "generated": "generated clips",
    }
    for benchmark, best in ceilings.items():
        for model, words in (("reward_rendered", "trained on rendered pairs"), ("reward", "and on generated pairs")):
            found = accuracies[model][benchmark]
            rows.append(
                [
                    f"{names[benchmark]}: {words}",
                    *(f"{found[c]['without_ties']:.3f}" if c in found else "-" for c in COLUMNS),
                ]
            )
        rows.append(
            [
                f"{names[benchmark]}: a judge that knows the truth",
                *(f"{best[c]['without_ties']:.3f}" if c in best else "-" for c in COLUMNS),
            ]
        )
    text = "".join(f"\n{names[b]}\n{accuracy_table(accuracies['reward'][b], best)}\n" for b, best in ceilings.items())
    return (
        "<p>Annotators err, so even the truth does not agree with all of their votes: that is the ceiling. Whether "
        f"a judge of rendered clips is one of generated clips too, and what rated pairs of these add, the last rows show.</p>{_cells(rows)}<details><summary>with ties, intervals and floors</summary><pre>{html.escape(text)}</pre></details>"
    )


def _correlations(out: Path) -> str:
    """How far the oracle can be trusted."""
    check = read_json(out / "oracle_check.json", "a finished demo")
    rows = [
        ["rank correlation with the true quality", *DIMENSIONS],
        *([k, *(f"{v[d]:.2f}" for d in DIMENSIONS)] for k, v in check.items()),
    ]
    return (
        "<p>The oracle sees nothing but pixels and the prompt. On clips of known quality that it was not calibrated on, it ranks as the truth "
        f"does, also behind the generator's autoencoder:</p>{_cells(rows)}"
    )


def _stages(stages: Sequence[tuple[str, float]]) -> str:
    rows = [["stage", "seconds"], *([text, f"{seconds:.0f}"] for text, seconds in stages)]
    return f"<details><summary>{len(stages)} stages, on as many processes as there are cores (four at most)</summary>{_cells(rows)}</details>"


def _extremes(contents: list[Content]) -> str:
    """Of each dimension the worst, a middle and the best generated clip by the oracle."""
    parts = ["<p>Generated clips of unseen prompts, from worst to best in the eyes of the oracle.</p>"]
    for i, dimension in enumerate(DIMENSIONS):
        ranked = sorted(contents, key=lambda content: content.record["quality"][i])
        places = [0, len(ranked) // 4, len(ranked) // 2, 3 * len(ranked) // 4, -1]
        chosen = [ranked[place] for place in places]
        clips = "".join(
            _clip(video, f"{c.record['prompt']}: {c.record['quality'][i]:.2f}")
            for c, video in zip(chosen, clips_of(chosen))
        )
        parts.append(f'<h3>{dimension}</h3><div class="row">{clips}</div>')
    return "".join(parts)


def _shown(compared: dict[str, Any]) -> dict[str, str]:
    """Arms to look at and what they are: all trained ones, and guidance at its best strength."""
    shown = {name: ARMS[name] for name in compared["arms"] if name in ARMS}
    for name, curve in compared["sweeps"].items():
        strength = curve["best"] or curve["strengths"][1]
        shown[f"{name}@{strength:g}"] = (
            f"Flow-NRG ({', '.join(d for d, w in curve['weights'].items() if w)}), strength {strength:g}"
        )
    return shown


def _films(out: Path, compared: dict[str, Any]) -> str:
    shown = _shown(compared)
    by_arm = {arm: sorted(ShardSet(out / "compared/videos" / arm).contents(), key=lambda c: c.key) for arm in shown}
    parts = []
    for number in range(min(4, compared["prompts"])):
        chosen = {arm: contents[number * compared["samples"]] for arm, contents in by_arm.items()}
        prompt = next(iter(chosen.values())).record["prompt"]
        clips = "".join(_clip(clips_of([content])[0], arm) for arm, content in chosen.items())
        parts.append(f'<h3>“{html.escape(prompt)}”</h3><div class="row">{clips}</div>')
    words = "".join(f"<li><b>{html.escape(arm)}</b>: {html.escape(text)}</li>" for arm, text in shown.items())
    return f"<ul>{words}</ul>{''.join(parts)}"


def _table(compared: dict[str, Any]) -> str:
    rows = [
        [
            "arm",
            *(f"oracle {c}" for c in COLUMNS),
            *(f"reward {c}" for c in COLUMNS),
            "beats base: oracle",
            "reward model",
            "cost",
        ]
    ]
    for name, row in compared["arms"].items():
        means, against = row["means"], row.get("against_base")
        rows.append(
            [
                name,
                *(f"{means['oracle'][c]:.3f}" for c in COLUMNS),
                *(f"{means['reward model'][c]:+.2f}" for c in COLUMNS),
                *(f"{against[j][OVERALL]['superiority']:.2f}" if against else "" for j in ("oracle", "reward model")),
                f"{row['cost']:.2f}x",
            ]
        )
    best = [
        [f"best of {n} base clips", *(f"{row[c]:.3f}" for c in COLUMNS)]
        for n, row in compared["best_of"].items()
        if n != "1"
    ]
    return (
        "<p>Means; the oracle's qualities are between 0 and 1 (their sum under Overall), rewards in deviations. “Beats base” compares "
        f"different noises of one prompt: 0.5 is no difference.</p>{_cells(rows)}"
        f"<p>The honest rival of guidance: of several clips of the base, the one that the reward model likes best.</p>{_cells([['oracle', *COLUMNS], *best])}"
    )


def _hacking(out: Path, compared: dict[str, Any]) -> str:
    parts = [
        "<p>A reward steers the sampler towards what it likes. Its own view always rises with the strength. Where the oracle falls while "
        "it rises, the reward is only fooled: <b>reward hacking</b>.</p>"
    ]
    for name, curve in compared["sweeps"].items():
        limit = curve["stay_under"]
        verdict = (
            f'<span class="bad">hacked from {limit:g} on: stay under it</span>'
            if limit is not None
            else "no hacking shown at these strengths"
        )
        parts.append(
            f"<h3>{html.escape(name)}</h3>{_image(out / f'compared/sweep_{name}.png', name)}<p>best at {curve['best']:g}; {verdict}</p>"
        )
    return "".join(parts)


def _onwards(out: Path) -> str:
    return (
        "<p>Curves, samples and tables of every stage are in TensorBoard: <code>tensorboard --logdir "
        f"{html.escape(out.name)}</code>. Trainings are <code>videoalign fit</code> with YAML files of "
        "<code>experiments/sprites</code>; the same commands run on real models (see the README).</p>"
    )
