"""The page of `videoalign paper`: tables and figures over seeds, each beside the paper's numbers, with verdicts."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ... import VideoAlignError
from ...commands.comparison import COLUMNS
from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.files import new_file, read_json, write_json, write_text
from .paper_claims import (
    BETAS,
    CLAIMED,
    CLAIMS,
    GUIDES,
    ORACLE,
    OTHER,
    POOLS,
    RM,
    SAME,
    SHARES,
    STRENGTHS,
    TRIALS,
    Found,
    Interval,
    accuracy,
    of_share,
    wins,
)
from .pipeline import LoopSize

FIGURES = "docs/results"
"""Of the figures and the numbers behind them, beside RESULTS.md."""
WORDS = {True: ("reproduced", "not reproduced"), False: ("confirmed", "refuted")}
"""Verdicts on what the paper claims, and on what we asked besides."""
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
}
NAMES = {
    "control": "SFT, unselected samples (control)", "sft": "SFT", "rwr": "Flow-RWR", "dpo-time": "Flow-DPO, beta (1 - t)^2",
    "dpo": "Flow-DPO, constant beta", "sft-full": "SFT, full training", "dpo-full": "Flow-DPO, constant beta, full training",
}  # fmt: skip
NOISES = {SAME: "same noise", OTHER: "other noise"}
MODELS = {"reg": "regression, shared", "bt": "BT, shared", "btt": "BTT, shared", "separate": "BTT, separate"}
PAPER_MODELS = {  # Table 6: without / with ties; VQ, MQ, TA, Overall of VideoGen-RewardBench, and GenAI-Bench
    "reg": ("73.6 / 54.2", "65.6 / 61.2", "71.0 / 52.6", "70.2 / 58.4", "71.1 / 48.3"),
    "bt": ("77.1 / 52.3", "73.5 / 59.4", "71.6 / 53.1", "72.6 / 61.2", "71.2 / 47.7"),
    "btt": ("76.3 / 60.5", "72.4 / 64.6", "72.1 / 53.6", "73.4 / 61.5", "70.9 / 48.3"),
    "separate": ("75.7 / 59.7", "74.7 / 66.0", "72.2 / 53.8", "73.6 / 61.3", "72.9 / 49.4"),
}
PAPER_ARMS = {
    "sft": "61 / 76 / 46",
    "rwr": "59 / 70 / 48",
    "dpo-time": "88 / 91 / 28",
    "dpo": "91 / 81 / 68",
}  # Table 3, VideoGen-Eval
PAPER_TA = {"sft": "54", "rwr": "50", "dpo-time": "56", "dpo": "65"}  # Table 4, VideoGen-Eval
PAPER_GUIDED = {"ta": "61 / 46 / 70", "mostly-ta": "67 / 64 / 61", "less-ta": "69 / 68 / 53", "vq-mq": "86 / 93 / 27",
                "mq": "66 / 75 / 32", "clean-mq": "37 / 39 / 53"}  # fmt: skip


# --- what was found -----------------------------------------------------------------------------------------------------


def findings(out: Path, seed: int) -> Found:
    """Everything that one seed's folder holds by now, without intervals within the seed."""
    place = out / f"seed{seed}"
    found: Found = {"reward models": {}, "judges": {}}
    for path in sorted((place / "bench").glob("*/accuracies.json")):
        found["reward models"][path.parent.name] = _bare(read_json(path, "a cell"))
    for name in ("reward_rendered", "reward"):
        if (path := place / f"bench_{name}/accuracies.json").exists():
            found["judges"][name] = _bare(read_json(path, "a cell"))
    if "reward_rendered" in found["judges"]:
        found["reward models"]["separate"] = found["judges"]["reward_rendered"]
    for key, path in {
        "prompts": place / "cells/prompts.json",
        "oracle": place / "oracle_check.json",
        "tuned": out / "tuning/tuned.json",
    }.items():
        if path.exists():
            found[key] = read_json(path, "a cell")
    for name in ("preferred", "preferred_ta", *(f"pairs/{pool}" for pool in POOLS)):
        if (path := place / name / "index.json").exists():
            shards = read_json(path, "a set")["shards"]
            found.setdefault("pairs", {})[name.removeprefix("pairs/")] = sum(shard["samples"] for shard in shards)
    for cell in ("aligned", "ta", "beta", "nrg", "conditions"):
        if (path := place / f"cells/{cell}/comparison.json").exists():
            found[cell] = _bare(read_json(path, "a comparison"))
    return found


