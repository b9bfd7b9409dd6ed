"""The annotations of Label Studio's tasks: who chose what, and which ones are copies of others."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .. import VideoAlignError
from ..datamodules.ratings import COLUMNS
from .answers import CHOICES
from .protocol import RatingProtocol
from .voting import CollectedVote

_SKIPPED = ("was_cancelled", "skipped")
"""What marks an annotation as skipped, in all versions of Label Studio."""


@dataclass(frozen=True)
class Said:
    """One annotation.

    Attributes:
        who: The person, as the export names it.
        choices: The choice in each column.
        flags: Some of ``unsafe`` and ``broken``.
        seconds: How long it took.
        created: When it was made, in seconds since 1970; None where the export does not say.
        number: Its number in Label Studio; None where the export does not say.
    """

    who: str
    choices: dict[str, str]
    flags: tuple[str, ...]
    seconds: float
    created: float | None
    number: str | None

    @property
    def vote(self) -> CollectedVote:
        """The annotation as a vote."""
        return self.who, self.choices, self.flags, self.seconds

    def is_copy_of(self, other: "Said") -> bool:
        """Whether two annotations are one: by their number, or by content, person and time."""
        alike = (self.who, self.choices, sorted(self.flags)) == (other.who, other.choices, sorted(other.flags))
        if alike and self.number is not None and self.number == other.number:
            return True
        same_time = self.created == other.created or self.created is None or other.created is None
        return alike and self.seconds == other.seconds and same_time


def annotations_of(task: Mapping[str, Any], every: bool = False) -> list[dict[str, Any]]:
    """A task's annotations, also where Label Studio before 1.0 wrote them.

    Args:
        task: A task of the export.
        every: Whether to include the annotations that were skipped.
    """
    found = [*(task.get("annotations") or []), *(task.get("completions") or [])]
    return [one for one in found if every or not is_skipped(one)]


def is_skipped(annotation: Mapping[str, Any]) -> bool:
    """Whether the person skipped the task, so that nothing of the annotation counts."""
    return any(annotation.get(mark) for mark in _SKIPPED)


def emails(tasks: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """E-mail addresses by accounts' numbers, where an export has both: one person may be named by either."""
    found: dict[str, set[str]] = {}
    for task in tasks:
        for annotation in annotations_of(task) if _is_well_formed(task) else ():
            who = annotation.get("completed_by") if isinstance(annotation, dict) else None
            if isinstance(who, dict) and who.get("id") is not None and who.get("email"):
                found.setdefault(spelled(who["id"]), set()).add(spelled(who["email"]))
    return {number: addresses.pop() for number, addresses in found.items() if len(addresses) == 1}


def spelled(who: Any) -> str:
    """One spelling of a person's number or address: programs write 7 as 7.0, and an address in letters of any case.

    Args:
        who: A number, or an address, as a text or not.
    """
    text = str(int(who) if isinstance(who, float) and who.is_integer() else who).strip()
    return text.casefold() if "@" in text else text


def read_annotation(
    annotation: Mapping[str, Any], where: str, protocol: RatingProtocol, addresses: Mapping[str, str]
) -> Said:
    """Read one annotation.

    Args:
        annotation: The annotation in the export.
        where: The task, for messages.
        protocol: Names the columns in which there must be a choice, unless a flag is set.
        addresses: E-mail addresses by accounts' numbers, see :func:`emails`.

    Raises:
        VideoAlignError: A choice or the person is missing, or a choice is unknown.
    """
    result = annotation.get("result") or []
    choices, flags = _choices(result, where)
    if not flags and (lacking := [c for c in protocol.columns if c not in choices]):
        asked = sorted({str(item.get("from_name")) for item in result} - {*COLUMNS, "flags"})
        other = f"; what it has is called {', '.join(asked)}" if asked else ""
        raise VideoAlignError(f"{where}: an annotation lacks a choice in {', '.join(lacking)}{other}")
    seconds = float(annotation.get("lead_time") or 0)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"lead_time is {seconds}")
    number = annotation.get("unique_id", annotation.get("id"))
    who = _name(annotation.get("completed_by"), where)
    return Said(
        who=addresses.get(who, who),
        choices=choices,
        flags=tuple(flags),
        seconds=seconds,
        created=_time(annotation),
        number=None if number is None else str(number),
    )


def without_copies(said: Iterable[Said]) -> list[Said]:
    """Each annotation once, a person's in the order in which they were made.

    Exports that were merged, and tasks that were imported twice, hold copies: the same annotation by its number, or the
    same content by the same person at the same time. What a person says again later is no copy.
    """
    found: list[Said] = []
    for one in said:
        if not any(one.is_copy_of(other) for other in found):
            found.append(one)
    timed = all(one.created is not None for one in found)
    return sorted(found, key=lambda one: one.created) if timed else found


def _is_well_formed(task: Mapping[str, Any]) -> bool:
    """Whether a task's annotations are a list of objects."""
    every = (task.get("annotations") or [], task.get("completions") or [])
    return all(isinstance(one, list) and all(isinstance(a, dict) for a in one) for one in every)


def _choices(result: list[dict[str, Any]], where: str) -> tuple[dict[str, str], list[str]]:
    """Choices by column, and flags."""
    choices: dict[str, str] = {}
    flags: list[str] = []
    for item in result:
        name, chosen = item.get("from_name"), (item.get("value") or {}).get("choices") or []
        if name == "flags":
            flags += [str(flag) for flag in chosen]
            if not {*flags} <= {"unsafe", "broken"}:
                raise VideoAlignError(f"{where}: flags {flags} are unknown; they are unsafe and broken")
        elif name in COLUMNS:
            if len(chosen) != 1 or chosen[0] not in CHOICES:
                raise VideoAlignError(f"{where}: {name} is {chosen}, not one of {', '.join(CHOICES)}")
            if choices.setdefault(name, chosen[0]) != chosen[0]:
                raise VideoAlignError(f"{where}: {name} is {choices[name]} and {chosen[0]} in one annotation")
    return choices, flags


def _name(who: Any, where: str) -> str:
    """The person who made an annotation, as the export names it: by an e-mail address or a number."""
    who = (who.get("email") or who.get("id")) if isinstance(who, dict) else who
    if who is None or not (name := spelled(who)):
        raise VideoAlignError(
            f"{where}: an annotation does not say who made it (completed_by), so that nobody knows whose votes agree; "
            "add it where you know it"
        )
    name.encode()  # half of a surrogate pair is no text
    return name


def _time(annotation: Mapping[str, Any]) -> float | None:
    """When an annotation was made, which exports say as a text, or before 1.0 in seconds since 1970."""
    when = annotation.get("created_at")
    if when is None or isinstance(when, int | float):
        return when
    at = datetime.fromisoformat(when)
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
