"""`videoalign bench`: a reward model's or judge's accuracies on rated pairs, under a benchmark's protocol or its own.

Every video is scored once, and the rewards of a pair are those of its two videos. Scoring is a predict run: batches of
similar length, decoded while the model computes, on any number of processes; rewards stay when it is interrupted.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .. import VideoAlignError
from ..callbacks.plots import save_png, text_table
from ..callbacks.reward_bench import bar_chart, table, too_few_prompts
from ..callbacks.run_media import TensorBoardMedia
from ..datamodules.addresses import short_name
from ..datamodules.benchmark import Benchmark
from ..datamodules.set_index import outside_sets
from ..models.benchmark_protocols import PROTOCOLS, BenchmarkProtocol, accuracy_four_way, official_accuracy_with_ties
from ..models.dimensions import DIMENSIONS, OVERALL
from ..models.files import write_json
from ..models.hub import commits_of
from ..models.intervals import prompt_number
from ..models.locks import held
from ..models.metrics import PreferenceAccuracy
from ..models.preference import accuracy_without_ties
from ..models.reward_statistics import Statistics
from .judge import Judge, ratings_of
from .predicting import alone
from .reward_judge import RewardJudge


def measure(
    judge: RewardJudge | Judge,
    data: list[str],
    out: str,
    benchmark: str | None = None,
    overall: str | None = None,
    ways: int = 3,
    min_pixels: int | None = None,
) -> Iterator[tuple[str, dict]]:
    """Score sets of videos with ``pairs.csv``, and compute the accuracies.

    Args:
        judge: The reward model to measure, or another judge, which reads the videos in its own way.
        data: Folders or addresses of the sets; a set is called by its folder's name.
        out: Folder for the results; rewards of an interrupted run are taken up there.
        benchmark: Name or import path of a protocol, see
            :data:`~videoalign.models.benchmark_protocols.PROTOCOLS`; without one the model's own sampling holds.
        overall: ``sum`` or the dimension that stands for the overall reward, if not the protocol's.
        ways: 4 adds GenAI-Bench's four classes.
        min_pixels: Area to which smaller frames are enlarged, if not the sampling's. 0 with ``genai-bench`` keeps
            frames within the budget of 256 x 256, which the official code exceeds for clips of about that size.

    Yields:
        Name of a set and what is saved as ``OUT/NAME.json``, as soon as it is measured; on the first process only.
    """
    if not isinstance(judge, RewardJudge):
        alone("bench by another judge than a reward model")
    protocol = PROTOCOLS[benchmark] if benchmark else None
    names = {short_name(path): path for path in data}
    if len(names) < len(data):
        raise VideoAlignError("two --data folders have the same name, by which their results would be told apart")
    sets = {name: Benchmark(path) for name, path in names.items()}
    _check(protocol, sets, overall, ways)
    outside_sets(out)
    with held(out):
        described, std = _judge_under(judge, protocol, min_pixels)
        overall = overall or (protocol.overall if protocol else "sum")
        for name, rated in sets.items():
            folder = Path(out) / name
            if isinstance(judge, RewardJudge):
                rewards = judge.score_set(rated.shards, rated.keys, folder, progress=True)
            else:
                rewards = ratings_of(judge, rated.shards, rated.keys, folder, "the judge")
            if rewards is None:
                continue
            result = {
                "benchmark": name,
                "protocol": benchmark,
                **described,
                "overall": overall,
                "videos": len(rated.keys),
                **_found(rated, rewards, std, overall, ways),
            }
            write_json(Path(out) / f"{name}.json", result)
            yield name, result


def _judge_under(
    judge: RewardJudge | Judge, protocol: BenchmarkProtocol | None, min_pixels: int | None
) -> tuple[dict[str, Any], Tensor]:
    """Let a reward model read videos as the protocol says.

    Returns:
        The judge's part of a result, and the deviations (D,) by which rewards are divided before they are added up.
    """
    if not isinstance(judge, RewardJudge):
        if min_pixels is not None:
            raise VideoAlignError(f"--min-pixels is of reward models; {judge.name} reads videos in its own way")
        return {"model": judge.name, "sampling": None, "statistics": None}, torch.ones(len(DIMENSIONS))
    network = judge.network
    if protocol:
        network.processor.sampling = protocol.sampling
    if min_pixels is not None:
        network.processor.sampling = replace(network.processor.sampling, min_pixels=min_pixels)
    described = {
        "model": judge.model,
        **commits_of(model=judge.model),
        "sampling": network.processor.sampling.to_dict(),
        "statistics": asdict(network.statistics),
    }
    return described, torch.tensor(network.statistics.std)


def _check(protocol: BenchmarkProtocol | None, sets: dict[str, Benchmark], overall: str | None, ways: int) -> None:
    """Refuse sets that lack the labels or columns which the protocol reads."""
    if overall not in (None, "sum", *DIMENSIONS):
        raise VideoAlignError(f"--overall {overall}: choose sum, {', '.join(DIMENSIONS)}")
    for name, rated in sets.items():
        has = [c for i, c in enumerate((*DIMENSIONS, OVERALL)) if not rated.labels[:, i].isnan().all()]
        if not has:
            raise VideoAlignError(f"{name} has no label at all, so there is nothing to measure on it")
        if protocol and (lacking := [c for c in protocol.columns if c not in has]):
            raise VideoAlignError(f"{name} has no label in {', '.join(lacking)}, so it is not {protocol.title}")
        if ways == 4 and "vote_type" not in rated.rows[0]:
            raise VideoAlignError(
                f"{name} has no column vote_type, which four-way scoring reads; `shards import-genai-bench` writes it"
            )


def _found(rated: Benchmark, rewards: Tensor, std: Tensor, overall: str, ways: int) -> dict[str, dict]:
    """Accuracies per column and source, and in four classes where asked."""
    margins, _ = rated.margins(rewards)
    # what each dimension is divided by in the overall reward; infinity leaves one out
    scale = std if overall == "sum" else torch.where(torch.tensor([d == overall for d in DIMENSIONS]), std, math.inf)
    metric = PreferenceAccuracy(scale, sync_on_compute=False)  # only the first process computes
    metric.update(margins, rated.labels, prompts=torch.tensor([prompt_number(prompt) for prompt in rated.prompts]))
    accuracies = metric.compute()
    for column, (labels, values, _) in metric.columns().items():
        accuracies[column]["official"] = official_accuracy_with_ties(labels, values)
    sources = per_source(rated, margins, scale)
    found: dict[str, dict] = {"accuracies": accuracies, "sources": sources}
    if ways == 4:
        total = (rewards / scale).sum(1)
        votes = [row["vote_type"] for row in rated.rows]
        shares = {vote: votes.count(vote) / len(votes) for vote in sorted(set(votes))}
        accuracy = accuracy_four_way(votes, (margins / scale).sum(1), total[rated.ends].mean(1))
        found["four_way"] = {
            "accuracy": accuracy,
            "commonest": max(shares.values()),
            "shares": shares,
            "pairs": len(votes),
        }
    return found


def per_source(rated: Benchmark, margins: Tensor, scale: Tensor) -> dict[str, dict[str, dict]]:
    """Accuracy without ties on the pairs that a source takes part in, by source and column."""
    margins = torch.cat([margins, (margins / scale).sum(1, keepdim=True)], 1)  # (N, D + 1)
    takes_part: dict[str, list[int]] = {}
    for number, row in enumerate(rated.rows):
        for source in {row.get("A_model", ""), row.get("B_model", "")} - {""}:
            takes_part.setdefault(source, []).append(number)
    result = {}
    for source, numbers in sorted(takes_part.items()):
        columns = {}
        for i, column in enumerate((*DIMENSIONS, OVERALL)):
            labels, values = rated.labels[numbers, i], margins[numbers, i]
            decided = ~labels.isnan() & (labels != 0)
            if decided.any():
                accuracy = accuracy_without_ties(labels[decided], values[decided])
                columns[column] = {"without_ties": accuracy, "decided": int(decided.sum())}
        result[source] = columns
    return result


def bench(
    judge: RewardJudge | Judge,
    data: list[str],
    out: str,
    benchmark: str | None = None,
    overall: str | None = None,
    ways: int = 3,
    min_pixels: int | None = None,
) -> None:
    """Print what :func:`measure` yields, and show it in TensorBoard and as a picture; the same arguments."""
    for name, result in measure(judge, data, out, benchmark, overall, ways, min_pixels):
        text = report(result)
        print(f"\n{text}")
        picture = bar_chart(name, result["accuracies"])
        save_png(picture, Path(out) / f"{name}.png")
        with SummaryWriter(Path(out) / name) as writer:
            media = TensorBoardMedia(writer)
            media.figure(f"bench/{name}", picture, 0)
            media.text(f"bench/{name}", "\n".join(f"    {line}" for line in text.splitlines()), 0)
        print(f"saved in {Path(out) / name}.json and .png; TensorBoard: --logdir {out}")


def report(result: dict) -> str:
    """A result as text: the accuracies, published ones beside them, each source's, and how to read them."""
    protocol = PROTOCOLS[result["protocol"]] if result["protocol"] else None
    accuracies = result["accuracies"]
    title = protocol.title if protocol else result["benchmark"]
    what = _sum_of(result["statistics"]) if result["overall"] == "sum" else result["overall"]
    lines = [
        f"{title}: {max(row['pairs'] for row in accuracies.values())} pairs of {result['videos']} videos, "
        f"{_reading(result)}; overall is {what}",
        "",
    ]
    lines += [_beside(protocol, accuracies), "", *_why(protocol, accuracies)] if protocol else [table(accuracies)]
    if "four_way" in result:
        four = result["four_way"]
        lines += [
            "",
            f"four-way (left, right, both good, both bad): {four['accuracy']:.3f}, both thresholds chosen on these "
            f"{four['pairs']} pairs; the commonest vote's share is {four['commonest']:.3f}",
        ]
    if result["sources"]:
        lines += ["", "without ties, pairs with a video of", _sources(result["sources"])]
    return "\n".join(lines)


