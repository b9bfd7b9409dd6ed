"""`videoalign shards copy`: a set from one place to another."""

import argparse

from ..bars import Progress
from .parsing import GOES_ON, Commands, command


def register(shards: Commands) -> None:
    """Add the command.

    Args:
        shards: Where commands about sets are added.
    """
    text = "copy a set between folders and stores (s3://, gs://; from https:// and hf:// too), and compare checksums"
    parser = command(shards, "copy", _run, text, GOES_ON)
    parser.add_argument("source", help="folder or address of the set")
    parser.add_argument("out", help="folder or address that is written; it must not exist yet")


def _run(o: argparse.Namespace) -> None:
    from ..datamodules.copying import copy

    print(copy(o.source, o.out, Progress()))
