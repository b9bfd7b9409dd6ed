"""`videoalign fit`, `validate`, `test`, `predict` and `compare`: what a YAML experiment describes.

Their options are those of the classes that the YAML names, so Lightning's CLI parses them when the command runs. What
is added here is what the overview and shell completion know of them.
"""

from collections.abc import Mapping

from .parsing import GOES_ON, Commands, command

EXPERIMENTS = {
    "fit": (
        "train what a YAML experiment describes",
        "checkpoints that were written before are whole; --ckpt_path with one of them goes on",
    ),
    "validate": ("measure an experiment on its validation data", ""),
    "test": ("measure an experiment on its test data", ""),
    "predict": ("run an experiment over its prediction data", GOES_ON),
    "compare": ("sample, guide and judge several ways side by side, in one table", GOES_ON),
}
"""Commands that are configured by YAML: what they are for, and what is left when they are stopped."""


def register(commands: Commands) -> None:
    """Add the commands."""
    for name, (text, kept) in EXPERIMENTS.items():
        parser = command(commands, name, None, text, *([kept] if kept else []))
        parser.add_argument(
            "--config", "-c", action="append", help="YAML file; may be given repeatedly, the last one wins"
        )
        parser.add_argument("--print_config", action="store_true", help="print the whole configuration and stop")
        if name != "compare":
            parser.add_argument("--ckpt_path", help="checkpoint to go on from, or to measure")


def run(args: list[str], replaced: Mapping[str, Mapping[str, str]]) -> None:
    """Run one of these commands.

    Args:
        args: Arguments as on the command line; they begin with the command's name.
        replaced: Keys of earlier releases, by command, and what replaced them.
    """
    from . import lightning_cli

    if args[0] == "compare":
        from .arms import compare

        lightning_cli.call(compare, args[1:], replaced.get(args[0]))
    else:
        lightning_cli.run(args)