def _sum_of(statistics: dict | None) -> str:
    """What is added up; another judge than a reward model has no statistics, and adds its ratings as they are."""
    if statistics is None:
        return "the sum of the ratings"
    if statistics == asdict(Statistics()):
        return "the sum of the raw rewards, because the model has no statistics to normalise them by"
    return "the sum of the normalised dimensions"


def _reading(result: dict) -> str:
    """How the videos were read: frames and sizes of a reward model; another judge reads them in its own way."""
    if (sampling := result["sampling"]) is None:
        return f"rated by {result['model']}"
    rate = f"{sampling['fps']:g} fps" if sampling["fps"] else f"{sampling['num_frames']} frames"
    side = math.isqrt(sampling["max_pixels"])
    # The released preprocessing enlarges small frames after it has kept to the budget.
    above = sampling["min_pixels"] > sampling["max_pixels"]
    least = f", frames within it enlarged to {sampling['min_pixels']}" if above else ""
    return f"{rate}, at most {sampling['max_pixels']} pixels ({side} x {side}){least}"


def _beside(protocol: BenchmarkProtocol, accuracies: dict[str, dict]) -> str:
    """Measured and published accuracies, in per cent, a line per method."""
    columns = [column for column in protocol.columns if column in accuracies]
    measured = {c: accuracies[c] for c in columns}
    rows = {
        "measured": {c: (100 * r["without_ties"], 100 * r["with_ties"]) for c, r in measured.items()},
        "  95 % from": {c: (100 * r["interval"][0], 100 * r["interval_with_ties"][0]) for c, r in measured.items()},
        "  95 % to": {c: (100 * r["interval"][1], 100 * r["interval_with_ties"][1]) for c, r in measured.items()},
        "  by the official metric": {c: (100 * r["without_ties"], 100 * r["official"]) for c, r in measured.items()},
        "  held-out threshold": {c: (math.nan, 100 * r["held_out"]) for c, r in measured.items()},
        "  pairs": {c: (r["decided"], r["pairs"]) for c, r in measured.items()},
        "always a tie": {c: (math.nan, 100 * r["floor"]) for c, r in measured.items()},
    }
    for method in dict.fromkeys(method for published in protocol.published.values() for method in published):
        rows[method] = {c: protocol.published.get(c, {}).get(method, (math.nan, math.nan)) for c in columns}
    head = ["accuracy, %", *(name for c in columns for name in (f"{c} w/o", "with ties"))]
    return text_table(head, [[name, *(_number(v) for c in columns for v in cells[c])] for name, cells in rows.items()])


