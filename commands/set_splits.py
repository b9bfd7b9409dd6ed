"""`videoalign shards split` and `shards overlap`: held-out sets, and what two sets have in common."""

import argparse
import math
import re

from ..bars import Progress
from ..datamodules.splitting import WAYS
from .parsing import Commands, add_out, add_seed, command

SPLIT = (
    "copy a set to several ones that share no video: to train on, to validate, to test. Any kind of set can be split; "
    "files are copied byte by byte. A group of samples that have something in common is never cut: by prompt, samples "
    "of one prompt or of one video (prompts are equal whatever their capitals and spaces, and in Unicode's compatible "
    "form; videos are equal if size and checksum are); by video, samples of one video; by source, samples of models "
    "of one share, so that pairs which compare models of different shares are left out, and counted. The shares are "
    "met as closely as the groups allow, largest groups first, groups of one size in an order that depends on the "
    "seed; the result does not depend on the order of the samples"
)


def shares(text: str) -> dict[str, float]:
    """An argument's type: train=0.9,val=0.1; names of folders, and numbers above 0 that add up to 1."""
    parts = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    try:
        values = [float(value) for _, _, value in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like train=0.9,val=0.1, got {text!r}") from None
    if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} names a folder: only letters, digits, - and _ may occur in it")
    if len(set(names)) < len(names) or len(names) < 2:
        raise argparse.ArgumentTypeError(f"must name two shares or more, each once, got {text!r}")
    if not all(value > 0 for value in values) or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise argparse.ArgumentTypeError(f"must be above 0 and add up to 1, got {text!r}, which gives {sum(values):g}")
    return dict(zip(names, values))


def held_out(text: str) -> float:
    """An argument's type: a share between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a share between 0 and 1, such as 0.1, got {text!r}")
    return value


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """Add ``--held-out``, with which an import writes two sets."""
    parser.add_argument(
        "--held-out",
        type=held_out,
        default=0.0,
        metavar="SHARE",
        help="write two sets that share no prompt and no video, OUT/train and OUT/val, the latter with about this "
        "share of the samples; as `shards split --by prompt` would, with the same seed",
    )


def register(shards: Commands) -> None:
    """Add the commands."""
    parser = command(shards, "split", _split, SPLIT)
    parser.add_argument("folder", help="folder of the set")
    parser.add_argument("--by", choices=WAYS, default="prompt", help="what the samples of a group have in common")
    parser.add_argument(
        "--shares",
        type=shares,
        default="train=0.9,val=0.1",
        metavar="NAME=SHARE,...",
        help="names and sizes of the sets, which add up to 1",
    )
    add_out(parser, "folder that is written, with a folder for each share; it must not exist yet")
    add_seed(parser, "seed of the choice")
    text = "list the prompts and videos that two sets share, such as one to train on and a benchmark (exit status 1)"
    parser = command(shards, "overlap", _overlap, text)
    parser.add_argument("one", help="folder of a set")
    parser.add_argument("other", help="folder of another set")


def _split(o: argparse.Namespace) -> None:
    from ..datamodules.split_sets import split

    print(split(o.folder, o.out, o.by, o.shares, o.seed, Progress()))


def _overlap(o: argparse.Namespace) -> int:
    from ..datamodules.split_sets import overlap

    text, found = overlap(o.one, o.other)
    print(text)
    return int(found)
