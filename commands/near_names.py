"""What a message advises in place of a name that is wrong."""

import difflib
from collections.abc import Iterable

MOST = 24
"""Largest number of names that a message lists."""


def meant(name: str, names: Iterable[str]) -> str:
    """A question for the name that is like this one; empty where none is."""
    names = list(names)
    by_letters = {one.lower(): one for one in names}
    found = difflib.get_close_matches(name, names, 1, 0.6)
    found = found or [by_letters[one] for one in difflib.get_close_matches(name.lower(), by_letters, 1, 0.6)]
    return f"did you mean {found[0]}?" if found else ""


def instead(name: str, names: Iterable[str], all_of_them: str = "") -> str:
    """What to write in place of a name that is wrong: a like one, or any of the right ones.

    Args:
        name: The wrong name.
        names: The right names.
        all_of_them: Where the right names are listed, if they are too many for a message.
    """
    names = list(names)
    if question := meant(name, names):
        return question
    if len(names) > MOST and all_of_them:
        return all_of_them
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"choose one of {', '.join(sorted(names)[:MOST])}{more}" if names else "it takes none"
