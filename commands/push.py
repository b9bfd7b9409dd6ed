"""`videoalign push`: publish a reward model, adapters, a generator or a data set on the hub, with a card."""

import argparse

from .parsing import Commands, command


def register(commands: Commands) -> None:
    """Add the command."""
    text = "publish a reward model, LoRA, generator or data set on the Hugging Face hub, with a card"
    kept = "the repository is as it was before; files that were sent whole are not sent again by the same command"
    parser = command(commands, "push", _run, text, kept)
    parser.add_argument("folder", help="exported model or adapters, or a set (a folder with index.json)")
    parser.add_argument("--to", required=True, help="repository on the hub, ORG/NAME; it is created if it is not there")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--revision", help="branch to commit to; it is created if it is not there (default: main)")
    parser.add_argument("--license", help="licence by its name on the hub, such as apache-2.0 or cc-by-4.0")
    parser.add_argument("--base", help="hub id of the model that this one is built on, if the folder names none")
    parser.add_argument("--base-license", help="licence of that model, whose terms hold too")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        help="set or hub data set (hf://datasets/ORG/NAME) that the model was trained on, if its run does not say; may "
        "be repeated",
    )
    parser.add_argument(
        "--metrics",
        action="append",
        default=[],
        help="JSON file of `bench` or `compare`, or win_rate.json of a test, for the card; may be repeated",
    )
    parser.add_argument(
        "--new-card", action="store_true", help="replace a card that somebody wrote or changed, here or on the hub"
    )
    parser.add_argument(
        "--card-only", metavar="FILE", help="write the card to this file (- for the screen), and publish nothing"
    )


def _run(o: argparse.Namespace) -> None:
    from .pushing import Wishes, push

    wishes = Wishes(o.to, o.revision, o.license, o.base, o.base_license, tuple(o.data), tuple(o.metrics))
    push(o.folder, wishes, private=o.private, new_card=o.new_card, card_only=o.card_only)
