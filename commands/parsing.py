"""What the commands' files share: how a command is added, argument types, and groups of options."""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NoReturn

from .. import VideoAlignError
from .devices import DEVICES
from .near_names import instead

if TYPE_CHECKING:
    from .reward_judge import RewardJudge

Commands = Any
"""What argparse's ``add_subparsers`` returns."""
Run = Callable[[argparse.Namespace], int | None]
"""What a command does with its parsed options; the result is the exit status."""
ANEW = "nothing half-written is left; the same command starts anew"
GOES_ON = "what is finished is kept; the same command goes on"
STAGES = "finished stages are kept; the same command goes on"
"""What is left of a command that is stopped."""


class Parser(argparse.ArgumentParser):
    """A parser whose options are written out, and which says in a sentence what is wrong and what is meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Parse; an option that is not known is named before anything that is missing."""
        args = sys.argv[1:] if args is None else list(args)
        commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for option in (arg.partition("=")[0] for arg in args if not commands):
            if option.startswith("--") and option not in ("--", *known):
                self.error(f"there is no option {option}; {instead(option, known)}")
        if commands and commands[0].required and not args:
            self.error(f"name a command; {instead('', commands[0].choices)}")
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"{' '.join(rest)} belongs to no option")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is none of the choices."""
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            if isinstance(action, argparse._SubParsersAction):
                self.error(f"there is no command {value}; {instead(str(value), names)}")
            raise argparse.ArgumentError(action, f"{value!r} is unknown; {instead(str(value), names)}")

    def error(self, message: str) -> NoReturn:
        """End with a message."""
        message = message.replace("the following arguments are required:", "these are needed:")
        raise VideoAlignError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Default values are shown where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS, [], ())
        return super()._get_help_string(action) if shown else action.help


def command(
    commands: Commands,
    name: str,
    run: Run | None,
    text: str,
    kept: str = ANEW,
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: Where it is added: what ``add_subparsers`` returned.
        name: Its name.
        run: What it does, with the parsed options; its result is the exit status. None for a group of commands.
        text: What it is for; the list of commands shows it.
        kept: What is left when it is stopped.

    Returns:
        The parser to which its options are added.
    """
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=Help)
    parser.set_defaults(kept=kept, **({"command": run} if run else {}))
    return parser


def group(commands: Commands, name: str, text: str) -> Commands:
    """Add a command that only holds other ones; the result is where those are added."""
    return command(commands, name, None, text).add_subparsers(title="commands", metavar="COMMAND", required=True)


def needs_extra(who: str, extra: str, libraries: Collection[str]) -> Callable[[Run], Run]:
    """Let a command say how to install a library which is missing.

    Args:
        who: Name of the command, for the message.
        extra: Name of the package's extra that installs the libraries.
        libraries: Libraries that only this extra installs.
    """

    def decorate(run: Run) -> Run:
        @functools.wraps(run)
        def checked(options: argparse.Namespace) -> int | None:
            try:
                return run(options)
            except ModuleNotFoundError as error:
                if error.name not in libraries:
                    raise
                raise VideoAlignError(
                    f"{error.name} is not installed; {who} needs it: pip install 'videoalign[{extra}]'"
                ) from None

        return checked

    return decorate


LARGEST_SEED = 2**32 - 1
"""The largest seed that numpy takes."""


def count(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argument's type: a whole number from ``least`` on, up to ``most``."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or not least <= int(text) <= most:
            upto = "on" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} {upto}, got {text!r}")
        return int(text)

    return parse


def weights(text: str) -> dict[str, float]:
    """An argument's type: VQ=0.1,MQ=0.1,TA=0.8."""
    try:
        parts = [(name.strip(), float(value)) for name, value in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like VQ=0.1,MQ=0.1,TA=0.8, got {text!r}") from None
    if len(dict(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"must name each dimension once, got {text!r}")
    return dict(parts)


def add_out(parser: argparse.ArgumentParser, text: str = "folder that is written; it must not exist yet") -> None:
    """Add ``--out``, where the results go."""
    parser.add_argument("--out", required=True, help=text)


def add_seed(parser: argparse.ArgumentParser, text: str = "seed of all that is random") -> None:
    """Add ``--seed``, a whole number that torch and numpy take; ``text`` says what it decides."""
    parser.add_argument("--seed", type=count(0, LARGEST_SEED), default=0, help=text)


def add_workers(parser: argparse.ArgumentParser, least: int) -> None:
    """Add ``--workers``. With ``least`` 0, a process that computes may decode by itself."""
    cores = min(os.cpu_count() or 1, 8)
    none = "; 0 decodes in the main process" if least == 0 else ""
    text = f"number of processes that decode or render videos{none}"
    parser.add_argument("--workers", type=count(least), default=cores, help=text)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add ``--devices``, the number of processes that share the videos, each on a device of its own."""
    parser.add_argument(
        "--devices", type=count(1), default=1, help="number of processes, one for each device, that share the videos"
    )


def add_batch(parser: argparse.ArgumentParser, size: int) -> None:
    """Add ``--batch-size`` and ``--device``."""
    parser.add_argument("--batch-size", type=count(1), default=size, help="number of videos that are computed at once")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="device to compute on")


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--dtype``; ``default`` says in words which one holds without it."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=f"dtype of the weights (default: {default})")


def add_weights_source(parser: argparse.ArgumentParser) -> None:
    """Options that say where the parts of a reward model are."""
    parser.add_argument(
        "--backbone", help="folder or hub id of the model's backbone, if it is not where the model's folder says"
    )
    parser.add_argument("--template", help="text file with the official prompt template (official folders only)")
    parser.add_argument(
        "--official-repo", help="clone of the VideoAlign repository that holds the template (official folders only)"
    )
    parser.add_argument(
        "--checkpoint-step", type=count(0), help="step of the checkpoint, if not the latest (official folders only)"
    )
    add_dtype(parser, "the folder's own")


def add_judge(parser: argparse.ArgumentParser, devices: bool = True, required: bool = True) -> None:
    """Options of a reward model that scores videos; ``required`` unless another judge can take its place."""
    parser.add_argument(
        "--model",
        required=required,
        help="folder or hub id (ORG/NAME@REVISION) of a reward model, of this package or an official one",
    )
    add_weights_source(parser)
    add_batch(parser, 8)
    add_workers(parser, 0)
    if devices:
        add_devices(parser)


JUDGE = ("model", "backbone", "template", "official_repo", "checkpoint_step", "dtype")
JUDGE += ("batch_size", "workers", "device", "devices")
"""Options that are arguments of :class:`.reward_judge.RewardJudge`."""


def judge_of(options: argparse.Namespace) -> "RewardJudge":
    """The reward model that a command's options describe."""
    from .quiet import quiet
    from .reward_judge import RewardJudge

    quiet()
    return RewardJudge(**{name: getattr(options, name) for name in JUDGE if name in options})
