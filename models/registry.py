"""Things that are found by name: this package's own, those of installed packages, and one's own by import path.

An installed package offers a thing by an entry point of a group (``videoalign.generators``, ``videoalign.judges``,
``videoalign.rewards``, ``videoalign.benchmarks``) in its ``pyproject.toml``; the name of the entry point is the thing's
name.
"""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .. import VideoAlignError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Things by name; what installed packages offer is imported when it is first asked for.

    Args:
        group: Group of the entry points.
        what: What a thing is called in messages, such as "generator family".
        builtin: This package's own things.
        fits: Tells whether an object is such a thing.
        wanted: What an object must be, for messages, such as "a subclass of Generator".
    """

    def __init__(
        self, group: str, what: str, builtin: Mapping[str, T], fits: Callable[[Any], bool], wanted: str
    ) -> None:
        self.group, self.what, self.builtin, self.fits, self.wanted = group, what, dict(builtin), fits, wanted

    def __getitem__(self, name: str) -> T:
        return self.find(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.builtin, *(point.name for point in entry_points(group=self.group))]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def find(self, name: str, by_path: bool = True) -> T:
        """Give the thing of a name.

        Args:
            name: Name, or import path as ``package.module:Name`` or ``package.module.Name``.
            by_path: Whether an import path will do. A name that was read from a file must not import anything.

        Raises:
            VideoAlignError: If nothing has this name, two packages claim it, or what has it cannot be imported or is
                something else.
        """
        offered = list(entry_points(group=self.group, name=name))
        if len(offered) > 1 or (offered and name in self.builtin):
            own = ["videoalign itself"] if name in self.builtin else []
            raise VideoAlignError(
                f"{self.what} {name!r} is offered by {' and '.join([*own, *map(_of, offered)])}; name the one that is "
                "meant by its import path (package.module:Name), or uninstall the others"
            )
        if name in self.builtin:
            return self.builtin[name]
        if offered:
            return self._loaded(offered[0], f"{self.what} {name!r}, an entry point of {_of(offered[0])}")
        module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
        if by_path and module and attribute:
            point = EntryPoint(name, f"{module}:{attribute}", self.group)
            return self._loaded(point, f"{self.what} {name!r}")
        raise VideoAlignError(self.unknown(name, by_path))

    def unknown(self, name: object, by_path: bool = True) -> str:
        """The message for a name that nothing has."""
        names = list(self)
        close = get_close_matches(str(name), names, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        there = f"one of {', '.join(names)}" if names else "offered by any installed package"
        path = "name it by its import path (package.module:Name), or " if by_path else ""
        return (
            f"{self.what} {name!r} is not {there}{meant}. For one of your own, {path}install a package with an entry "
            f"point of the group {self.group}"
        )

    def _loaded(self, point: EntryPoint, name: str) -> T:
        try:
            thing = point.load()
        except Exception as error:  # a foreign module may raise anything
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            hint = "" if point.dist else "; is its package installed, or its folder in PYTHONPATH?"
            raise VideoAlignError(f"{name}: {point.value} cannot be imported ({why[:300]}){hint}") from error
        if not self.fits(thing):
            kind = thing.__name__ if isinstance(thing, type) else f"a {type(thing).__name__}"
            raise VideoAlignError(f"{name}: {point.value} is {kind}, but must be {self.wanted}")
        return thing


def _of(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version} ({point.value})" if point.dist else point.value
