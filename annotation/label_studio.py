"""Pairwise ratings that were collected in Label Studio, as a round of ours.

Reads the JSON export of a project whose tasks hold ``prompt``, ``video_a`` and ``video_b`` (see :mod:`.names` for what may name a
video) and whose labelling interface asks for a choice in each dimension::

    <View>
      <Text name="prompt" value="$prompt"/>
      <Video name="a" value="$video_a"/> <Video name="b" value="$video_b"/>
      <Choices name="VQ" toName="a"><Choice value="A"/><Choice value="same"/><Choice value="B"/></Choices>
      ... the same for MQ, TA, and Overall where it is asked for ...
      <Choices name="flags" toName="a" choice="multiple"><Choice value="unsafe"/><Choice value="broken"/></Choices>
    </View>

Exports of Label Studio before 1.0, which call annotations ``completions``, are read too where they say who made them.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..datamodules.ratings import COLUMNS
from ..datamodules.shards import ShardSet, sha256
from .names import Names
from .pairing import Pair, split_prompts
from .protocol import CHOICES, RatingProtocol
from .store import new_round

_SKIPPED = ("was_cancelled", "skipped")
"""What marks an annotation of which nothing counts, in all versions of Label Studio."""


@dataclass(frozen=True)
class Said:
    """One annotation.

    Attributes:
        who: The person, as the export has it.
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


def import_label_studio(
    path: str | Path,
    videos: ShardSet,
    db: str | Path,
    shares: tuple[float, float] = (0.1, 0.1),
    seed: int = 0,
    protocol: RatingProtocol | None = None,
    reviewers: tuple[str, ...] = (),
    names: str = "both",
) -> dict[str, int]:
    """Write a file of votes out of an export; it can be reviewed, measured and exported like any other.

    Args:
        path: The JSON export.
        videos: The set that was rated.
        db: The file to make.
        shares: Shares of the prompts for validation and benchmark; see :func:`.pairing.split_prompts`.
        seed: Seed of that split.
        protocol: Rules of the round; the paper's where None.
        reviewers: People (as the export calls them) whose votes are final.
        names: What names the videos, one of :data:`.names.NAMES`.

    Returns:
        Counts of ``pairs``, ``votes`` and ``people``; where there are any, also of annotations that were ``skipped``, and of copies of
        annotations (``repeated``).

    Raises:
        VideoAlignError: Where something is not as described, with the task's number, or where there is no vote.
    """
    tasks = _read(Path(path))
    contents = {content.key: content.record for content in videos.contents()}
    known, rules, people = Names(contents, names), protocol or RatingProtocol(), _people(tasks)
    pairs: dict[tuple[str, str], str] = {}
    votes: dict[tuple[str, str], list[Said]] = {}
    for number, task in enumerate(tasks, 1):
        where = f"task {task.get('id', number)}"
        try:
            prompt, keys = _pair(task, where, contents, known)
            said = [_said(annotation, where, rules, people) for annotation in _annotations(task)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(f"{where} is not as Label Studio writes them ({error})") from None
        if keys[::-1] in pairs:
            raise VideoAlignError(
                f"{path}: videos {keys} are a pair twice, with A and B exchanged; export one orientation"
            )
        pairs[keys] = prompt
        votes.setdefault(keys, []).extend(said)
    given = sum(map(len, votes.values()))
    if not given:
        raise VideoAlignError(f"{path}: {_why_nothing(tasks)}")
    votes = {keys: _once(said) for keys, said in votes.items()}
    everybody = sorted({one.who for said in votes.values() for one in said})
    if unknown := set(reviewers) - set(everybody):
        raise VideoAlignError(
            f"reviewers {sorted(unknown)} voted on nothing in {path}; it names {', '.join(everybody[:8])}"
        )
    splits = split_prompts(sorted({*pairs.values()}), shares, seed)
    rated = [
        Pair(prompt, keys, tuple(str(contents[key].get("source") or "") for key in keys), splits[prompt])
        for keys, prompt in pairs.items()
    ]
    with new_round(db, rated, rules, sha256(videos.path / "index.json")) as store:
        for name in everybody:
            store.invite(name, "reviewer" if name in reviewers else "annotator")
        count = store.bring_in(
            {
                row.id: [(one.who, one.choices, one.flags, one.seconds) for one in votes[row.key_a, row.key_b]]
                for row in store.pairs()
            }
        )
    skipped = sum(_skipped(a) for task in tasks for a in _annotations(task, every=True))
    left = {"skipped": skipped, "repeated": given - count}
    return {"pairs": len(pairs), "votes": count, "people": len(everybody), **{k: n for k, n in left.items() if n}}


def _read(path: Path) -> list[dict[str, Any]]:
    def no_number(name: str) -> None:
        raise ValueError(f"JSON has no {name}")

    try:
        tasks = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise VideoAlignError(f"{path} is no JSON export of Label Studio ({error})") from None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise VideoAlignError(
            f"{path} is no JSON export of Label Studio: it holds no list of tasks (JSON-MIN and CSV are not read)"
        )
    if not any("data" in task for task in tasks) and any("video_a" in task for task in tasks):
        raise VideoAlignError(
            f"{path} is an export as JSON-MIN, which leaves out who skipped and what was taken back; export the project again as JSON"
        )
    return tasks


def _annotations(task: Mapping[str, Any], every: bool = False) -> list[dict[str, Any]]:
    """A task's annotations, those of Label Studio before 1.0 too; ``every``: with those that were skipped."""
    found = [*(task.get("annotations") or []), *(task.get("completions") or [])]
    return [one for one in found if every or not _skipped(one)]


def _skipped(annotation: Mapping[str, Any]) -> bool:
    return any(annotation.get(mark) for mark in _SKIPPED)


def _why_nothing(tasks: list[dict[str, Any]]) -> str:
    """Why an export holds no vote."""
    if skipped := sum(len(_annotations(task, every=True)) for task in tasks):
        return f"all {skipped} annotations of its {len(tasks)} tasks were skipped or cancelled, so there is no vote to read"
    counts = {name: sum(bool(task.get(name)) for task in tasks) for name in ("predictions", "drafts")}
    told = {
        "predictions": "predictions, which are a model's and nobody's votes",
        "drafts": "drafts, which nobody has submitted",
    }
    has = " and ".join(f"{count} have {told[name]}" for name, count in counts.items() if count)
    numbers = any(task.get("total_annotations") for task in tasks)
    return (
        f"none of its {len(tasks)} tasks has an annotation{f' ({has})' if has else ''}, so there is no vote to read; "
        + (
            "its tasks were annotated, but this is a list of tasks: export the project as JSON"
            if numbers
            else "export the project as JSON after its tasks were annotated"
        )
    )


def _pair(
    task: Mapping[str, Any], where: str, contents: Mapping[str, dict], known: Names
) -> tuple[str, tuple[str, str]]:
    """Prompt and keys of the two videos of a task."""
    data = task.get("data") or {}
    told = data.get("prompt")
    if told is not None and not isinstance(told, str):
        raise VideoAlignError(f"{where}: data.prompt is {told!r}, not a text")
    told = told.strip() or None if told else None
    named = []
    for name in ("video_a", "video_b"):
        if not isinstance(data.get(name), str) or not data[name].strip():
            raise VideoAlignError(f"{where}: data.{name} is missing")
        named.append(known.find(data[name], where, told))
    fits = [
        (a, b)
        for a in sorted(named[0])
        for b in sorted(named[1])
        if a != b
        and contents[a].get("prompt") == contents[b].get("prompt")
        and told in (None, str(contents[a].get("prompt")).strip())
    ]
    if len(fits) > 1:
        raise VideoAlignError(
            f"{where}: its videos were imported under several prompts, such as {contents[fits[0][0]]['prompt']!r} and "
            f"{contents[fits[1][0]]['prompt']!r}, and data.prompt does not say which one was shown; add it"
        )
    if not fits:
        keys = tuple(min(keys) for keys in named)
        raise VideoAlignError(
            f"{where}: videos {keys} are not two of the prompt {told or contents[keys[0]].get('prompt')!r}"
        )
    return contents[fits[0][0]]["prompt"], fits[0]


def _said(annotation: Mapping[str, Any], where: str, protocol: RatingProtocol, people: Mapping[str, str]) -> Said:
    choices, flags = _choices(annotation.get("result") or [], where)
    if not flags and (lacking := [c for c in protocol.columns if c not in choices]):
        asked = sorted({str(item.get("from_name")) for item in annotation.get("result") or []} - {*COLUMNS, "flags"})
        other = f"; what it has is called {', '.join(asked)}" if asked else ""
        raise VideoAlignError(f"{where}: an annotation lacks a choice in {', '.join(lacking)}{other}")
    seconds = float(annotation.get("lead_time") or 0)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"lead_time is {seconds}")
    number = annotation.get("unique_id", annotation.get("id"))
    who = _name(annotation.get("completed_by"), where)
    return Said(
        people.get(who, who), choices, tuple(flags), seconds, _time(annotation), None if number is None else str(number)
    )


