"""What YAML files and options of a command line set, each value with the place where it was given.

The parser that builds the objects forgets where a value came from; :mod:`.config_faults` looks here to name it.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from ..models.yaml_text import read_config

_Loader = get_yaml_default_loader()  # reads 1e-3 as a number, as the parser does
CONFIG = ("-c", "--config")
FORMS = ("class_path", "init_args", "dict_kwargs")
"""Keys by which a mapping describes an object."""


class NoText(str):
    """A key that YAML reads as a number, a truth value or nothing, because it has no quotes; its letters."""


@dataclass
class Setting:
    """A value of the configuration.

    Attributes:
        value: A plain value, settings by key, or a list of settings.
        place: File and line, or option, that gave it.
        text: The text behind an option, which its type may read differently.
        inherited: Whether it was given for another class, which was replaced; a parameter that the new class does not
            have is left out then.
    """

    value: Any
    place: str
    text: str | None = None
    inherited: bool = False

    @property
    def typed(self) -> bool:
        """Whether an option gave it; there ``init_args`` is left out."""
        return self.place.startswith("-")


def given(args: list[str], flags: Container[str]) -> Iterator[tuple[str, str]]:
    """Options with their values; an argument that belongs to no option has an empty option.

    Args:
        args: Arguments behind the command's name.
        flags: Options that take no value.
    """
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if not arg.startswith("--") and arg not in CONFIG:
            yield "", arg
        elif option in flags or option.endswith(".help"):
            continue
        else:
            yield option, value if equals else next(rest, "")


def read_settings(args: list[str], flags: Container[str]) -> Setting:
    """Merge what YAML files and options set, in their order.

    Args:
        args: Arguments behind the command's name.
        flags: Options that take no value.
    """
    root = Setting({}, "")
    for option, value in given(args, flags):
        if option in CONFIG:
            _merge(root, parsed(read_config(value), f"{shown(value)}, line "))
        elif option:
            _put(root, option, value)
    return root


def parsed(text: str, place: str) -> Setting:
    """The settings in a YAML text.

    Args:
        text: Text of a YAML file or of an option's value.
        place: Where it comes from; if it ends with "line ", the number of the line is added.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return _setting(loader, node, place, node.start_mark.line) if node else Setting(None, place)
    finally:
        loader.dispose()


def shown(path: str) -> str:
    """The path of a configuration as a user names it: a shipped one begins with ``experiments/``."""
    root = Path(__file__).parents[1]
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root / "experiments") else path


def _setting(loader: Any, node: yaml.Node, place: str, line: int) -> Setting:
    here = f"{place}{line + 1}" if place.endswith("line ") else place
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        return Setting({_key(k): _setting(loader, v, place, k.start_mark.line) for k, v in node.value}, here)
    if isinstance(node, yaml.SequenceNode):
        return Setting([_setting(loader, item, place, item.start_mark.line) for item in node.value], here)
    return Setting(loader.construct_object(node, deep=True), here)


def _key(node: yaml.Node) -> str:
    return str(node.value) if node.tag == "tag:yaml.org,2002:str" else NoText(node.value)


def _merge(old: Setting, new: Setting) -> None:
    """Put new settings over old ones, as the parser does: mappings are merged, lists and values replaced.

    A key with a plus behind it appends to a list.
    """
    if not isinstance(old.value, dict) or not isinstance(new.value, dict):
        old.value, old.place, old.text, old.inherited = new.value, new.place, new.text, False
        return
    if _another_class(old, new):
        init = old.value.get("init_args")
        for setting in init.value.values() if init is not None and isinstance(init.value, dict) else ():
            setting.inherited = True
    for key, setting in new.value.items():
        name = key.removesuffix("+") if key.endswith("+") else key  # which keeps its kind
        if name != key:
            before = old.value[name].value if name in old.value else []
            more = setting.value if isinstance(setting.value, list) else [setting]
            setting = Setting([*(before if isinstance(before, list) else []), *more], setting.place)
        _merge(old.value.setdefault(name, Setting({}, setting.place)), setting)


def _another_class(old: Setting, new: Setting) -> bool:
    before, after = (s.value.get("class_path") for s in (old, new))
    if before is None or after is None:
        return False
    return str(before.value).rpartition(".")[2] != str(after.value).rpartition(".")[2]


def _put(root: Setting, option: str, text: str) -> None:
    """Put the value of an option into the settings; ``--a.b+`` appends to a list."""
    name = option.lstrip("-")
    *parents, key = name.split(".")
    here = root
    for parent in parents:
        here = _below(here, parent).setdefault(parent, Setting({}, option))
        if isinstance(here.value, list) and here.value:
            here = here.value[-1]  # --trainer.callbacks.out belongs to the last callback
    inside, value = _below(here, key), _value(option, text)
    if key in inside and isinstance(inside[key].value, dict) and isinstance(value.value, str):
        value = Setting({"class_path": value}, option)  # --model NAME keeps what was set below model
    _merge(Setting(inside, option), Setting({key: value}, option))


def _below(setting: Setting, key: str) -> dict[str, Setting]:
    """The settings among which a key of an option belongs; options leave ``init_args`` out."""
    if not isinstance(setting.value, dict):
        named = isinstance(setting.value, str)
        setting.value = {"class_path": Setting(setting.value, setting.place)} if named else {}
    if key in FORMS or setting.value.keys().isdisjoint(FORMS):
        return setting.value
    inside = setting.value.setdefault("init_args", Setting({}, setting.place))
    if not isinstance(inside.value, dict):
        inside.value = {}
    return inside.value


def _value(option: str, text: str) -> Setting:
    try:
        setting = parsed(text, option)
    except (yaml.YAMLError, ValueError):
        setting = Setting(text, option)
    if not isinstance(setting.value, dict | list):
        setting.text = text
    return setting
