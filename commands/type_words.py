"""Types of parameters in words, for messages, and whether a value is of a type."""

import collections.abc
import enum
import inspect
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import jsonargparse

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    Path: "a path",
}


def alternatives(kind: Any) -> list[Any]:
    """The types of which a value may be one."""
    origin = get_origin(kind)
    if origin is Annotated:
        return alternatives(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in alternatives(part)]
    return [kind]


def objects(kind: Any) -> list[tuple[type, int]]:
    """Classes whose objects a value may describe, each with the number of arguments that its caller adds.

    A function that returns an object, such as ``Callable[[Iterable], Optimizer]``, is described like the object.
    """
    found = []
    for one in alternatives(kind):
        if get_origin(one) is collections.abc.Callable:
            arguments, result = get_args(one)
            found += [(cls, len(arguments)) for cls, _ in objects(result)]
        elif inspect.isclass(one) and one not in WORDS and not issubclass(one, enum.Enum | tuple | str | int | float):
            found.append((one, 0))
    return found


def items(kind: Any, of: type) -> list[Any]:
    """Types of the elements of a list, or of the values of a mapping.

    Args:
        kind: Type of the whole.
        of: ``list`` or ``dict``.
    """
    generic = {list: collections.abc.Iterable, dict: collections.abc.Mapping}[of]
    found = []
    for one in alternatives(kind):
        origin, inner = get_origin(one), get_args(one)
        if not (inspect.isclass(origin) and inner) or origin is collections.abc.Callable:
            continue
        mapping = issubclass(origin, collections.abc.Mapping)
        if issubclass(origin, generic) and mapping == (of is dict) and not issubclass(origin, tuple):
            found.append(inner[-1])
    return found


def keyed_by_text(kind: Any) -> bool:
    """Whether the keys of a mapping of this type are texts."""
    return any(inspect.isclass(get_origin(one)) and get_args(one)[:1] == (str,) for one in alternatives(kind))


def choices(kind: Any) -> list[str]:
    """The values that a type lists."""
    found = [str(value) for one in alternatives(kind) if get_origin(one) is Literal for value in get_args(one)]
    return list(dict.fromkeys(found))


def words(kind: Any) -> str:
    """What a parameter of a type takes, as the end of a sentence."""
    parts = []
    if listed := choices(kind):
        parts.append(listed[0] if len(listed) == 1 else f"one of {', '.join(listed)}")
    for one in alternatives(kind):
        if get_origin(one) is not Literal:
            parts.append(_word(one))
    parts = sorted(dict.fromkeys(parts), key=lambda part: part == "null")
    return " or ".join(parts)


def _word(kind: Any) -> str:
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(kind.__members__)}"
    if kind in WORDS:
        return WORDS[kind]
    if inner := items(kind, list):
        return f"a list, each entry {words(inner[0])}"
    if inner := items(kind, dict):
        return f"a mapping, each value {words(inner[0])}"
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} values"
    if found := objects(kind):
        name = found[0][0].__name__
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name} (its class_path and init_args)"
    return str(kind).replace("typing.", "")


def fits(value: Any, text: str | None, kind: Any) -> bool:
    """Whether the parser takes a value as one of this type.

    Args:
        value: Plain value from YAML.
        text: Text behind an option, which is read by the type; None for a value from YAML.
        kind: Type of the parameter.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    try:
        if text is None:
            parser.parse_object({"x": value})
        else:
            parser.parse_args([f"--x={text}"])
    except (jsonargparse.ArgumentError, ValueError, TypeError):
        return False
    return True