def _bare(found: Any) -> Any:
    """Nested numbers without the intervals within a seed, to the sixth digit: no difference between seeds is finer."""
    if isinstance(found, dict):
        return {key: _bare(value) for key, value in found.items() if "interval" not in key}
    return round(found, 6) if isinstance(found, float) else found


def over_seeds(found: Mapping[int, Found], of: Callable[[Found], float]) -> Interval | None:
    """A number's interval over the seeds that have it; None where none has."""
    values = []
    for one in found.values():
        try:
            values.append(of(one))
        except KeyError:
            continue
    values = [value for value in values if value is not None and math.isfinite(value)]
    return Interval(tuple(values)) if values else None


def joined(known: Found, found: Found) -> Found:
    """What is known of a seed and what its folder holds, which may be less; the folder is right where both speak."""
    both = {
        key: {**known[key], **found[key]}
        for key in ("reward models", "judges", "pairs")
        if key in known and key in found
    }
    return {**known, **found, **both}


def verdicts(found: Mapping[int, Found]) -> list[dict[str, Any]]:
    """Every claim that any seed can speak of."""
    rows = []
    for claim in CLAIMS:
        if interval := over_seeds(found, claim.of):
            rows.append(
                {
                    "cell": claim.cell,
                    "claim": claim.text,
                    "paper": claim.paper,
                    "values": list(interval.values),
                    "mean": interval.mean,
                    "half": interval.half,
                    "verdict": interval.verdict(WORDS[bool(claim.paper)]),
                }
            )
    return rows


# --- tables -------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def _cell(found: Mapping[int, Found], of: Callable[[Found], float]) -> str:
    interval = over_seeds(found, of)
    return str(interval) if interval else "-"


