"""MkDocs hook: a page of all commands and their options, and one of all YAML keys, read from the parsers themselves."""

import argparse
import inspect
import re
from importlib import import_module
from typing import Any

import jsonargparse
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

COMMANDS, KEYS = "reference/commands.md", "reference/keys.md"
SECTIONS: dict[str, tuple[str, ...]] = {
    "alignment": ("videoalign.alignment",),
    "models": ("videoalign.models.VideoReward", "videoalign.models.VideoReward.from_pretrained"),
    "data": (
        "videoalign.datamodules.pairs.VideoPairs",
        "videoalign.datamodules.latents.LatentPairs",
        "videoalign.datamodules.encode_list.EncodeList",
        "videoalign.datamodules.prompts.Prompts",
        "videoalign.datamodules.prompt_groups.PromptGroups",
        "videoalign.datamodules.reference_errors.ReferenceDraws",
    ),
    "callbacks": ("videoalign.callbacks",),
    "compare": ("videoalign.commands.arms.compare",),
    "judges": (
        "videoalign.commands.reward_judge.RewardJudge",
        "videoalign.miniature.world.oracle.OracleJudge",
    ),
    "search": (
        "videoalign.models.search.BestOfN",
        "videoalign.models.search.Pruning",
        "videoalign.models.particles.Particles",
    ),
    "windows and SDEs": (
        "videoalign.models.sde.FlowSDE",
        "videoalign.models.sde.DanceSDE",
        "videoalign.models.sde.LinearSDE",
        "videoalign.models.sde.CoefficientPreserving",
        "videoalign.models.sde.AllSteps",
        "videoalign.models.sde.MovingWindow",
        "videoalign.models.sde.EarlySteps",
    ),
    "rewards": (
        "videoalign.datamodules.video_scores.VideoRewardScores",
        "videoalign.models.noisy_scores.NoisyRewardScores",
        "videoalign.models.function_scores.FunctionScores",
        "videoalign.models.http_scores.HTTPScores",
        "videoalign.miniature.world.oracle.OracleScores",
    ),
}
"""What a YAML file may name under `class_path`, and the functions whose arguments it may give."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generate both pages."""
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    files.append(File.generated(config, KEYS, content=keys_page()))
    return files


# --- commands -------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with a table of its options."""
    cli = import_module("videoalign.cli")
    lines = [
        "# Commands",
        "",
        "This page is made from the parsers of the command line. `videoalign COMMAND --help` prints the same.",
        "",
        "| exit status | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | a fault of this program (with a traceback), or what the command found, such as a damaged set |",
        "| 2 | a mistake in what was given, or something that is missing here: one sentence says what and what to do |",
        "| 130, 143, 129 | stopped by Ctrl-C, SIGTERM or SIGHUP; what is finished is kept |",
        "",
    ]
    return "\n".join([*lines, *_command(cli.parser(), "videoalign")]) + "\n"


def _command(parser: argparse.ArgumentParser, name: str) -> list[str]:
    lines, inner = [], []
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows = []
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help for choice in action._choices_actions}
            for word, sub in action.choices.items():
                inner += [f"## {name} {word}" if " " not in name else f"### {name} {word}", ""]
                inner += [_sentence(sub.description or texts.get(word, "")), ""] if (sub.description or texts) else []
                inner += _command(sub, f"{name} {word}")
        elif action.help is not argparse.SUPPRESS:
            rows.append(_row(action))
    if rows:
        lines += ["| option | meaning | default |", "|---|---|---|", *rows, ""]
    return [*lines, *inner]


def _row(action: argparse.Action) -> str:
    shown = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.dest}`"
    if action.option_strings and action.nargs != 0 and not isinstance(action, argparse._VersionAction):
        metavar = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
        metavar = " ".join(metavar) if isinstance(metavar, tuple) else metavar
        shown = shown[:-1] + f" {metavar}`" + (" ..." if action.nargs in ("*", "+") else "")
    default = action.default
    if action.required:
        default = "**required**"
    elif default is None or default is False or default in (argparse.SUPPRESS, [], ""):
        default = ""
    elif isinstance(default, list | tuple):
        default = f"`{' '.join(map(str, default))}`"
    else:
        default = f"`{default}`"
    return f"| {_cell(shown)} | {_cell(_sentence(_help(action)))} | {_cell(default)} |"


