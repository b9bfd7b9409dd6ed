"""Every parameter that can be set on the command line or in YAML has a help text; help comes at once."""

import argparse
import inspect
import pkgutil
import subprocess
import sys
import typing
from importlib import import_module

import jsonargparse
import lightning as L
import pytest

from videoalign import cli
from videoalign.commands.arms import compare

PACKAGES = ("alignment", "callbacks", "commands", "datamodules", "miniature", "models")
ROOTS = (L.LightningModule, L.LightningDataModule, L.Callback)
"""What YAML names by class path."""


def classes_in(annotation):
    """Classes of this package that a type annotation mentions."""
    for part in typing.get_args(annotation):
        yield from classes_in(part)
    if inspect.isclass(annotation) and annotation.__module__.startswith("videoalign."):
        yield annotation


def subclasses(cls):
    for sub in cls.__subclasses__():
        if sub.__module__.startswith("videoalign."):
            yield sub
            yield from subclasses(sub)


def parameters(thing):
    """Types of the parameters of a function or class, those that base classes take included."""
    for cls in thing.__mro__ if inspect.isclass(thing) else (thing,):
        with_types = cls.__init__ if inspect.isclass(cls) else cls
        if inspect.isfunction(with_types):
            yield from typing.get_type_hints(with_types).values()


def reachable():
    """Classes that a YAML experiment can name: modules, callbacks, judges, and what their parameters are."""
    for package in PACKAGES:
        folder = import_module(f"videoalign.{package}")
        for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
            import_module(module.name)
    todo = [cls for root in ROOTS for cls in subclasses(root)] + [compare]
    found = {}
    while todo:
        thing = todo.pop()
        if thing in found or getattr(thing, "_is_protocol", False):
            continue
        found[thing] = None
        for annotation in parameters(thing):
            for cls in classes_in(annotation):
                todo += [cls, *subclasses(cls)]
    return sorted(found, key=lambda thing: (thing.__module__, thing.__qualname__))


REACHABLE = [thing for thing in reachable() if not thing.__name__.startswith("_")]


@pytest.mark.parametrize("thing", REACHABLE, ids=lambda thing: thing.__qualname__)
def test_every_parameter_in_yaml_has_help(thing):
    if inspect.isclass(thing) and (inspect.isabstract(thing) or issubclass(thing, tuple | str)):
        pytest.skip("it is not made by its parameters")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(thing) else parser.add_function_arguments
    add(thing, "x", fail_untyped=False)
    mute = [
        action.dest
        for action in parser._actions
        if action.dest.startswith("x.") and ".help" not in action.dest and not (action.help or "").strip()
    ]
    assert not mute, f"{thing.__module__}.{thing.__qualname__} does not say what these are: {', '.join(mute)}"


def commands(parser, name="videoalign"):
    """All parsers by the words that call them."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from commands(sub, f"{name} {word}")


COMMANDS = dict(commands(cli.parser()))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    mute = [
        action.dest
        for action in COMMANDS[name]._actions
        if not isinstance(action, argparse._SubParsersAction) and not (action.help or "").strip()
    ]
    assert not mute, f"{name} does not say what these are: {', '.join(mute)}"
    assert COMMANDS[name].description


def test_everything_is_looked_at():
    names = {thing.__qualname__ for thing in REACHABLE}
    assert {"FlowDPO", "RewardModel", "LatentPairs", "WinRate", "LoRA", "Guidance", "TimeLaw", "compare"} <= names
    assert {"videoalign annotate serve", "videoalign shards pairs-from-rewards", "videoalign demo"} <= set(COMMANDS)


def test_the_overview_shows_every_command(capsys):
    cli.main([])
    overview = capsys.readouterr().out
    for name in COMMANDS:
        words = name.split()
        if len(words) == 2:
            assert f"\n  {words[1]} " in overview, f"the overview does not show {words[1]}"
    assert max(map(len, overview.splitlines())) <= 120
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert not end.value.code and capsys.readouterr().out == overview


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_every_command(shell, capsys):
    cli.main(["--print-completion", shell])
    script = capsys.readouterr().out
    for name, parser in COMMANDS.items():
        assert name.split()[-1] in script
        for action in parser._actions:
            if action.option_strings and not isinstance(action, argparse._HelpAction):
                assert action.option_strings[0] in script


HEAVY = {"torch", "scipy", "lightning", "transformers", "matplotlib", "av", "webdataset", "sqlalchemy", "fastapi"}


@pytest.mark.parametrize("args", [["--help"], ["shards", "info", "FOLDER"]], ids=["help", "info"])
def test_light_commands_do_not_import_heavy_libraries(args, tmp_path):
    """Measured in seconds it would depend on the machine: what takes them is the import of torch, scipy and others."""
    if "FOLDER" in args:
        from videoalign.datamodules.shards import ShardWriter

        with ShardWriter(tmp_path / "set", "videos") as writer:
            writer.write("a", {"": b"x"}, {"prompt": "a clip", "source": "m"})
        args = [str(tmp_path / "set") if arg == "FOLDER" else arg for arg in args]
    code = (
        "import sys; from videoalign.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print({HEAVY} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("set()"), done.stderr
