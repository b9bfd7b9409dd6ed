"""Texts in CSV files that people open in spreadsheets, which run what they take for a formula.

An apostrophe before such a text makes spreadsheets show it as it is. Tables that are read here lose that apostrophe
again, so that a text comes back as it was, from a file for spreadsheets and from one for programs alike.
"""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters of a cell that spreadsheets take for a formula, or that they skip before one.

The last four are the wide forms that East Asian keyboards type.
"""


def plain(text: str) -> str:
    """A text as a cell of a spreadsheet: an apostrophe precedes what would be taken for a formula.

    A text that itself begins with an apostrophe before a formula gets another one, so that :func:`original` can tell.
    """
    return f"'{text}" if text.lstrip("'").lstrip(" ").startswith(FORMULA) else text


def original(cell: str) -> str:
    """The text of a cell that :func:`plain` or :func:`exact` wrote."""
    return cell[1:] if cell.startswith("'") and plain(cell) != cell else cell


def exact(text: str) -> str:
    """A text as a cell for programs: it stays as it is, unless :func:`original` would change it."""
    return f"'{text}" if original(text) != text else text
