"""`videoalign shards`: write, check, describe, split and convert sets of shards."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bars import Progress
from . import pairs_from_rewards, set_splits, shard_copy
from .parsing import Commands, add_out, add_seed, add_workers, command, count, group

if TYPE_CHECKING:
    from ..models.frame_sampling import FrameSampling

BENCHMARKS = {
    "videogen-rewardbench": "folder with videogen-rewardbench.csv, and videos/ or videos.zip",
    "genai-bench": "parquet, JSON or JSON-lines file, a folder of them, or one that the datasets library wrote",
}
"""Public benchmarks that can be imported, and what their source is."""
BENCHMARK_FILES = {
    "videogen-rewardbench": ("videogen-rewardbench.csv", "videos.zip", "videos/"),
    "genai-bench": ("*.parquet", "*.json", "*.jsonl", "video_generation/", "data/", "test*/*.parquet"),
}
"""Files of their repositories on the hub that are read."""


def register(commands: Commands) -> None:
    """Add the commands."""
    shards = group(commands, "shards", "import rated videos as sets of shards; join, split, check and describe sets")
    _add_imports(shards)
    _add_unrated(shards)
    _add_sets(shards)
    set_splits.register(shards)
    _add_frames(shards)
    pairs_from_rewards.register(shards)
    shard_copy.register(shards)


def _add_import(parser: argparse.ArgumentParser) -> None:
    """Options of every import."""
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave unsound rows out instead of stopping")
    add_out(parser)
    add_seed(parser, "seed of the order in which samples are stored")
    add_workers(parser, 1)


def _add_imports(shards: Commands) -> None:
    """Imports of rated pairs."""
    missing = {"action": "store_true", "help": "leave out pairs whose videos do not exist instead of stopping"}
    text = "write the rated pairs of a CSV (the official repository's columns) as a set"
    parser = command(shards, "import-csv", _import_csv, text)
    parser.add_argument("ratings", help="CSV with the columns path_A, path_B, prompt, VQ, MQ, TA and more")
    parser.add_argument("--videos", required=True, help="folder or zip archive that the paths are relative to")
    parser.add_argument(
        "--kind",
        choices=("pairs", "videos"),
        default="pairs",
        help="pairs to train on, or videos + pairs.csv to benchmark with",
    )
    parser.add_argument("--allow-missing", **missing)
    set_splits.add_held_out(parser)
    _add_import(parser)
    for benchmark, source in BENCHMARKS.items():
        parser = command(
            shards, f"import-{benchmark}", _import_benchmark, f"write the benchmark {benchmark} as videos + pairs.csv"
        )
        parser.set_defaults(benchmark=benchmark)
        parser.add_argument("source", help=f"{source}; or a data set of the hub (hf://datasets/ORG/NAME)")
        parser.add_argument("--videos", help="folder or zip archive that its paths are relative to, if not beside it")
        if benchmark == "genai-bench":
            parser.add_argument("--split", help="name of the split, where the source has several")
        parser.add_argument("--allow-missing", **missing)
        _add_import(parser)


def _add_unrated(shards: Commands) -> None:
    """Sets of videos that nobody rated."""
    parser = command(
        shards, "import-videos", _import_videos, "write videos that nobody rated yet as a set, to rate or to score"
    )
    parser.add_argument("table", help="CSV with the columns path, prompt and source (the model that made the video)")
    parser.add_argument("--videos", required=True, help="folder or zip archive that the paths are relative to")
    set_splits.add_held_out(parser)
    _add_import(parser)
    parser = command(shards, "join", _join, "write several videos sets as one, such as samples of several generators")
    parser.add_argument("sets", nargs="+", help="folders of videos sets")
    parser.add_argument(
        "--sources",
        nargs="+",
        default=[],
        help="name of the model that made each set, in their order; without it the records' names stay",
    )
    add_out(parser)


def _add_sets(shards: Commands) -> None:
    """What reads a set, or mends its index."""
    for name, run, text in (
        ("verify", _verify, "read a set again, all of it, and list its damage (exit status 1 if there is any)"),
        ("info", _info, "print what a set holds"),
        ("index", _index, "write a set's tables of contents, which sets of earlier releases lack"),
    ):
        command(shards, name, run, text).add_argument("folder", help="folder of the set")


def _add_frames(shards: Commands) -> None:
    """Decoding in advance."""
    text = "decode a set once: store the sampled, resized frames without loss"
    parser = command(shards, "encode-frames", _encode_frames, text)
    parser.add_argument("source", help="folder of a set with mp4 files")
    add_out(parser)
    parser.add_argument(
        "--model",
        help="folder or hub id of an exported reward model whose frame sampling holds, in place of the options below",
    )
    parser.add_argument("--fps", type=float, default=2.0, help="sampled frames per second")
    parser.add_argument("--num-frames", type=int, help="a fixed number of frames per video, in place of --fps")
    parser.add_argument("--max-pixels", type=int, default=448 * 448, help="largest area of a frame; larger ones shrink")
    parser.add_argument(
        "--min-pixels", type=int, default=128 * 28 * 28, help="least area of a frame; smaller ones grow"
    )
    parser.add_argument(
        "--factor", type=count(1), default=28, help="frame sides become multiples of this (patch size x merge size)"
    )
    add_workers(parser, 1)


def _import_csv(o: argparse.Namespace) -> None:
    from ..datamodules.import_csv import import_csv
    from ..datamodules.parallel import pool

    ratings, videos, out = Path(o.ratings), Path(o.videos), o.out
    options = {"seed": o.seed, "held_out": o.held_out}
    with pool(o.workers) as workers:
        report = import_csv(
            ratings, videos, out, o.kind, o.skip_bad_rows, o.allow_missing, workers, Progress(), **options
        )
    print(report.text())


def _import_benchmark(o: argparse.Namespace) -> None:
    from ..datamodules.import_benchmarks import import_genai_bench, import_videogen_rewardbench
    from ..datamodules.parallel import pool
    from ..models.files import check_free
    from ..models.hub import resolved

    check_free(o.out)  # before anything is fetched
    source = resolved(o.source, "file or folder", "dataset", BENCHMARK_FILES[o.benchmark], file=True)
    videos = resolved(o.videos, "folder or zip archive", "dataset", file=True) if o.videos else None
    options: dict[str, Any] = {
        "skip_bad_rows": o.skip_bad_rows,
        "allow_missing": o.allow_missing,
        "progress": Progress(),
        "seed": o.seed,
    }
    with pool(o.workers) as workers:
        if o.benchmark == "genai-bench":
            report = import_genai_bench(source, o.out, videos, split=o.split, pool=workers, **options)
        else:
            report = import_videogen_rewardbench(source, o.out, videos, pool=workers, **options)
    print(report.text())


def _import_videos(o: argparse.Namespace) -> None:
    from ..datamodules.parallel import pool
    from ..datamodules.video_sets import import_videos

    with pool(o.workers) as workers:
        table, videos, out = Path(o.table), Path(o.videos), o.out
        print(import_videos(table, videos, out, o.skip_bad_rows, workers, Progress(), o.seed, o.held_out))


def _join(o: argparse.Namespace) -> None:
    from ..datamodules.video_sets import join

    print(join(o.sets, o.out, o.sources, Progress()))


def _verify(o: argparse.Namespace) -> int:
    from ..datamodules.verify import open_damaged, verify

    shards = open_damaged(o.folder)
    damage = list(verify(shards))
    index = shards.index
    sound = f"{shards.name} is sound: {index.samples} {index.kind} in {len(index.shards)} shards"
    print("\n".join(damage) if damage else sound)
    return int(bool(damage))


def _info(o: argparse.Namespace) -> None:
    from ..datamodules.info import info

    print(info(o.folder))


def _index(o: argparse.Namespace) -> None:
    from ..datamodules.shards import add_contents

    print(f"{o.folder}: tables of contents of {add_contents(o.folder)} samples")


def _sampling(o: argparse.Namespace) -> tuple["FrameSampling", int]:
    """Frame sampling, and what frame sides are multiples of."""
    from ..models.frame_sampling import FrameSampling

    if o.model:
        from ..models.processor import processor_of

        processor = processor_of(o.model)
        return processor.sampling, processor.factor
    fps = o.fps if o.num_frames is None else None
    pixels = {"max_pixels": o.max_pixels, "min_pixels": o.min_pixels}
    return FrameSampling(fps=fps, num_frames=o.num_frames, **pixels), o.factor


def _encode_frames(o: argparse.Namespace) -> None:
    from ..datamodules.frames import encode_frames
    from ..datamodules.parallel import pool
    from ..datamodules.shards import ShardSet

    shards, progress = ShardSet(o.source), Progress()
    sampling, factor = _sampling(o)
    with pool(o.workers) as workers:
        for done in encode_frames(shards, o.out, sampling, factor, workers):
            progress("samples decoded", done, shards.index.samples)
