"""`videoalign shards pairs-from-rewards`: preference pairs of a generator's own samples, labelled by a reward model."""

import argparse

from .parsing import GOES_ON, Commands, add_judge, add_out, command, judge_of


def register(commands: Commands) -> None:
    """Add the command."""
    text = "score a set's videos and write preference pairs of them"
    parser = command(commands, "pairs-from-rewards", _run, text, GOES_ON)
    parser.add_argument(
        "--data", required=True, help="videos set, such as `videoalign generate` writes; relabel takes a pairs set"
    )
    add_out(parser)
    parser.add_argument(
        "--mode",
        choices=("best-worst", "margin", "relabel"),
        default="best-worst",
        help="which pairs: the best and the worst video of each prompt, all above the margin, or a set labelled anew",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs=3,
        default=(1.0, 1.0, 1.0),
        metavar=("VQ", "MQ", "TA"),
        help="weights of the dimensions in the sum that decides which video is better",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="least difference of the weighted rewards, in standard deviations, with which a video is better",
    )
    add_judge(parser)


def _run(o: argparse.Namespace) -> None:
    from ..datamodules.judgements import Weights
    from .preference_pairs import pairs_from_rewards

    text = pairs_from_rewards(judge_of(o), o.data, o.out, o.mode, Weights(*o.weights), o.margin)
    print(text or "", end="\n" if text else "")
