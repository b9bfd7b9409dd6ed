"""The first fault of a configuration: which key, in which line or option, why, and what to write instead.

The parser refuses a configuration with the reasons of every type that a value might have had. Here its settings are
compared with the parameters of the classes that they name, one by one, until one does not fit.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jsonargparse
from jsonargparse._parameter_resolvers import get_signature_parameters

from .. import VideoAlignError
from .class_names import NotFound, derives, find_class
from .near_names import instead
from .settings import CONFIG, FORMS, NoText, Setting, given, read_settings
from .type_words import alternatives, choices, fits, items, keyed_by_text, objects, words

FLAGS = ("-h", "--help", "--print_config")
"""Options that take no value."""


@dataclass
class Group:
    """Keys at the top of a configuration, and those below ``trainer``.

    Attributes:
        kinds: Type of each key, or a group of further keys.
        listed: Where all keys are listed.
        names: Words that a text must be one of, by key, where its type says no more than text.
    """

    kinds: dict[str, Any] = field(default_factory=dict)
    listed: str = ""
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a setting.

    Attributes:
        setting: The setting.
        key: Its key.
        why: What is wrong and what to do, a sentence without its subject.
        missing: Whether the key is not there; other faults are named first.
    """

    setting: Setting
    key: str
    why: str
    missing: bool = False

    def __str__(self) -> str:
        place = self.setting.place
        if self.setting.typed:
            return f"{place} {self.why}"
        return f"{place}: {self.key} {self.why}" if place else f"{self.key} {self.why}"


def group_of(parser: jsonargparse.ArgumentParser, listed: str) -> Group:
    """The keys that a parser takes.

    Args:
        parser: Parser of a command.
        listed: Where all keys are listed, for messages.
    """
    root = Group(listed=listed)
    for action in parser._actions:
        kind = getattr(action, "_typehint", None) or action.type
        if not action.option_strings or action.dest in ("help", "print_config") or action.dest.endswith(".help"):
            continue
        *parents, key = action.dest.split(".")
        here = root
        for parent in parents:
            if not isinstance(here.kinds.get(parent), Group):
                here.kinds[parent] = Group(listed=listed)
            here = here.kinds[parent]
        if not isinstance(here.kinds.get(key), Group):
            here.kinds[key] = kind or Any
    return root


def explained(args: Sequence[str], group: Group, otherwise: str = "") -> str:
    """Why a command line and its files are refused.

    Args:
        args: Arguments behind the command's name.
        group: The keys that the command takes.
        otherwise: What the parser says, for faults that are not found here.
    """
    every = list(given(args, FLAGS))
    for option, value in every:
        if not option:
            advice = (
                f"write --config {value}" if value.endswith((".yaml", ".yml", ".json")) else "options begin with --"
            )
            return f"{value} belongs to no option; {advice}"
        if option in CONFIG and not value:
            return f"{option} needs a file behind it"
    # the whole first; then as the parser reads: it refuses a value that a later one would replace
    for count in (len(every), *range(1, len(every))):
        settings = [f"{option}={value}" for option, value in every[:count]]
        try:
            found = sorted(faults(read_settings(settings, FLAGS), group, ""), key=lambda fault: fault.missing)
        except VideoAlignError as error:
            return str(error)
        except Exception:  # a type that is not understood here must not hide what the parser says
            found = []
        if found and (count == len(every) or not found[0].missing):
            return str(found[0])
    return otherwise


def unknown(setting: Setting, group: Group, key: str = "") -> Iterator[Fault]:
    """What the parser lets pass: keys that are not there, where their value is empty, and names that are not there.

    Args:
        setting: Settings of the group.
        group: Keys of the group.
        key: Key of the group; empty at the top.
    """
    if not isinstance(setting.value, dict):
        yield Fault(setting, key, f"holds settings by key, not {shortly(setting.value)}")
        return
    for name, inner in setting.value.items():
        path = f"{key}.{name}".lstrip(".")
        if name not in group.kinds:
            what = f"an option of {group.listed.split()[1]}" if inner.typed else "a key"
            where = f"`{group.listed}` lists all"
            start = f"--{key}.".replace("--.", "--") if inner.typed else ""
            names = [start + one for one in group.kinds]
            yield Fault(inner, path, f"is not {what}; {instead(start + name, names, where)}")
        elif isinstance(group.kinds[name], Group):
            yield from unknown(inner, group.kinds[name], path)
        elif name in group.names and isinstance(inner.value, str) and inner.value not in group.names[name]:
            yield Fault(inner, path, f"is {inner.value!r}, which is unknown; {instead(inner.value, group.names[name])}")


