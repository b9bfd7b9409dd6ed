"""Checks of YAML before it is built: text that would hang, fill the memory or lose a value is refused by its line."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .. import VideoAlignError

NODES = 5_000
"""Largest number of values in a file, with its aliases expanded. The largest experiment here has a few hundred."""
INTERPOLATIONS, LENGTH = 8, 1_000
"""Largest number of ${...} in a value, and of characters in a value with any: OmegaConf takes hours for nested ones."""
DEPTH = 60
"""Largest depth of nested lists and mappings."""
SIZE = 2**20
"""Largest number of bytes of a file."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class _Node:
    """A list or mapping that is being read.

    Attributes:
        anchor: Name of its anchor, if it has one.
        mapping: Whether it is a mapping.
        size: Number of values in it so far, with aliases expanded.
        items: Number of its own keys and values so far.
        keys: Tags and texts of its keys so far.
    """

    anchor: str | None
    mapping: bool
    size: int = 1
    items: int = 0
    keys: set[tuple] = field(default_factory=set)


def check_yaml(text: str, name: str) -> None:
    """Refuse YAML that is larger than it looks, refers to itself, or gives a key twice. Text that is no YAML passes.

    Args:
        text: Text to check.
        name: File or option that it comes from, for the message.

    Raises:
        VideoAlignError: Where the text is refused; names the line.
    """
    sizes: dict[str, int] = {}
    stack: list[_Node] = [_Node(None, False)]
    resolver = yaml.resolver.Resolver()  # 1 and '1' are two keys

    def refuse(event: yaml.Event, why: str) -> None:
        raise VideoAlignError(f"{name}, line {event.start_mark.line + 1}: {why}")

    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.CollectionEndEvent):
                node = stack.pop()
                if node.anchor:
                    sizes[node.anchor] = node.size
                _add(stack[-1], node.size)
            elif isinstance(event, yaml.CollectionStartEvent):
                sizes.pop(event.anchor, None)
                stack.append(_Node(event.anchor, isinstance(event, yaml.MappingStartEvent)))
                if len(stack) > DEPTH:
                    refuse(event, f"lists and mappings are nested more than {DEPTH} deep")
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor in sizes:
                    _add(stack[-1], sizes[event.anchor])
                elif any(node.anchor == event.anchor for node in stack):
                    refuse(event, f"*{event.anchor} refers to a value that it is itself a part of")
                else:
                    refuse(event, f"*{event.anchor} refers to nothing: there is no &{event.anchor} before it")
            elif isinstance(event, yaml.ScalarEvent):
                if event.anchor:
                    sizes[event.anchor] = 1
                node, count = stack[-1], event.value.count("${")
                if count > INTERPOLATIONS or (count and len(event.value) > LENGTH):
                    size = f"{count} interpolations ${{...}} in {len(event.value)} characters"
                    refuse(event, f"a value has {size}, which is too much")
                if node.mapping and node.items % 2 == 0 and event.value != "<<":
                    key = (event.tag or resolver.resolve(yaml.ScalarNode, event.value, event.implicit), event.value)
                    if key in node.keys:
                        refuse(event, f"the key {event.value!r} occurs twice in one mapping; leave one of them out")
                    node.keys.add(key)
                _add(node, 1)
            if stack[-1].size > NODES:
                refuse(event, f"written out it holds more than {NODES} values")
    except yaml.YAMLError:
        return  # the parser that builds it reports the error


def _add(node: _Node, size: int) -> None:
    node.size += size
    node.items += 1


def read_config(path: str | Path) -> str:
    """Read the text of a configuration file that passes :func:`check_yaml` and holds settings.

    Args:
        path: Configuration file.

    Raises:
        VideoAlignError: Where the file cannot be read as YAML with settings by name.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE + 1)
    except OSError as error:
        raise VideoAlignError(f"--config {path} cannot be read: {error.strerror}") from None
    if len(content) > SIZE:
        raise VideoAlignError(f"--config {path} is larger than {SIZE >> 20} MiB, so it is no configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 text (byte {error.start})"
        raise VideoAlignError(f"--config {path} {why}; save it in that encoding") from None
    check_yaml(text, f"--config {path}")
    try:
        found = yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise VideoAlignError(f"--config {path}{_where(error)} is no YAML: {_why(error, text)}") from None
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds {type(found).__name__} {str(found)[:40]!r}"
        raise VideoAlignError(f"--config {path} {what}, not settings by name (such as trainer: ...)")
    return text


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _why(error: Exception, text: str) -> str:
    """What a YAML parser says, in one line and without places in a file that it does not know."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())[:300]
    mark = error.problem_mark
    if mark and "\t" in re.split(r"\r\n|\r|\n", text)[mark.line][: mark.column + 1]:
        return "a tab stands where only spaces may; indent with spaces"
    return ", ".join(filter(None, (error.context, error.problem)))[:300]


def too_large(value: object, key: str = "") -> str | None:
    """Find a whole number that does not fit into 64 bits in nested settings.

    Args:
        value: Settings to search: a dictionary, list or single value.
        key: Dotted key of the settings themselves.

    Returns:
        The dotted key of the first such number; None without one.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return key
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for k, v in inner if (found := too_large(v, f"{key}.{k}".lstrip(".")))), None)