def _claims(rows: Sequence[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        half = f" ± {row['half']:.3f}" if math.isfinite(row["half"]) else ""
        body.append(
            [
                row["claim"],
                row["paper"] or "(not asked)",
                f"{row['mean']:+.3f}{half}",
                f"**{row['verdict']}**" if not row["verdict"].startswith("undecided") else row["verdict"],
            ]
        )
    return _table(["claim", "the paper", "here: difference", "verdict"], body)


def _models(found: Mapping[int, Found]) -> str:
    rows = []
    places = [*(("recent", c) for c in COLUMNS), ("older", OVERALL)]
    for name, words in MODELS.items():
        rows.append(
            [
                words,
                *(
                    " / ".join(_cell(found, accuracy(name, *place, kind)) for kind in ("without_ties", "with_ties"))
                    for place in places
                ),
            ]
        )
        rows.append(["the paper, %", *PAPER_MODELS[name]])
    return _table(["without / with ties", *(f"{c}, {b}" if b == "older" else c for b, c in places)], rows)


def _shares(found: Mapping[int, Found]) -> str:
    rows = [
        [f"{share:.0%}", *(_cell(found, of_share(loss, share)) for loss in ("bt", "reg"))] for share in (*SHARES, 1.0)
    ]
    return _table(["pairs", "BT", "regression"], rows)


def _prompts(found: Mapping[int, Found]) -> str:
    rows = [
        [tokens, *(_cell(found, lambda f, t=tokens, d=d: f["prompts"][t][d]) for d in DIMENSIONS)]
        for tokens in ("separate", "shared")
    ]
    return _table(["mean shift of a reward under another prompt, deviations", *DIMENSIONS], rows)


def _arms(found: Mapping[int, Found], cell: str, arms: Mapping[str, str], paper: Mapping[str, str]) -> str:
    """Wins of arms in every dimension by both judges at both noises, and what the oracle thinks of them."""
    places = [(judge, noise) for noise in (SAME, OTHER) for judge in (RM, ORACLE)]

    def three(of: Callable[[str], Callable[[Found], float]]) -> str:
        found_of = [over_seeds(found, of(d)) for d in DIMENSIONS]
        return " / ".join(f"{i.mean:.2f}" if i else "-" for i in found_of)

    def won(arm: str, judge: str, noise: str) -> str:
        overall = _cell(found, wins(cell, arm, judge, noise=noise))
        return f"{three(lambda d: wins(cell, arm, judge, d, noise))}; {overall}"

    def mean(arm: str) -> Callable[[str], Callable[[Found], float]]:
        return lambda d: lambda f: f[cell]["arms"][arm]["means"][ORACLE][d]

    rows = [["base", *[""] * (len(places) + 1), three(mean("base"))]]
    for arm, words in arms.items():
        if over_seeds(found, wins(cell, arm, ORACLE)):
            rows.append([words, *(won(arm, *place) for place in places), paper.get(arm, ""), three(mean(arm))])
    return _table(
        [
            "VQ / MQ / TA; overall",
            *(f"{judge}, {NOISES[noise]}" for judge, noise in places),
            "the paper, %",
            "oracle's means",
        ],
        rows,
    )


def _guided(found: Mapping[int, Found]) -> str:
    chosen = next((f["tuned"]["nrg"]["strength"] for f in found.values() if "tuned" in f), None)
    parts = []
    for strength in CLAIMED:
        arms = {
            f"{name}@{strength:g}": f"{name} ({', '.join(f'{d} {w:.2g}' for d, w in weights.items())}; {reward.split('_')[0]} reward)"
            for name, (reward, weights) in GUIDES.items()
        }
        # the paper's strength of 100 is in units of its own
        paper = {f"{name}@{strength:g}": row for name, row in PAPER_GUIDED.items()}
        parts.append(
            f"Strength {strength:g}{', which tuning chose' * (strength == chosen)}:\n\n{_arms(found, 'nrg', arms, paper)}"
        )
    return "\n\n".join(parts)


def _judges(found: Mapping[int, Found]) -> str:
    rows = [
        [
            words,
            *(_cell(found, lambda f, n=name, d=d: f["judges"][n]["generated"][d]["without_ties"]) for d in DIMENSIONS),
        ]
        for name, words in (
            ("reward_rendered", "trained on rendered pairs"),
            ("reward", "and on rated pairs of generated clips"),
        )
    ]
    return _table(["accuracy on generated clips of unseen prompts, without ties", *DIMENSIONS], rows)


def _counts(found: Mapping[int, Found]) -> str:
    """How many pairs each condition had to train on."""
    names = {"preferred": "own samples, as in (d)", **POOLS}
    counts = {words: over_seeds(found, lambda f, n=name: f["pairs"][n]) for name, words in names.items()}
    return "Pairs: " + "; ".join(f"{words} {interval.mean:.0f}" for words, interval in counts.items() if interval) + "."


def _pools() -> dict[str, str]:
    return {
        f"{pool}-{name}": f"{NAMES[name]}: {text}"
        for pool, text in POOLS.items()
        for name in ("control", "sft", "rwr", "dpo")
    }


# --- figures ------------------------------------------------------------------------------------------------------------


LEAST = 3
"""Seeds from which an interval is drawn; of fewer each seed is a point."""


def _spread(rows: Sequence[Interval]) -> list[float]:
    """Half widths to draw."""
    return [row.half if len(row.values) >= LEAST else 0.0 for row in rows]


def _curve(
    axis: Axes,
    found: Mapping[int, Found],
    places: Sequence[float],
    of: Callable[[float], Callable[[Found], float]],
    label: str,
    **style: Any,
) -> None:
    """Means over seeds, with intervals or the seeds themselves."""
    known = [(place, interval) for place in places if (interval := over_seeds(found, of(place)))]
    drawn = axis.errorbar(
        [place for place, _ in known],
        [i.mean for _, i in known],
        yerr=_spread([i for _, i in known]),
        marker="o",
        capsize=3,
        label=label,
        **style,
    )
    for place, interval in known:
        if 1 < len(interval.values) < LEAST:
            axis.plot(
                [place] * len(interval.values),
                interval.values,
                ".",
                color=drawn[0].get_color(),
                markersize=4,
                alpha=0.6,
            )


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _share_figure(found: Mapping[int, Found]) -> Figure:
    figure, axis = _figure(
        "Accuracy over the share of training pairs", "share of the pairs", "mean accuracy without ties"
    )
    for loss, words in (("bt", "BT"), ("reg", "regression")):
        _curve(axis, found, (*SHARES, 1.0), lambda s, n=loss: of_share(n, s), words)
    axis.set_xscale("log")
    axis.legend()
    return figure


def _arm_figure(found: Mapping[int, Found], cell: str, arms: Mapping[str, str], title: str) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 + 0.42 * len(arms) + 1), layout="constrained", sharey=True)
    arms = {arm: words for arm, words in arms.items() if over_seeds(found, wins(cell, arm, ORACLE))}
    for axis, judge in zip(axes, (RM, ORACLE)):
        for shift, (column, colour) in enumerate(zip(COLUMNS, ("#88a8c8", "#a8c888", "#d8b878", "#404040"))):
            rows = [over_seeds(found, wins(cell, arm, judge, column, OTHER)) for arm in arms]
            halves = _spread(rows)
            axis.barh(
                [i + 0.2 * (shift - 1.5) for i in range(len(rows))],
                [r.mean for r in rows],
                0.19,
                xerr=halves,
                color=colour,
                label=column,
                error_kw={"linewidth": 0.7},
            )
            for i, row in enumerate(rows):
                if 1 < len(row.values) < LEAST:
                    axis.plot(row.values, [i + 0.2 * (shift - 1.5)] * len(row.values), "k.", markersize=3)
        axis.axvline(0.5, color="#b03030", linestyle="dashed", linewidth=0.8)
        axis.set(xlim=(0, 1), title=f"{title}: by the {judge}", xlabel="wins over the base, other noise")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms)), list(arms))
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=7)
    return figure


