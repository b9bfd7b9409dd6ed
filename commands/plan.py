"""`videoalign plan`: the memory that an experiment will need, before any weights are there."""

import argparse

from .. import VideoAlignError
from .config_files import configured
from .parsing import Commands, Parser, command, count

ALONE = "nothing is written; the same command starts anew"


def register(commands: Commands) -> None:
    """Add the command."""
    text = "print how much GPU memory a training experiment needs, from shapes alone"
    parser = command(commands, "plan", None, text, ALONE)
    parser.usage = "videoalign plan --config FILE [--config FILE ...] [options] [--KEY VALUE ...]"
    parser.add_argument("--config", "-c", action="append", help="YAML file, as for fit; may be given repeatedly")
    _options(parser)
    parser.epilog = "Every option of `videoalign fit` can follow: keys of the YAML files, such as --model.lora.rank 16."


def _options(parser: argparse.ArgumentParser) -> None:
    """Options of the command beside those of `videoalign fit`."""
    parser.add_argument("--num-frames", type=count(1), help="frames of a clip, where there are no latents yet")
    parser.add_argument("--height", type=count(1), help="height of a clip in pixels, where there are no latents yet")
    parser.add_argument("--width", type=count(1), help="width of a clip in pixels, where there are no latents yet")
    parser.add_argument(
        "--image", action="store_true", help="count clips that begin with an image, where the generator also takes none"
    )
    parser.add_argument("--gpus", type=count(1), help="number of GPUs of DDP and FSDP2, if not the experiment's")
    parser.add_argument("--json", metavar="FILE", help="file that gets the same numbers, in bytes")


def run(args: list[str]) -> None:
    """Run the command.

    Args:
        args: Arguments behind the command's name: its own options, and those of `videoalign fit`.

    Raises:
        VideoAlignError: Where no experiment is named, or it cannot be counted.
    """
    own = Parser(prog="videoalign plan", add_help=False)
    _options(own)
    options, rest = argparse.ArgumentParser.parse_known_args(own, args)  # what is not its own is fit's
    if not any(word.partition("=")[0] in ("-c", "--config") for word in rest):
        raise VideoAlignError("plan needs an experiment: videoalign plan --config FILE, as for videoalign fit")
    fit = configured(["fit", *rest])  # before anything heavy is imported
    from .planning import plan

    plan(fit, options)
