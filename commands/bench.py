"""`videoalign bench`: a reward model's or judge's accuracies on benchmarks."""

import argparse
from typing import TYPE_CHECKING, Any

from .. import VideoAlignError
from .parsing import Commands, add_judge, command, count, judge_of

if TYPE_CHECKING:
    from .judge import Judge

OFFICIAL = ("backbone", "template", "official_repo", "checkpoint_step", "dtype")
"""Options that only a reward model's folder has."""


def register(commands: Commands) -> None:
    """Add the command."""
    text = "print and save the accuracies of a reward model on videos + pairs.csv sets"
    kept = "rewards that were computed are kept; the same command goes on"
    parser = command(commands, "bench", _run, text, kept)
    parser.add_argument("--data", required=True, action="append", help="folder of a benchmark set; may be repeated")
    parser.add_argument(
        "--out", default="runs/bench", help="folder of rewards, results and pictures; an interrupted run goes on there"
    )
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        help="benchmark that the set is: sets its frame rate and size, and shows published numbers beside yours. "
        "videogen-rewardbench, genai-bench, one that an installed package offers, or the import path of a "
        "BenchmarkProtocol (package.module:NAME)",
    )
    parser.add_argument(
        "--overall",
        choices=("sum", "VQ", "MQ", "TA"),
        help="reward that is compared with overall labels (default: sum; TA with --benchmark genai-bench)",
    )
    parser.add_argument(
        "--ways",
        type=int,
        choices=(3, 4),
        default=3,
        help="number of classes of preferences; 4 also counts GenAI-Bench's, which tell both good from both bad",
    )
    parser.add_argument(
        "--min-pixels",
        type=count(0),
        help="enlarge smaller frames to this area, in place of what the benchmark or the model says; 0 enlarges none",
    )
    parser.add_argument(
        "--judge",
        metavar="NAME",
        help="judge in place of --model: one that an installed package offers, or the import path of its class "
        "(package.module:Name). It reads the videos in its own way; options of reward models do not hold for it",
    )
    parser.add_argument(
        "--judge-args", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the judge's class, as in YAML"
    )
    add_judge(parser, required=False)


def _run(o: argparse.Namespace) -> None:
    if (o.model is None) == (o.judge is None):
        raise VideoAlignError("bench measures one judge: name a reward model by --model, or another judge by --judge")
    if o.judge_args and not o.judge:
        raise VideoAlignError("--judge-args are of a judge: name it by --judge")
    if given := [name for name in OFFICIAL if o.judge and getattr(o, name) is not None]:
        raise VideoAlignError(f"--{given[0].replace('_', '-')} is of reward models (--model), not of --judge {o.judge}")
    from .benchmarking import bench

    judge = judge_of(o) if o.model else _named(o.judge, o.judge_args)
    bench(judge, o.data, o.out, o.benchmark, o.overall, o.ways, o.min_pixels)


def _named(name: str, given: list[str]) -> "Judge":
    """A judge by name, with arguments as KEY=VALUE."""
    import yaml

    from .judge import named
    from .quiet import quiet

    quiet()
    args: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key in args:
            raise VideoAlignError(f"--judge-args takes KEY=VALUE, each key once, got {text!r}")
        try:
            args[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise VideoAlignError(f"--judge-args {key}: {value!r} is no YAML ({str(error).splitlines()[0]})") from None
    return named(name, args)