def _number(value: float) -> str:
    """A count, or a share in per cent; ``-`` for NaN."""
    return str(value) if isinstance(value, int) else "-" if math.isnan(value) else f"{value:.2f}"


def _why(protocol: BenchmarkProtocol, accuracies: dict[str, dict]) -> list[str]:
    """Why numbers on one page may differ."""
    lines = [protocol.source] if protocol.source else []
    for column in protocol.columns:
        row = accuracies[column]
        if f"{100 * row['official']:.2f}" != f"{100 * row['with_ties']:.2f}":
            lines.append(
                f"{column}: the official metric differs by {100 * (row['official'] - row['with_ties']):+.3f}: it never "
                "tries to call no pair a tie, and counts thresholds inside runs of equal margins, which no threshold "
                "reaches."
            )
    return [
        *lines,
        too_few_prompts(accuracies) or "95 %: bootstrap intervals over prompts, each with all of its pairs.",
        "With ties the threshold is chosen on these very pairs: read it against 'always a tie'; "
        "'held-out' is free of that.",
    ]


def _sources(sources: dict[str, dict[str, dict]]) -> str:
    """A line per source: its accuracy and number of decided pairs by column."""
    columns = [c for c in (*DIMENSIONS, OVERALL) if any(c in row for row in sources.values())]
    rows = []
    for source, row in sources.items():
        cells = ((f"{row[c]['without_ties']:.3f}", str(row[c]["decided"])) if c in row else ("-", "0") for c in columns)
        rows.append([source, *(cell for pair in cells for cell in pair)])
    return text_table(["", *(name for c in columns for name in (c, "pairs"))], rows)
