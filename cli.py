"""The command line: finds the command, runs it, and says in one message why it ended."""

import argparse
import contextlib
import io
import logging
import os
import select
import signal
import sys
import traceback
from typing import Any, NoReturn

from . import EverywhereError, __version__, ranks, stopping
from .annotation import commands as annotate
from .commands import bench, convert, experiment, generate, lora_tools, plan, push, score, serve_reward, shard_sets
from .commands.parsing import ANEW, Parser
from .errors import ADDED, BUG, describe, lost_peer
from .miniature import registration as miniature
from .redaction import redacted

GROUPS = {
    "train and measure what a YAML experiment describes": (experiment, plan),
    "collect and prepare data": (annotate, shard_sets),
    "use a reward model": (score, bench, serve_reward, convert),
    "use a generator": (generate, lora_tools),
    "publish on the Hugging Face hub": (push,),
    "the paper in miniature, on a laptop": (miniature,),
}
"""Files of commands by what they are for; each registers its own."""
REPLACED = {
    "compare": {
        "reward_model": "a reward model is one of the judges now: judges: {reward model: {class_path: "
        "videoalign.commands.reward_judge.RewardJudge, init_args: {model: FOLDER}}}",
        "oracle": "the oracle is one of the judges now: judges: {oracle: {class_path: "
        "videoalign.miniature.world.oracle.OracleJudge, init_args: {calibration: FILE}}}",
        "workers": "the processes that decode are the judge's now: judges.NAME.init_args.workers",
    }
}
"""Keys of earlier releases, by command, and what replaced them."""
SHELLS = ("bash", "zsh")


class Overview(Parser):
    """The top parser. Its help is a list of all commands by what they are for."""

    groups: dict[str, list[str]]
    """Names of commands by group."""
    commands: Any
    """What holds the commands' parsers."""

    def format_help(self) -> str:
        """The overview."""
        width = max(len(name) for names in self.groups.values() for name in names)
        lines = [f"usage: {self.prog} COMMAND ...", "", self.description]
        for title, names in self.groups.items():
            lines += ["", f"{title}:"]
            for name in names:
                lines.append(
                    f"  {name:{width}}  {self.commands.choices[name].description.partition('. ')[0].rstrip('.')}"
                )
        lines += ["", f"{self.prog} COMMAND --help          options of a command; {self.prog} help COMMAND is the same"]
        lines += [f"{self.prog} --version                version of this program"]
        lines += [f"{self.prog} --print-completion bash  script that completes commands in a shell (bash, zsh)"]
        return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Overview(
        prog="videoalign", description="Video generation with human feedback: from rated pairs to measured improvement."
    )
    top.add_argument("--version", action="version", version=f"videoalign {__version__}")
    top.add_argument("--print-completion", choices=SHELLS, help="print a script for the shell's completion")
    top.commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    top.groups = {}
    for title, files in GROUPS.items():
        before = set(top.commands.choices)
        for file in files:
            file.register(top.commands)
        top.groups[title] = [name for name in top.commands.choices if name not in before]
    return top


def kept(args: list[str]) -> str:
    """What is left of a command that is stopped."""
    found = parser()
    for name in args:
        groups = [action for action in found._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups or name not in groups[0].choices:
            break
        found = groups[0].choices[name]
    return found.get_default("kept") or ANEW


def main(args: list[str] | None = None) -> None:
    """Run one command, and say in one message why it ended, if not by itself.

    Exit status 2: a mistake of the user's, or something that the surroundings lack. 1: a fault of this program, with a
    traceback; or what the command found. 128 + N: stopped by signal N.
    """
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):  # a prompt may hold what the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # at its import it warns that an optional kernel for CPUs is not installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if ranks.is_rank():
        stopping.outlive_parent(grace=20, step=60)
    try:
        with stopping.listening():
            status = _run(args)
            sys.stdout.flush()
            stopping.check()
    except BaseException as error:
        if locks := sys.modules.get(f"{__package__}.models.locks"):
            locks.Hold.drop_all()
        _end(error, args)
    if status:
        sys.exit(status)


def _run(args: list[str]) -> int | None:
    """Run a command.

    Returns:
        Its exit status.
    """
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    short = args[1:] in (["-h"], ["--help"])  # all options of an experiment fill pages
    if args and args[0] in experiment.EXPERIMENTS and not short:
        return experiment.run(args, REPLACED)
    if args[:1] == ["plan"] and not short:
        return plan.run(args[1:])
    top = parser()
    options = top.parse_args(args)
    if options.print_completion:
        import shtab

        print(shtab.complete(top, options.print_completion))
    elif "command" in options:
        return options.command(options)
    else:
        top.print_help()
    return 0


def _end(error: BaseException, args: list[str]) -> NoReturn:
    """Say why a command ended, on one of its processes; exit."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        error = error.__context__  # Lightning turns an interruption into a plain exit
    if isinstance(error, KeyboardInterrupt):
        error = stopping.Stopped(signal.SIGINT)
    if isinstance(error, SystemExit):
        error = _flushed() or error
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, BrokenPipeError) and (gone := [s for s in (sys.stdout, sys.stderr) if _reader_left(s)]):
        for stream in gone:  # what is still in its buffer must not fail once more when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, stopping.Stopped):
        how = f"stopped by {signal.Signals(error.signum).name}"
        status, text = error.status, f"{how} {error.kept}" if error.kept else f"{how}: {kept(args)}"
        trouble = ""
    else:
        found = describe(error)
        status, text = found.status, found.message
        traced = found.kind in (ADDED, BUG) or os.environ.get("VIDEOALIGN_DEBUG")
        trouble = "".join(traceback.format_exception(error)) if traced else ""
    status, speaker = ranks.speaks(status, not isinstance(error, stopping.Stopped) and lost_peer(error))
    if speaker is not None:
        everywhere = isinstance(error, stopping.Stopped | EverywhereError)
        head = "" if isinstance(error, stopping.Stopped) else "error: "
        who = f"{speaker}: " if speaker and not everywhere else ""
        with contextlib.suppress(OSError):
            print(redacted(f"{trouble}videoalign: {head}{who}{text}"), file=sys.stderr, flush=True)
    sys.exit(status)


def _flushed() -> OSError | None:
    """Write what is still in the buffer of standard output; why that cannot be done."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _reader_left(stream: Any) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False
