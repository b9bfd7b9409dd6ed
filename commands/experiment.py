"""`videoalign fit`, `validate`, `test`, `predict` and `compare`: what a YAML experiment describes.

Their options are those of the classes that the YAML names, so Lightning's CLI parses them when the command runs. What
is added here is what the overview, shell completion and `--help` know of them.
"""

import textwrap
from collections.abc import Iterator, Mapping

from .. import VideoAlignError
from .config_files import FOLDER, configured
from .parsing import GOES_ON, Commands, Help, command

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
MORE = """
A value of the file is set by its key behind it: --trainer.max_steps 100, --data.batch_size 4, --model.optimizer.lr
1e-5 (init_args is left out). Several files are merged, later ones win.

  videoalign {name} --config FILE --print_config   the whole configuration, with all defaults
  videoalign {name} --help-all                     every option that does not depend on a class
  videoalign {name} --model.help CLASS             parameters of a class, such as RewardModel or FlowDPO
"""
COMPARED = """
A value of the file is set by its key behind it: --generator DIR, --sampling.steps 20. Several files are merged, later
ones win. `videoalign compare --help-all` lists every option.
"""


class _Written(Help):
    """What follows the options keeps its lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def recipes(name: str) -> Iterator[tuple[str, str]]:
    """Shipped experiments that a command runs, each with what it is for: the second line of its file."""
    for path in sorted(FOLDER.rglob("*.yaml")):
        with open(path, encoding="utf-8") as file:
            first, second = file.readline(), file.readline()
        if first.startswith(f"# videoalign {name} "):
            yield f"experiments/{path.relative_to(FOLDER).as_posix()}", second.strip("# \n")


def _listed(name: str) -> str:
    found = dict(recipes(name))
    found |= dict(recipes("fit")) if name in ("validate", "test") else {}  # what is trained can be measured
    width = max(map(len, found))
    lines = [f"  {path:{width}}  {textwrap.shorten(text, 116 - width)}" for path, text in found.items()]
    return "\n".join(["shipped experiments (the first line of each file is a command that runs it):", *lines])


def register(commands: Commands) -> None:
    """Add the commands."""
    for name, (text, kept) in EXPERIMENTS.items():
        parser = command(commands, name, None, text, *([kept] if kept else []))
        parser.formatter_class = _Written
        parser.usage = f"videoalign {name} --config FILE [--config FILE ...] [--KEY VALUE ...]"
        parser.add_argument(
            "--config", "-c", action="append", help="YAML file; may be given repeatedly, the last one wins"
        )
        parser.add_argument("--print_config", action="store_true", help="print the whole configuration and stop")
        if name != "compare":
            parser.add_argument(
                "--ckpt_path",
                help="checkpoint to go on from, or to measure; last is the newest one of this experiment's runs",
            )
        parser.add_argument("--help-all", action="store_true", help="print every option and stop")
        parser.epilog = f"{(COMPARED if name == 'compare' else MORE).format(name=name)}\n{_listed(name)}\n"


def run(args: list[str], replaced: Mapping[str, Mapping[str, str]]) -> None:
    """Run one of these commands.

    Args:
        args: Arguments as on the command line; they begin with the command's name.
        replaced: Keys of earlier releases, by command, and what replaced them.

    Raises:
        VideoAlignError: Where no experiment is named at all.
    """
    name, *options = args
    if not options:
        raise VideoAlignError(f"{name} needs an experiment: videoalign {name} --config FILE\n\n{_listed(name)}")
    args = [name, *("--help" if option == "--help-all" else option for option in options)]
    args = configured(args)  # before anything heavy is imported
    from . import lightning_cli

    if name == "compare":
        from .arms import compare

        lightning_cli.call(compare, args[1:], replaced.get(name))
    else:
        lightning_cli.run(args)