def _beta_figure(found: Mapping[int, Found]) -> Figure:
    figure, axis = _figure("Text alignment alone", "beta", "wins over the base in TA, other noise")
    for name, words, colour in (("constant", "constant", "#4878a8"), ("time", "beta (1 - t)^2", "#c08840")):
        for judge, line in ((RM, "solid"), (ORACLE, "dashed")):
            _curve(
                axis,
                found,
                BETAS,
                lambda b, n=name, j=judge: wins("beta", f"{n}-{b:g}", j, "TA", OTHER),
                f"{words}, {judge}",
                color=colour,
                linestyle=line,
            )
    axis.axhline(0.5, color="#b03030", linestyle="dotted", linewidth=0.8)
    axis.set_xscale("log")
    axis.legend(fontsize=8)
    return figure


def _guide_figure(found: Mapping[int, Found]) -> Figure:
    figure, axis = _figure(
        "Flow-NRG: wins by the oracle over strength", "strength", "wins over the base, overall, other noise"
    )
    for name in GUIDES:
        _curve(axis, found, STRENGTHS[1:], lambda s, n=name: wins("nrg", f"{n}@{s:g}", ORACLE), name)
    axis.axhline(0.5, color="#b03030", linestyle="dotted", linewidth=0.8)
    axis.set_xscale("log")
    axis.legend(fontsize=7, ncols=2)
    return figure


# --- the page -----------------------------------------------------------------------------------------------------------


def earlier(out: Path, size: LoopSize) -> dict[str, Any]:
    """A folder's ``results.json``, of this machine or another one; nothing where there is no such file.

    Raises:
        VideoAlignError: where its seeds were made with other sizes or settings, so that they could not be averaged with these.
    """
    path, tuned = out / FIGURES / "results.json", out / "tuning/tuned.json"
    if not path.exists():
        return {}
    results = read_json(path, "results")
    if not isinstance(results, dict):
        raise VideoAlignError(f"{path} holds no results; remove it")
    for name, here in (
        ("size", json.loads(json.dumps(asdict(size)))),
        ("tuned", read_json(tuned, "settings") if tuned.exists() else None),
    ):
        if here is not None and results.get(name) != here:
            raise VideoAlignError(
                f"{path} holds seeds of another {name} ({results.get(name)}, here {here}); name another --out, or remove it"
            )
    return results


def write_page(out: Path, seeds: Iterable[int], size: LoopSize) -> dict[str, Any]:
    """Write ``OUT/RESULTS.md``, ``OUT/docs/results/*.png`` and ``results.json`` from the cells that are there.

    Args:
        seeds: whose folders are read; those that ``results.json`` holds besides stay. size: of all of them.

    Returns:
        What is in the JSON.
    """
    known = {int(seed): found for seed, found in earlier(out, size).get("seeds", {}).items()}
    found = dict(
        sorted({**known, **{seed: joined(known.get(seed, {}), findings(out, seed)) for seed in seeds}}.items())
    )
    rows = verdicts(found)
    if not rows:
        raise VideoAlignError(f"{out} holds no finished cell yet")
    tuned = next((one["tuned"] for one in found.values() if "tuned" in one), None)
    results = {"size": asdict(size), "tuned": tuned, "seeds": found, "verdicts": rows}
    folder = out / FIGURES
    write_json(folder / "results.json", results)
    full = {name: NAMES[name] for name in ("sft", "sft-full", "dpo", "dpo-full")}
    main = {name: words for name, words in NAMES.items() if not name.endswith("-full")}
    tables = {
        "a": _models(found),
        "b": _shares(found),
        "c": _prompts(found),
        "d": _arms(found, "aligned", main, PAPER_ARMS),
        "e": _arms(found, "ta", main, {name: f"TA {row}" for name, row in PAPER_TA.items()}),
        "g": _guided(found),
        "h": _arms(found, "aligned", full, {}),
        "i": f"{_counts(found)}\n\n{_arms(found, 'conditions', _pools(), {})}",
        "j": _judges(found),
    }
    draw = {
        "b": lambda: _share_figure(found),
        "d": lambda: _arm_figure(found, "aligned", NAMES, "aligned"),
        "f": lambda: _beta_figure(found),
        "g": lambda: _guide_figure(found),
        "i": lambda: _arm_figure(found, "conditions", _pools(), "conditions"),
    }
    parts = [_head(found, rows)]
    for cell, title in CELLS.items():
        own = [row for row in rows if row["cell"] == cell]
        if not own:
            continue
        seeds_here = max(len(row["values"]) for row in own)
        parts.append(f"## ({cell}) {title}\n\n{seeds_here} seed{'s' if seeds_here > 1 else ''}.")
        if cell in draw:
            figure = draw[cell]()
            with new_file(folder / f"{cell}.png") as file:
                figure.savefig(file, dpi=110, format="png")
            plt.close(figure)
            parts.append(f"![{title}]({FIGURES}/{cell}.png)")
        parts += [part for part in (tables.get(cell), _claims(own)) if part]
    write_text(out / "RESULTS.md", "\n\n".join(parts) + "\n")
    print(f"\n{_tally(rows)}")
    print(f"results   {out / 'RESULTS.md'}\nnumbers   {folder / 'results.json'}")
    return results