def _time(annotation: Mapping[str, Any]) -> float | None:
    """When an annotation was made: a text, or before 1.0 seconds since 1970."""
    when = annotation.get("created_at")
    if when is None or isinstance(when, int | float):
        return when
    at = datetime.fromisoformat(when)
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp()


def _once(said: Iterable[Said]) -> list[Said]:
    """Each annotation once, a person's in the order in which they were made.

    Exports that were merged, and tasks that were imported twice, hold copies: the same annotation by its number, or the same
    content by the same person at the same time. What a person said again later is no copy.
    """
    found: list[Said] = []
    for one in said:
        if not any(_copy(one, other) for other in found):
            found.append(one)
    timed = all(one.created is not None for one in found)
    return sorted(found, key=lambda one: one.created) if timed else found


def _copy(one: Said, other: Said) -> bool:
    alike = (one.who, one.choices, sorted(one.flags)) == (other.who, other.choices, sorted(other.flags))
    if alike and one.number is not None and one.number == other.number:
        return True
    return (
        alike
        and one.seconds == other.seconds
        and (one.created == other.created or one.created is None or other.created is None)
    )


def _choices(result: list[dict[str, Any]], where: str) -> tuple[dict[str, str], list[str]]:
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
    """Who made an annotation: an e-mail address or a number, as the export has it."""
    who = (who.get("email") or who.get("id")) if isinstance(who, dict) else who
    if who is None or not str(who).strip():
        raise VideoAlignError(
            f"{where}: an annotation does not say who made it (completed_by), so that nobody knows whose votes agree; add it where you know it"
        )
    str(who).encode()  # half of a surrogate pair is no text
    return str(who)


def _people(tasks: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """E-mail addresses by numbers, where the export has both: an account is one person however a task names it."""
    found: dict[str, set[str]] = {}
    for task in tasks:
        for annotation in _annotations(task) if _listed(task) else ():
            who = annotation.get("completed_by") if isinstance(annotation, dict) else None
            if isinstance(who, dict) and who.get("id") is not None and who.get("email"):
                found.setdefault(str(who["id"]), set()).add(str(who["email"]))
    return {number: emails.pop() for number, emails in found.items() if len(emails) == 1}


def _listed(task: Mapping[str, Any]) -> bool:
    every = (task.get("annotations") or [], task.get("completions") or [])
    return all(isinstance(one, list) and all(isinstance(a, dict) for a in one) for one in every)