def _help(action: argparse.Action) -> str:
    text = action.help or ""
    return re.sub(r"\s*\(default: %\(default\)s\)", "", text).replace("%%", "%")


# --- YAML keys ------------------------------------------------------------------------------------------------


def keys_page() -> str:
    """Every class that a YAML file may name, with its keys."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)  # of dataclasses
    lines = [
        "# YAML keys",
        "",
        "A class is named by `class_path`, its keys stand under `init_args`; a short name such as `FlowDPO` does too.",
        "The command line leaves `init_args` out: `--model.lora.rank 16`. The keys of `trainer` are Lightning's.",
        "",
        "`videoalign fit --config FILE --print_config` prints what a command would use, with all defaults filled in.",
        "",
    ]
    for names in SECTIONS.values():
        for path in names:
            for name, thing in _things(path):
                lines += _keys_of(name, thing)
    return "\n".join(lines) + "\n"


def _things(path: str) -> list[tuple[str, Any]]:
    """A class or function by its path, or all public ones of a package."""
    try:
        package = import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        try:
            holder = import_module(module)
        except ModuleNotFoundError:
            module, _, owner = module.rpartition(".")
            holder = getattr(import_module(module), owner)
        return [(path, getattr(holder, name))]
    return [(f"{path}.{name}", getattr(package, name)) for name in package.__all__]


def _keys_of(name: str, thing: Any) -> list[str]:
    parser = jsonargparse.ArgumentParser(parser_mode="omegaconf+")
    if inspect.isclass(thing):
        parser.add_class_arguments(thing, fail_untyped=False)
    elif inspect.ismethod(thing):
        parser.add_method_arguments(thing.__self__, thing.__name__, fail_untyped=False)
    else:
        parser.add_function_arguments(thing, fail_untyped=False)
    rows = []
    for action in parser._actions:
        typed = getattr(action, "_typehint", None) or action.type
        if action.dest.endswith("help") or action.default is argparse.SUPPRESS:
            continue
        default = "**required**" if action.required else _default(action.default)
        text = _cell(_sentence(_help(action)))
        rows.append(f"| `{action.dest}` | {_cell(_type_name(typed))} | {default} | {text} |")
    doc = inspect.getdoc(thing) or ""
    first = re.split(r"\n\n|\.\s", doc.strip(), maxsplit=1)[0].rstrip(".:") + "."
    first = re.sub(r":\w+:`~?\.?(?:[\w.]*\.)?([^`]+)`", r"`\1`", first.replace("\n", " "))
    lines = [f"## {name.removeprefix('videoalign.')} {{ #{name.replace('.', '-')} }}", "", first, ""]
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return lines


def _type_name(typed: Any) -> str:
    if typed is None:
        return ""
    text = typed.__name__ if inspect.isclass(typed) and not getattr(typed, "__args__", None) else str(typed)
    text = re.sub(r"(?:typing|collections\.abc|videoalign|lightning|torch|jsonargparse)\.(?:[\w]+\.)*", "", text)
    text = re.sub(r"Union\[(.*), NoneType\]$", r"\1 or null", text).replace("NoneType", "null")
    return f"`{text}`"


def _default(value: Any) -> str:
    if value is None or value is inspect.Parameter.empty:
        return "`null`"
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"`{value.__name__}`"
    if isinstance(value, argparse.Namespace | jsonargparse.Namespace):
        value = value.as_dict() if hasattr(value, "as_dict") else vars(value)
    text = f"{value}" if value != "" else '""'
    return f"`{_cell(text if len(text) < 80 else text[:77] + '...')}`"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r":\w+:`~?\.?(?:[\w.]*\.)?([^`]+)`", r"`\1`", text).replace("``", "`")
    return text[:1].upper() + text[1:] if text[1:2].islower() else text  # but not the symbol t


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)