def _tally(rows: Sequence[dict[str, Any]]) -> str:
    """How many claims have each verdict, the paper's and ours."""

    def counts(paper: bool) -> tuple[int, str]:
        own = [row["verdict"] for row in rows if bool(row["paper"]) == paper]
        words = (*WORDS[paper], "undecided")
        return len(own), ", ".join(f"{sum(v.startswith(word) for v in own)} {word}" for word in words)

    return "{} claims of the paper ({}) and {} of our own ({})".format(*counts(True), *counts(False))


def _trials(tuned: dict[str, Any] | None) -> str:
    """What was tried, and what was chosen."""

    def values(settings: Sequence[dict[str, float]]) -> str:
        keys = {key: sorted({one[key] for one in settings}) for key in settings[0]}
        return "; ".join(f"{key} {', '.join(f'{v:g}' for v in tried)}" for key, tried in keys.items())

    tried = {**TRIALS, "nrg": [{"strength": s} for s in STRENGTHS[1:]]}
    chosen = tuned or {}
    return _table(
        ["algorithm", "tried", "chosen"],
        [
            [name, values(settings), values([chosen[name]]) if name in chosen else "not yet"]
            for name, settings in tried.items()
        ],
    )


def _head(found: Mapping[int, Found], rows: Sequence[dict[str, Any]]) -> str:
    first = next((f for f in found.values() if "oracle" in f), {})
    tuned = next((f["tuned"] for f in found.values() if "tuned" in f), None)
    most = max(len(row["values"]) for row in rows)
    wide = (
        f"; with {most} seeds an interval reaches {stats.t.ppf(0.975, most - 1):.1f} standard errors to each side"
        if most > 1
        else ""
    )
    oracle = "; ".join(
        f"{where} " + ", ".join(f"{d} {_cell(found, lambda f, w=where, d=d: f['oracle'][w][d])}" for d in DIMENSIONS)
        for where in first.get("oracle", {})
    )
    return f"""# The paper in miniature: what `videoalign paper` found

Every number is a mean over seeds of the whole miniature world (world, reward model, generator, alignment), with a 95 % interval
over seeds (Student's t). A claim's difference is positive where the claim is right: **reproduced** (a claim of the paper) or **confirmed**
(one of our own) where its interval is above zero, **not reproduced** or **refuted** where it is below, undecided otherwise, with the
number of seeds that agree. There are {_tally(rows)}{wide}.
Claims overlap, and of so many a few are decided by chance: look at the rows as a whole.
The numbers behind this page are in [{FIGURES}/results.json]({FIGURES}/results.json).

Wins are shares of videos that beat the base generator's on prompts that no training but the reward model's caption pre-training saw, at
the same noise, as the paper counts, and at other noise of the same prompt, which a small shift does not win. 0.5 is no difference. Tables
and figures have both judges at the same kind of noise; claims are made of the reward model's wins at the same noise and of those of the
oracle, which reads the truth off the pixels, at other noise. The oracle's numbers enter no training; the annotators who rated
generated clips see with its eyes, so the reward model learned from labels that it had a part in. "recent" stands for
VideoGen-RewardBench, "older" for GenAI-Bench (of which the paper takes the TA reward as overall, this page the sum).

Settings were chosen on a seed of their own by what the reward model prefers overall at other noise, of four trials for each algorithm; a
choice at the end of what was tried may have a better one beyond it.

{_trials(tuned)}

Rank correlation of the oracle with the true quality of held-out renders: {oracle or "not yet"}."""
