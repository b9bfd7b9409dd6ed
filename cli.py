"""The command line. This file only names commands and options; what a command does lives with its subject."""

import argparse
import contextlib
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from . import EverywhereError, VideoAlignError, __version__, ranks, stopping
from .errors import BUG, describe, lost_peer

EXPERIMENT = {
    "fit": "train what a YAML experiment describes",
    "validate": "measure it on its validation data",
    "test": "measure it on its test data",
    "predict": "run it over its prediction data",
}


CONFIGURED = {"compare": ("commands.arms:compare", "sample, guide and judge several ways side by side, in one table")}
"""Functions whose arguments come from a YAML file too."""


REPLACED = {
    "compare": {
        "reward_model": "a reward model is one of the judges now: judges: {reward model: {class_path: "
        "videoalign.commands.reward_judge.RewardJudge, init_args: {model: FOLDER}}}",
        "oracle": "the oracle is one of the judges now: judges: {oracle: {class_path: "
        "videoalign.miniature.world.oracle.OracleJudge, init_args: {calibration: FILE}}}",
        "workers": "the processes that decode are the judge's now: judges.NAME.init_args.workers",
    }
}
"""Keys of earlier releases, by command, and what replaced them."""


KEPT = {
    "fit": "checkpoints that were written before are whole; --ckpt_path with one of them goes on",
    "predict": "what is finished is kept; the same command goes on",
    "generate": "what is finished is kept; the same command goes on",
    "compare": "what is finished is kept; the same command goes on",
    "bench": "rewards that were computed are kept; the same command goes on",
    "demo": "finished stages are kept; the same command goes on",
    "paper": "finished stages are kept; the same command goes on",
    "annotate simulate": "finished stages are kept; the same command goes on",
    "annotate serve": "all votes are stored; the same command goes on",
    "score": "the rewards that were printed are whole; the same command starts anew",
}
"""What is left of a command that is stopped; of the others nothing half-written."""
REPORT = "This is a fault of videoalign: please report it with the text above."


def main(args: list[str] | None = None) -> None:
    """Run one command, and say in one message why it ended, if not by itself.

    Exit status 2: a mistake of the user's, or something that the surroundings lack. 1: a fault of this program, with a
    traceback; or what the command found. 128 + N: stopped by signal N.
    """
    args = sys.argv[1:] if args is None else args
    if ranks.is_rank():
        stopping.outlive_parent(grace=20, step=60)
    try:
        with stopping.listening():
            status = _run(args)
            sys.stdout.flush()
            stopping.check()
    except BaseException as error:
        if locks := sys.modules.get(f"{__package__}.models.locks"):
            locks.Hold.drop_all()
        _end(error, args)
    if status:
        sys.exit(status)


def _run(args: list[str]) -> int | None:
    """One command's exit status."""
    if args and args[0] in EXPERIMENT:
        _function("commands.lightning_cli:run")(args)
        return 0
    if args and args[0] in CONFIGURED:
        function, replaced = _function(CONFIGURED[args[0]][0]), REPLACED.get(args[0], {})
        _function("commands.lightning_cli:call")(function, args[1:], replaced)
        return 0
    options = _parser().parse_args(args)
    return options.command(options)


