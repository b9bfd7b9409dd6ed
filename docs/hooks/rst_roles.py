"""Docstrings of this package, which are written with Sphinx's roles, as Markdown for mkdocstrings."""

import re
import textwrap

import griffe

_ROLE = re.compile(r":(?:py:)?(\w+):`(~?)([^`<]+?)(?:\s*<([^>`]+)>)?`")
_MATH_BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)\.\. math::(?P<rest>(?:[ \t]*\S[^\n]*)?\n?(?:(?:(?P=indent)[ \t]+\S[^\n]*|[ \t]*)(?:\n|$))*)",
    re.M,
)


class Roles(griffe.Extension):
    """Turns roles into links where the name is on a page, and into code where it is not; formulas into $...$."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        """Rewrite every docstring of a package once it is loaded."""
        objects = dict(_walk(pkg))
        by_end: dict[str, list[str]] = {}
        for path in objects:
            parts = path.split(".")
            for start in range(len(parts)):
                by_end.setdefault(".".join(parts[start:]), []).append(path)
        for item in objects.values():
            if item.docstring is not None:
                item.docstring.value = _markdown(item.docstring.value, item.path, objects, by_end)


def _walk(item: griffe.Object):
    """Every object of a package with its path; names that are imported from elsewhere are left out."""
    yield item.path, item
    for member in item.members.values():
        if not member.is_alias:
            yield from _walk(member)


def _shown(path: str, objects: dict[str, griffe.Object]) -> bool:
    """Whether a page shows an object: no part of its path is private, and it has a docstring of its own."""
    private = any(part.startswith("_") and part != "__init__" for part in path.split("."))
    return not private and objects[path].docstring is not None


def _target(name: str, here: str, objects: dict[str, griffe.Object], by_end: dict[str, list[str]]) -> str | None:
    """The path that a role's name means, seen from the object whose docstring it stands in."""
    if not name.startswith("."):
        if name in objects:
            return name
        scopes = here.split(".")
        for length in range(len(scopes), 0, -1):
            path = ".".join([*scopes[:length], name])
            if path in objects:
                return path
    found = by_end.get(name.lstrip("."), [])
    return found[0] if len(found) == 1 else None


def _markdown(text: str, here: str, objects: dict[str, griffe.Object], by_end: dict[str, list[str]]) -> str:
    def role(match: re.Match) -> str:
        kind, short, name, explicit = match.groups()
        if kind == "math":
            return f"${name}$"
        target = _target(explicit or name, here, objects, by_end)
        label = name.rpartition(".")[2] if short else name.lstrip(".")
        label += "()" if kind in ("func", "meth") else ""
        if not target or not _shown(target, objects):
            return f"`{label}`"
        if objects[target].is_module:  # it is a page; the pages of the reference stand beside each other
            return f"[`{label}`]({target.removeprefix('videoalign.')}.md)"
        return f"[`{label}`][{target}]"

    def block(match: re.Match) -> str:
        formula = textwrap.dedent(match["rest"]).strip()
        return textwrap.indent(f"$$\n{formula}\n$$", match["indent"]) + "\n\n"

    return _ROLE.sub(role, _MATH_BLOCK.sub(block, text))
