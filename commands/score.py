"""`videoalign score`: rewards of single videos."""

import argparse

from .parsing import Commands, add_judge, command, judge_of


def register(commands: Commands) -> None:
    """Add the command."""
    kept = "the rewards that were printed are whole; the same command starts anew"
    parser = command(commands, "score", _run, "print the rewards of videos, a JSON object a line", kept)
    parser.add_argument("--video", action="append", default=[], help="a video file; repeat it with --prompt")
    parser.add_argument("--prompt", action="append", default=[], help="the text that the video was made from")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        help="the image that the video begins with, where the model is shown it; repeat it with --video",
    )
    text = "CSV with the columns path and prompt (and image), where paths are relative to the CSV"
    parser.add_argument("--csv", help=text)
    parser.add_argument("--raw", action="store_true", help="do not normalise by the model's statistics")
    add_judge(parser, devices=False)


def _run(o: argparse.Namespace) -> int:
    from .score_files import score

    return score(judge_of(o), o.video, o.prompt, o.csv, o.raw, o.image)