def _end(error: BaseException, args: list[str]) -> NoReturn:
    """Say why a command ended, on one of its processes; exit."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        error = error.__context__  # Lightning turns an interruption into a plain exit
    if isinstance(error, KeyboardInterrupt):
        error = stopping.Stopped(signal.SIGINT)
    if isinstance(error, SystemExit):
        error = _flushed() or error
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, BrokenPipeError) and (gone := [s for s in (sys.stdout, sys.stderr) if _reader_left(s)]):
        for stream in gone:  # what is still in its buffer must not fail once more when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, stopping.Stopped):
        named = next((f"{' '.join(args[:n])}" for n in (1, 2) if " ".join(args[:n]) in KEPT), "")
        kept = error.kept or KEPT.get(named, "nothing half-written is left; the same command starts anew")
        status, text = (
            error.status,
            f"stopped by {signal.Signals(error.signum).name}{' ' if error.kept else ': '}{kept}",
        )
        trouble = ""
    else:
        found = describe(error)
        status, text = found.status, found.message
        trouble = (
            "".join(traceback.format_exception(error))
            if found.kind == BUG or os.environ.get("VIDEOALIGN_DEBUG")
            else ""
        )
        if found.kind == BUG:
            text = f"{text}. {REPORT}"
    status, speaker = ranks.speaks(status, not isinstance(error, stopping.Stopped) and lost_peer(error))
    if speaker is not None:
        everywhere = isinstance(error, stopping.Stopped | EverywhereError)
        head = "" if isinstance(error, stopping.Stopped) else "error: "
        who = f"{speaker}: " if speaker and not everywhere else ""
        with contextlib.suppress(OSError):
            print(f"{trouble}videoalign: {head}{who}{text}", file=sys.stderr, flush=True)
    sys.exit(status)


def _flushed() -> OSError | None:
    """Write what is still in the buffer of standard output; why that cannot be done."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _reader_left(stream: Any) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _function(path: str) -> Callable:
    """`package.module:function`, imported only when it is used: `--help` need not wait for torch."""
    module, name = path.split(":")
    return getattr(import_module(f".{module}", __package__), name)


class Progress:
    """Rate and time left of long work, on a terminal's last line or now and then in a log."""

    def __init__(self) -> None:
        self.what, self.started, self.shown = "", 0.0, 0.0

    def __call__(self, what: str, done: int, of: int) -> None:
        """``done`` of ``of`` things called ``what``."""
        stopping.check()
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if what != self.what:
            self.what, self.started, self.shown = what, now, now
        if done == of or now - self.shown > (0.2 if terminal else 20):
            self.shown = now
            rate = done / max(now - self.started, 1e-9)
            text = f"{what}: {done}/{of}, {rate:.0f}/s, {(of - done) / rate:.0f} s left"
            print(
                f"\r{text}\033[K" if terminal else text,
                end="\n" if done == of or not terminal else "",
                file=sys.stderr,
                flush=True,
            )


def _pool(workers: int) -> contextlib.AbstractContextManager:
    """Processes that decode or render."""
    return _function("datamodules.parallel:pool")(workers)


def _count(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argument's type: a whole number from ``least`` on."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or not least <= int(text) <= most:
            upto = "on" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} {upto}, got {text!r}")
        return int(text)

    return parse


def _sampling(o: argparse.Namespace) -> Any:
    from .models.frame_sampling import FrameSampling

    return FrameSampling(
        fps=o.fps if o.num_frames is None else None,
        num_frames=o.num_frames,
        max_pixels=o.max_pixels,
        min_pixels=o.min_pixels,
    )


def _import_csv(o: argparse.Namespace) -> None:
    with _pool(o.workers) as pool:
        report = _function("datamodules.import_csv:import_csv")(
            Path(o.ratings),
            Path(o.videos),
            Path(o.out),
            o.kind,
            o.skip_bad_rows,
            o.allow_missing,
            pool,
            Progress(),
            o.seed,
        )
    print(report.text())


def _import_videos(o: argparse.Namespace) -> None:
    with _pool(o.workers) as pool:
        print(
            _function("datamodules.video_sets:import_videos")(
                Path(o.table), Path(o.videos), Path(o.out), o.skip_bad_rows, pool, Progress(), o.seed
            )
        )


def _join(o: argparse.Namespace) -> None:
    print(_function("datamodules.video_sets:join")([Path(path) for path in o.sets], Path(o.out), o.sources, Progress()))