def faults(setting: Setting, kind: Any, key: str) -> Iterator[Fault]:
    """What is wrong with a setting and those below it.

    Args:
        setting: The setting.
        kind: Type of the parameter that it is for, or a group of keys.
        key: Its key.
    """
    value = setting.value
    if isinstance(kind, Group):
        yield from _in_group(setting, kind, key)
    elif "${" in str(value) and not isinstance(value, dict | list):
        return  # nothing is known about what it stands for
    elif isinstance(value, dict):
        yield from _mapping(setting, kind, key)
    elif isinstance(value, list) and (inner := items(kind, list)):
        for number, item in enumerate(value):
            yield from faults(item, inner[0], f"{key}.{number}")
    elif isinstance(value, str) and (found := objects(kind)) and not fits(value, setting.text, kind):
        yield from _object(Setting({"class_path": setting}, setting.place), found, key, named=True)
    elif not isinstance(value, list) and not fits(value, setting.text, kind):
        like = instead(str(value), choices(kind)) if choices(kind) else ""
        like = f"; {like}" if like.startswith("did") else ""
        yield Fault(setting, key, f"must be {words(kind)}, got {shortly(value)}{like}")
    elif isinstance(value, list) and not fits(_plain(setting), None, kind):
        yield Fault(setting, key, f"must be {words(kind)}, got a list of {len(value)}")


def _in_group(setting: Setting, group: Group, key: str) -> Iterator[Fault]:
    yield from unknown(setting, group, key) if not key else ()
    if not isinstance(setting.value, dict):
        return
    for name, inner in setting.value.items():
        if name in group.kinds:
            yield from faults(inner, group.kinds[name], f"{key}.{name}".lstrip("."))


def _mapping(setting: Setting, kind: Any, key: str) -> Iterator[Fault]:
    if inner := items(kind, dict):
        for name, item in setting.value.items():
            if isinstance(name, NoText) and keyed_by_text(kind):
                yield Fault(item, f"{key}.{name}", "is a key that YAML reads as no text; put it in quotes")
            if item.value is None and objects(inner[0]):  # an object of a mapping has no default
                yield Fault(item, f"{key}.{name}", f"must be {words(inner[0])}, got null")
            yield from faults(item, inner[0], f"{key}.{name}")
    elif found := objects(kind):
        yield from _object(setting, found, key)
    elif not {dict, Any, object} & set(alternatives(kind)):
        yield Fault(setting, key, f"must be {words(kind)}, got keys ({', '.join(setting.value)})")


def _object(setting: Setting, found: list[tuple[type, int]], key: str, named: bool = False) -> Iterator[Fault]:
    """What is wrong with the description of an object, or with its name alone."""
    bases = [cls for cls, _ in found]
    if path := setting.value.get("class_path"):
        try:
            cls = find_class(str(path.value), bases)
        except NotFound as error:
            below = key if named else f"{key}.class_path"
            yield Fault(path, below, str(error))
            return
    elif len(bases) == 1 and bases[0].__module__.startswith("videoalign."):
        cls = bases[0]
    else:
        yield Fault(setting, f"{key}.class_path", f"must be set: the name of a {bases[0].__name__}", True)
        return
    described = not setting.value.keys().isdisjoint(FORMS)
    skipped = next((count for base, count in found if inspect.isclass(cls) and derives(cls, base)), 0)
    parameters = {p.name: p for p in _parameters(cls)[skipped:]}
    yield from _arguments(setting, cls.__name__, parameters, key, described)


@cache
def _parameters(cls: Any) -> list[Any]:
    return get_signature_parameters(cls)


def _arguments(setting: Setting, name: str, parameters: dict, key: str, described: bool) -> Iterator[Fault]:
    arguments = {k: v for k, v in setting.value.items() if k not in FORMS}
    for argument, inner in arguments.items():
        if described and not inner.typed:
            why = "stands beside class_path; parameters of a class stand under init_args"
            yield Fault(inner, f"{key}.{argument}", why)
    below = f"{key}.init_args" if described else key
    init = setting.value.get("init_args")
    if init is not None and not isinstance(init.value, dict):
        yield Fault(init, below, f"holds parameters by name, not {shortly(init.value)}")
        return
    arguments |= init.value if init is not None else {}
    for argument, inner in arguments.items():
        if argument not in parameters and inner.inherited:
            continue
        if argument not in parameters:
            yield Fault(inner, f"{below}.{argument}", f"is no parameter of {name}; {instead(argument, parameters)}")
        else:
            yield from faults(inner, parameters[argument].annotation, f"{below}.{argument}")
    free = setting.value.get("dict_kwargs")
    have = {*arguments, *(free.value if free is not None and isinstance(free.value, dict) else ())}
    for argument, parameter in parameters.items():
        if argument not in have and parameter.default is inspect.Parameter.empty:
            option = setting.place.removesuffix(".class_path")
            where = Setting(None, f"{option}.{argument}" if setting.typed else setting.place)
            yield Fault(where, f"{below}.{argument}", f"must be set: {name} needs {words(parameter.annotation)}", True)


def shortly(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _plain(setting: Setting) -> Any:
    """A setting's value without places."""
    if isinstance(setting.value, dict):
        return {key: _plain(inner) for key, inner in setting.value.items()}
    return [_plain(inner) for inner in setting.value] if isinstance(setting.value, list) else setting.value
