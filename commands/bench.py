"""`videoalign bench`: a reward model's accuracies on benchmarks."""

import argparse

from .parsing import Commands, add_judge, command, count, judge_of


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
        choices=("videogen-rewardbench", "genai-bench"),
        help="public benchmark that the set is: sets its frame rate and size, and shows published numbers beside yours",
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
    add_judge(parser)


def _run(o: argparse.Namespace) -> None:
    from .benchmarking import bench

    bench(judge_of(o), o.data, o.out, o.benchmark, o.overall, o.ways, o.min_pixels)