def _import_benchmark(o: argparse.Namespace) -> None:
    name = o.benchmark.replace("-", "_")
    more = {"split": o.split} if "split" in o else {}
    with _pool(o.workers) as pool:
        report = _function(f"datamodules.import_benchmarks:import_{name}")(
            Path(o.source),
            Path(o.out),
            Path(o.videos) if o.videos else None,
            skip_bad_rows=o.skip_bad_rows,
            allow_missing=o.allow_missing,
            pool=pool,
            progress=Progress(),
            seed=o.seed,
            **more,
        )
    print(report.text())


def _pairs_from_rewards(o: argparse.Namespace) -> None:
    weights = _function("datamodules.latents:Weights")(*o.weights)
    text = _function("commands.preference_pairs:pairs_from_rewards")(
        _judge(o), o.data, o.out, o.mode, weights, o.margin
    )
    print(text or "", end="\n" if text else "")


def _weights(text: str) -> dict[str, float]:
    """An argument's type: VQ=0.1,MQ=0.1,TA=0.8."""
    try:
        return {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like VQ=0.1,MQ=0.1,TA=0.8, got {text!r}") from None


def _generate(o: argparse.Namespace) -> None:
    steering = {name: value for name in ("weights", "strength") if (value := getattr(o, name)) is not None}
    if steering and not o.noisy_reward:
        raise VideoAlignError(
            f"--{' and --'.join(steering)} steer by a noisy reward: name its folder with --noisy-reward"
        )
    guide = (
        {"noisy_reward": o.noisy_reward, "guide": _function("models.guidance:Guidance")(**steering)}
        if o.noisy_reward
        else {}
    )
    _function("commands.generating:generate")(
        guide
        | {
            name: value
            for name in (
                "generator",
                "num_frames",
                "height",
                "width",
                "fps",
                "steps",
                "cfg_scale",
                "lora",
                "negative",
                "dtype",
                "source",
            )
            if (value := getattr(o, name)) is not None
        },
        {"prompts": o.prompts, "out": o.out, "samples": o.samples, "batch_size": o.batch_size, "seed": o.seed},
        o.device,
        o.devices,
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"videos in {o.out}; `videoalign shards info {o.out}` describes them")


def _verify(o: argparse.Namespace) -> int:
    shards = _function("datamodules.verify:open_damaged")(o.folder)
    damage = list(_function("datamodules.verify:verify")(shards))
    print(
        "\n".join(damage)
        if damage
        else f"{o.folder} is sound: {shards.index.samples} {shards.index.kind} in {len(shards.index.shards)} shards"
    )
    return int(bool(damage))


def _info(o: argparse.Namespace) -> None:
    print(_function("datamodules.info:info")(o.folder))


def _index(o: argparse.Namespace) -> None:
    print(f"{o.folder}: tables of contents of {_function('datamodules.shards:add_contents')(o.folder)} samples")


def _encode_frames(o: argparse.Namespace) -> None:
    shards = _function("datamodules.shards:ShardSet")(o.source)
    if o.model:
        processor = _function("models.processor:processor_of")(Path(o.model))
        sampling, factor = processor.sampling, processor.factor
    else:
        sampling, factor = _sampling(o), o.factor
    progress = Progress()
    with _pool(o.workers) as pool:
        for done in _function("datamodules.frames:encode_frames")(shards, o.out, sampling, factor, pool):
            progress("samples decoded", done, shards.index.samples)


def _judge(o: argparse.Namespace) -> Any:
    """The reward model that the options describe."""
    _function("commands.lightning_cli:quiet")()
    names = ("model", "backbone", "template", "official_repo", "checkpoint_step", "dtype")
    names += ("batch_size", "workers", "device", "devices")
    return _function("commands.reward_judge:RewardJudge")(**{n: getattr(o, n) for n in names if n in o})


def _score(o: argparse.Namespace) -> int:
    return _function("commands.scoring:score")(_judge(o), o.video, o.prompt, o.csv, o.raw)


def _bench(o: argparse.Namespace) -> None:
    _function("commands.benchmarking:bench")(_judge(o), o.data, o.out, o.benchmark, o.overall, o.ways, o.min_pixels)


def _convert(o: argparse.Namespace) -> None:
    _function("commands.reward_export:convert")(_judge(o), o.out, o.with_backbone)


def _export(o: argparse.Namespace) -> None:
    _function("commands.lightning_cli:quiet")()
    _function("commands.reward_export:export")(o.checkpoint, o.out, o.with_backbone, o.backbone)


def _sprites(o: argparse.Namespace) -> None:
    size = _function("miniature.world.rendered_sets:WorldSize")(
        train=o.train,
        val=o.val,
        benchmark_videos=o.benchmark_videos,
        benchmark_pairs=o.benchmark_pairs,
        captions=o.captions,
        clips=o.clips,
    )
    progress = Progress()
    with _pool(o.workers) as pool:
        for place in _function("miniature.world.rendered_sets:write_world")(o.out, size, o.seed, pool):
            progress(*place)


def _miniature(o: argparse.Namespace) -> None:
    _function("commands.lightning_cli:quiet")()
    corpus = [content.prompt for content in import_module(".miniature.world.sprites", __package__).CONTENTS]
    make = (
        "miniature.networks.pipelines:make_generator"
        if o.family in ("wan", "ltx")
        else "miniature.networks.qwen:make_qwen"
    )
    if o.max_tokens and make.endswith("make_qwen"):
        raise VideoAlignError("--max-tokens is for Wan and LTX pipelines; a reward model reads prompts of any length")
    more = {"max_tokens": o.max_tokens} if o.max_tokens else {}
    _function(make)(o.out, o.family, corpus, o.hidden, o.layers, seed=o.seed, **more)


def _demo(o: argparse.Namespace) -> None:
    _function("miniature.study.demo:demo")(o.out, o.seed)


def _paper(o: argparse.Namespace) -> None:
    _function("miniature.study.paper:paper")(o.out, o.seeds, o.first, o.processes)


EXTRA = ("fastapi", "jinja2", "krippendorff", "pydantic", "sqlalchemy", "starlette", "uvicorn")


def _annotate(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of `annotate`, whose options have the names of the function's arguments."""

    def command(options: argparse.Namespace) -> None:
        try:
            _function(f"annotation.commands:{name}")(**{k: v for k, v in vars(options).items() if k != "command"})
        except ModuleNotFoundError as error:
            if error.name not in EXTRA:
                raise
            raise VideoAlignError(
                f"{error.name} is not installed; annotate needs it: pip install 'videoalign[annotate]'"
            ) from None

    return command


def _parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="videoalign",
        description="Video generation with human feedback: from rated pairs to a benchmarked reward model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"videoalign {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function: Callable | None, text: str, where: Any = commands) -> argparse.ArgumentParser:
        sub = where.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(command=function)
        return sub

    for name, text in EXPERIMENT.items():
        add(name, None, f"{text} (videoalign {name} --config experiments/....yaml; --help shows its options)")

    for name, (_, text) in CONFIGURED.items():
        add(name, None, f"{text} (videoalign {name} --config experiments/....yaml; --help shows its options)")

    shards = add("shards", None, "make, check and look at sets of shards: import-*, verify, info, encode-frames")
    kinds = shards.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = add(
        "import-csv", _import_csv, "write the rated pairs of a CSV (the official repository's columns) as a set", kinds
    )
    sub.add_argument("ratings", help="CSV: path_A, path_B, prompt, VQ, MQ, TA and more")
    sub.add_argument("--videos", required=True, help="folder or zip archive that the paths are relative to")
    sub.add_argument("--out", required=True, help="folder to make")
    sub.add_argument(
        "--kind",
        choices=("pairs", "videos"),
        default="pairs",
        help="pairs to train on, or videos + pairs.csv to benchmark with",
    )
    imports = [sub]
    unrated = add(
        "import-videos", _import_videos, "write videos that nobody rated yet as a set, to rate or to score", kinds
    )
    unrated.add_argument("table", help="CSV: path, prompt, source (the model that made the video)")
    unrated.add_argument("--videos", required=True, help="folder or zip archive that the paths are relative to")
    unrated.add_argument("--skip-bad-rows", action="store_true", help="leave unsound rows out instead of stopping")
    joined = add("join", _join, "write several videos sets as one, such as samples of several generators", kinds)
    joined.add_argument("sets", nargs="+", help="videos sets")
    joined.add_argument(
        "--sources", nargs="+", default=[], help="names of the models, one for each set; else what the records say"
    )
    for sub in (unrated, joined):
        sub.add_argument("--out", required=True, help="folder to make")
    for benchmark, what in (
        ("videogen-rewardbench", "folder with videogen-rewardbench.csv, and videos/ or videos.zip"),
        ("genai-bench", "parquet, JSON or JSON-lines file, a folder of them, or one of the datasets library"),
    ):
        sub = add(f"import-{benchmark}", _import_benchmark, "write a public benchmark as videos + pairs.csv", kinds)
        sub.set_defaults(benchmark=benchmark)
        sub.add_argument("source", help=what)
        sub.add_argument("--videos", help="folder or zip archive that its paths are relative to, if not beside it")
        if benchmark == "genai-bench":
            sub.add_argument("--split", help="which one, where there are several")
        sub.add_argument("--out", required=True, help="folder to make")
        imports.append(sub)
    for sub in (*imports, unrated):
        sub.add_argument("--seed", type=_count(0), default=0, help="seed of the order in which samples are stored")
    for sub in imports:
        sub.add_argument("--skip-bad-rows", action="store_true", help="leave unsound rows out instead of stopping")
        sub.add_argument("--allow-missing", action="store_true", help="leave out pairs whose videos are not there")
    sub = add(
        "verify", _verify, "read a set again, all of it, and list its damage (exit status 1 if there is any)", kinds
    )
    sub.add_argument("folder")
    sub = add("info", _info, "print what a set holds", kinds)
    sub.add_argument("folder")
    sub = add("index", _index, "write the tables of contents of a set of an earlier release, or anew", kinds)
    sub.add_argument("folder")
    sub = add(
        "encode-frames", _encode_frames, "decode a set once: store the sampled, resized frames without loss", kinds
    )
    sub.add_argument("source", help="set with mp4 files")
    sub.add_argument("--out", required=True, help="folder to make")
    sub.add_argument("--model", help="exported reward model whose sampling to use, in place of the options below")
    sub.add_argument("--fps", type=float, default=2.0, help="sampled frames per second")
    sub.add_argument("--num-frames", type=int, help="a fixed number of frames instead")
    sub.add_argument("--max-pixels", type=int, default=448 * 448, help="pixel budget of a frame")
    sub.add_argument("--min-pixels", type=int, default=128 * 28 * 28, help="smaller frames are enlarged")
    sub.add_argument(
        "--factor", type=_count(1), default=28, help="frame sides become multiples of this (patch x merge)"
    )

    relabel = add(
        "pairs-from-rewards", _pairs_from_rewards, "score a set's videos and write preference pairs of them", kinds
    )
    relabel.add_argument(
        "--data", required=True, help="videos set, such as `videoalign generate` writes (relabel: pairs set)"
    )
    relabel.add_argument("--out", required=True, help="folder to make")
    relabel.add_argument(
        "--mode",
        choices=("best-worst", "margin", "relabel"),
        default="best-worst",
        help="of each prompt the best against the worst, or all pairs above the margin, or new labels for a pairs set",
    )
    relabel.add_argument(
        "--weights",
        type=float,
        nargs=3,
        default=(1.0, 1.0, 1.0),
        metavar=("VQ", "MQ", "TA"),
        help="of the dimensions in what is better",
    )
    relabel.add_argument(
        "--margin", type=float, default=0.0, help="least difference of the weighted rewards, in deviations"
    )
    generate = add(
        "generate",
        _generate,
        "sample videos of prompts from a Wan or LTX pipeline, as a videos set with recorded seeds. Samples to "
        "train on are best drawn with --cfg-scale 1: guided ones teach the guidance, not a preference",
    )
    generate.add_argument("--generator", required=True, help="pipeline folder or hub id")
    generate.add_argument("--prompts", required=True, help="CSV with a column prompt, or text file with one a line")
    generate.add_argument("--out", required=True, help="folder to make; an interrupted run goes on there")
    generate.add_argument("--samples", type=_count(1), default=1, help="videos per prompt")
    for name, value in (("num-frames", 81), ("height", 480), ("width", 832), ("fps", 16), ("steps", 50)):
        generate.add_argument(
            f"--{name}", type=_count(1), default=value, help="of the scheduler" if name == "steps" else "of the videos"
        )
    generate.add_argument("--cfg-scale", type=float, default=1.0, help="classifier-free guidance scale; 1 turns it off")
    generate.add_argument("--noisy-reward", help="folder of a noisy reward that steers sampling (Flow-NRG)")
    generate.add_argument(
        "--weights",
        type=_weights,
        help="with --noisy-reward: of the dimensions, like VQ=0.1,MQ=0.1,TA=0.8; else a third each",
    )
    generate.add_argument(
        "--strength",
        type=float,
        help="with --noisy-reward: in deviations of the reward; 0 leaves samples as they are, else 100",
    )
    generate.add_argument("--lora", help="folder of adapters in diffusers' format")
    generate.add_argument("--negative", help="prompt to steer away from")
    generate.add_argument("--source", help="name of the model in the records")
    score = add("score", _score, "print the rewards of videos, a JSON object a line")
    score.add_argument("--video", action="append", default=[], help="a video file; repeat with --prompt")
    score.add_argument("--prompt", action="append", default=[], help="the text that it was made from")
    score.add_argument("--csv", help="CSV with the columns path and prompt (paths relative to it)")
    score.add_argument("--raw", action="store_true", help="without normalisation by the model's statistics")
    bench = add("bench", _bench, "print and save the accuracies of a reward model on videos + pairs.csv sets")
    bench.add_argument("--data", required=True, action="append", help="folder of a set; may be repeated")
    bench.add_argument(
        "--out", default="runs/bench", help="folder for rewards, results and pictures; an interrupted run goes on there"
    )
    bench.add_argument(
        "--benchmark",
        choices=("videogen-rewardbench", "genai-bench"),
        help="public benchmark that the set is: its "
        "frame rate and size, and published numbers beside the measured ones",
    )
    bench.add_argument(
        "--overall",
        choices=("sum", "VQ", "MQ", "TA"),
        help="what is compared with overall labels (sum; TA for genai-bench)",
    )
    bench.add_argument("--ways", type=int, choices=(3, 4), default=3, help="4: GenAI-Bench's four classes besides")
    bench.add_argument(
        "--min-pixels",
        type=_count(0),
        help="enlarge smaller frames to this area, in place of what the benchmark or the model says; 0 enlarges none",
    )
    convert = add("convert", _convert, "write an official VideoReward as a folder of safetensors and JSON")
    convert.add_argument("--from", dest="model", required=True, help="official folder: model_config.json, checkpoint-N")
    convert.add_argument("--out", required=True, help="folder to make")
    convert.add_argument("--with-backbone", action="store_true", help="copy the backbone along")
    for sub in (score, bench, relabel):
        sub.add_argument("--model", required=True, help="reward model: a folder of this package or an official one")
    for sub in (score, bench, relabel, convert):
        sub.add_argument("--backbone", help="the model's backbone, if not where the folder says")
        sub.add_argument("--template", help="official folders only: text file with the official template")
        sub.add_argument(
            "--official-repo", help="official folders only: clone of the VideoAlign repository to read it from"
        )
        sub.add_argument(
            "--checkpoint-step", type=_count(0), help="official folders only: which checkpoint; else the latest"
        )
    for sub in (score, bench, relabel, convert, generate):
        sub.add_argument(
            "--dtype", choices=("float32", "bfloat16"), help="of the weights, if not the folder's (generate: float32)"
        )
    for sub in (score, bench, relabel, generate):
        size = 1 if sub is generate else 8  # a generator's videos are large
        sub.add_argument("--batch-size", type=_count(1), default=size, help="videos per step")
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu", "cuda"), help="where to compute")
    export = add("export", _export, "write the reward model of a checkpoint as a folder of safetensors and JSON")
    export.add_argument("--checkpoint", required=True, help=".ckpt file inside a run's folder")
    export.add_argument("--out", required=True, help="folder to write")
    export.add_argument("--backbone", help="the model's backbone, if not where it was")
    export.add_argument("--with-backbone", action="store_true", help="copy the backbone along")

    sprites = add("sprites", _sprites, "render the miniature world: rated pairs, two benchmarks, captioned clips")
    sprites.add_argument("--out", required=True, help="folder to make")
    for name, value, text in (
        ("train", 6000, "rated pairs"),
        ("val", 400, "held-out pairs"),
        ("benchmark-videos", 480, "videos per benchmark"),
        ("benchmark-pairs", 1500, "rated pairs per benchmark"),
        ("captions", 3000, "captioned clips"),
        ("clips", 4000, "clips to train a generator on"),
    ):
        sprites.add_argument(f"--{name}", type=_count(1), default=value, help=text)
    mini = add(
        "miniature",
        _miniature,
        "write a miniature folder with random weights: a Qwen-VL model, or a Wan or LTX pipeline",
    )
    mini.add_argument("--out", required=True, help="folder to make")
    mini.add_argument(
        "--family",
        choices=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "wan", "ltx"),
        default="qwen2_vl",
        help="architecture",
    )
    mini.add_argument("--hidden", type=int, default=64, help="width")
    mini.add_argument(
        "--max-tokens", type=_count(1), help="longest prompt of a Wan or LTX pipeline, if not the family's"
    )
    mini.add_argument("--layers", type=_count(1), default=4, help="depth of the language model or transformer")
    demo = add(
        "demo", _demo, "the whole paper in miniature: world, reward model, generator, alignment, guidance, one report"
    )
    demo.add_argument("--out", default="runs/demo", help="folder; finished stages in it are not repeated")
    paper = add(
        "paper",
        _paper,
        "reproduce the paper's findings in miniature, over seeds, with intervals and verdicts: RESULTS.md",
    )
    paper.add_argument("--out", default="runs/paper", help="folder; several machines that see it may share the work")
    paper.add_argument(
        "--seeds", type=_count(1), default=5, help="how many; a later call with more adds the missing ones"
    )
    paper.add_argument("--first", type=_count(0), default=0, help="the first seed")
    paper.add_argument(
        "--processes", type=_count(1), help="that work at once on this machine; one per core if not given"
    )
    for sub in (bench, relabel, generate):
        sub.add_argument("--devices", type=_count(1), default=1, help="processes that share the videos")
    for sub in (sprites, mini, generate, demo):
        sub.add_argument("--seed", type=_count(0), default=0, help="of everything random")
    annotate = add("annotate", None, "collect preferences: pairs to rate, a page to rate them on, agreement, export")
    people = annotate.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = add("serve", _annotate("serve"), "serve the page; a file that is not there yet is begun", people)
    first = add("begin", _annotate("begin"), "choose the pairs to rate and begin a file of votes", people)
    for sub in (serve, first):
        sub.argument_default = argparse.SUPPRESS  # begin's own defaults hold; serve knows what was given
        sub.add_argument("--videos", required=True, help="videos set with several sources per prompt")
        sub.add_argument("--db", required=True, help="file of votes (SQLite)")
        sub.add_argument("--per-prompt", type=_count(1), help="pairs of each prompt (default 3)")
        sub.add_argument("--validation", type=float, help="share of the prompts held out for validation (default 0.1)")
        sub.add_argument("--benchmark", type=float, help="and for a benchmark (default 0.1)")
        sub.add_argument("--seed", type=_count(0), help="of the choice of pairs (default 0)")
        sub.add_argument(
            "--protocol", help="YAML with rules that differ from the paper's: votes, overall, scores, repeats, ..."
        )
        sub.add_argument("--references", help="CSV of a training round: key_A, key_B, VQ, MQ, TA")
        sub.add_argument(
            "--select", choices=("random", "uncertain"), help="which pairs are rated first (default random)"
        )
        sub.add_argument("--model", nargs="+", help="one or two reward models that say what is uncertain")
        sub.add_argument("--device", choices=("auto", "cpu", "gpu"), help="where they compute (default auto)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is this machine alone")
    serve.add_argument("--port", type=_count(1, 65535), default=8000, help="to listen at")
    serve.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names under which people open the page, such as that of a proxy before it; all others are refused but 127.0.0.1, "
        "localhost, [::1] and --host",
    )
    serve.add_argument(
        "--guideline",
        help="YAML of your own in the place of the paper's: title, question, points, good, bad of each part",
    )
    labels = add(
        "import-label-studio",
        _annotate("import_label_studio"),
        "read Label Studio's pairwise ratings into a file of votes",
        people,
    )
    labels.add_argument("file", help="JSON export")
    labels.add_argument("--videos", required=True, help="the set that was rated")
    labels.add_argument("--reviewer", nargs="*", default=[], help="people whose votes are final")
    labels.add_argument(
        "--names",
        choices=("both", "paths", "keys", "files"),
        default="both",
        help="what names the videos in the export: paths of the set's records, its keys, or file names in whatever folder; both reads paths "
        "and keys, and refuses names that could be either",
    )
    labels.add_argument("--protocol", help="YAML of rules")
    labels.add_argument("--validation", type=float, default=0.1, help="share of the prompts held out for validation")
    labels.add_argument("--benchmark", type=float, default=0.1, help="and for a benchmark")
    labels.add_argument("--seed", type=_count(0), default=0, help="of that choice")
    guest = add("invite", _annotate("invite"), "print a secret link for one person", people)
    guest.add_argument("name", help="of the person, for the record")
    guest.add_argument(
        "--role", choices=("annotator", "reviewer"), default="annotator", help="reviewers decide where votes differ"
    )
    guest.add_argument("--url", default="http://127.0.0.1:8000", help="where the page is served")
    trial = add(
        "simulate", _annotate("simulate"), "measure in the miniature world what uncertain pairs first are worth", people
    )
    trial.add_argument("--out", default="runs/simulation", help="folder; finished stages in it are not repeated")
    trial.add_argument("--seeds", type=_count(1), default=3, help="how many")
    revoke = add("revoke", _annotate("revoke"), "make a person's link worthless", people)
    revoke.add_argument("name", help="of the person")
    status = add("status", _annotate("status"), "print progress, agreement and people as JSON", people)
    write = add("export", _annotate("write"), "write the decided pairs as shards, with a data card", people)
    write.add_argument("--videos", required=True, help="the set that was rated")
    write.add_argument("--out", required=True, help="folder to make")
    write.add_argument("--names", action="store_true", help="call people by their names, not by numbers")
    for sub in (guest, revoke, status, write, labels):
        sub.add_argument("--db", required=True, help="file of votes")
    pools, loaders = (*imports, unrated, kinds.choices["encode-frames"], sprites), (score, bench, relabel)
    for sub in (*pools, *loaders):  # a loader with 0 workers decodes in the process that computes
        least, most = int(sub in pools), min(os.cpu_count() or 1, 8)
        sub.add_argument("--workers", type=_count(least), default=most, help="processes that decode or render")
    return parser
