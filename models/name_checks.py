"""Names that users give to what they configure: refused where they cannot be keys, names of folders or cells."""

from collections.abc import Iterable, Mapping

from .. import VideoAlignError


def check_names(where: str, names: Iterable[object], without: str, taken: Mapping[str, str] | None = None) -> None:
    """Refuse names that are no texts, are empty, or hold what a name must not hold.

    Args:
        where: What is named, as the first words of messages, such as ``judges``.
        names: The names. YAML reads ``1``, ``yes`` or ``null`` as no text, unless they are in quotes.
        without: Characters that no name holds.
        taken: Names that stand for something else, and for what.

    Raises:
        VideoAlignError: Where a name is refused; names it.
    """
    for name in names:
        if not isinstance(name, str):
            kind = "nothing" if name is None else f"the {type(name).__name__} {name}"
            raise VideoAlignError(f"{where}: a name is read as {kind}, and must be a text; put it in quotes")
        if not name.strip() or not name.isprintable() or set(name) & set(without):
            raise VideoAlignError(
                f"{where}: {name!r} cannot be a name; it must not be empty, and holds printable characters other than "
                f"{' '.join(without)}"
            )
        if name in (taken or {}):
            raise VideoAlignError(f"{where}: {name!r} is the name of {taken[name]}; choose another one")
