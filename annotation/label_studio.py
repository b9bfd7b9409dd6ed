"""Pairwise ratings that were collected in Label Studio, as a round of ours.

Reads the JSON export of a project whose tasks hold ``prompt``, ``video_a`` and ``video_b`` (see :mod:`.names` for how
they may name a video) and whose labelling interface asks for a choice in each dimension::

    <View>
      <Text name="prompt" value="$prompt"/>
      <Video name="a" value="$video_a"/> <Video name="b" value="$video_b"/>
      <Choices name="VQ" toName="a"><Choice value="A"/><Choice value="same"/><Choice value="B"/></Choices>
      ... the same for MQ, TA, and Overall where it is asked for ...
      <Choices name="flags" toName="a" choice="multiple"><Choice value="unsafe"/><Choice value="broken"/></Choices>
    </View>

Exports of Label Studio before 1.0, which call annotations ``completions``, are read too where they name the people.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..datamodules.shards import ShardSet
from .names import Names
from .pairing import Pair, split_prompts
from .protocol import RatingProtocol
from .store import new_round
from .studio_annotations import Said, annotations_of, emails, is_skipped, read_annotation, spelled, without_copies

Task = Mapping[str, Any]


@dataclass(frozen=True)
class Rated:
    """The pairs of an export, by the keys of A and B.

    Attributes:
        prompts: The prompt of each pair.
        votes: The annotations of each pair, in the order of the export.
    """

    prompts: dict[tuple[str, str], str]
    votes: dict[tuple[str, str], list[Said]]


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
        protocol: Rules of the round; None stands for the paper's.
        reviewers: People (as the export calls them) whose votes are final.
        names: How the export names videos, one of :data:`.names.NAMES`.

    Returns:
        Number of ``pairs``, ``votes`` and ``people``; where there are any, also of annotations that were ``skipped``,
        and of copies of annotations (``repeated``).

    Raises:
        VideoAlignError: Something is not as described (names the task), or there is no vote.
    """
    tasks, rules = _read(Path(path)), protocol or RatingProtocol()
    if rules.kind != "pairs":
        raise VideoAlignError(f"{path} holds ratings of pairs, and the protocol's kind is {rules.kind}; leave kind out")
    records = {content.key: content.record for content in videos.contents()}
    rated = _rated(tasks, Path(path), records, names, rules)
    given = sum(map(len, rated.votes.values()))
    if not given:
        raise VideoAlignError(f"{path}: {_why_nothing(tasks)}")
    votes = {keys: without_copies(said) for keys, said in rated.votes.items()}
    people, addresses = sorted({one.who for said in votes.values() for one in said}), emails(tasks)
    reviewers = {addresses.get(name, name) for name in map(spelled, reviewers)}
    if unknown := set(reviewers) - set(people):
        raise VideoAlignError(
            f"reviewers {sorted(unknown)} voted on nothing in {path}; it names {', '.join(people[:8])}"
        )
    pairs = _pairs(rated, records, shares, seed)
    with new_round(db, pairs, rules, videos.digest) as store:
        for name in people:
            store.invite(name, "reviewer" if name in reviewers else "annotator")
        rows = {row.id: votes[row.key_a, row.key_b] for row in store.pairs()}
        count = store.bring_in({number: [one.vote for one in said] for number, said in rows.items()})
    skipped = sum(is_skipped(one) for task in tasks for one in annotations_of(task, every=True))
    left_out = {name: n for name, n in (("skipped", skipped), ("repeated", given - count)) if n}
    return {"pairs": len(pairs), "votes": count, "people": len(people), **left_out}


def _rated(tasks: Sequence[Task], path: Path, records: Mapping[str, dict], names: str, rules: RatingProtocol) -> Rated:
    """The pairs of all tasks, and what was said of them."""
    known, addresses, rated = Names(records, names), emails(tasks), Rated({}, {})
    for number, task in enumerate(tasks, 1):
        where = f"task {task.get('id', number)}"
        try:
            prompt, keys = _prompt_and_keys(task, where, records, known)
            said = [read_annotation(one, where, rules, addresses) for one in annotations_of(task)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(f"{where} is not as Label Studio writes them ({error})") from None
        if keys[::-1] in rated.prompts:
            raise VideoAlignError(
                f"{path}: videos {keys} are a pair twice, with A and B exchanged; export one orientation"
            )
        rated.prompts[keys] = prompt
        rated.votes.setdefault(keys, []).extend(said)
    return rated


def _pairs(rated: Rated, records: Mapping[str, dict], shares: tuple[float, float], seed: int) -> list[Pair]:
    splits = split_prompts(sorted({*rated.prompts.values()}), shares, seed)
    return [
        Pair(prompt, keys, tuple(str(records[key].get("source") or "") for key in keys), splits[prompt])
        for keys, prompt in rated.prompts.items()
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    """The tasks of an export."""

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
            f"{path} is an export as JSON-MIN, which leaves out who skipped and what was taken back; export the "
            "project again as JSON"
        )
    return tasks


def _why_nothing(tasks: Sequence[Task]) -> str:
    """Why an export holds no vote."""
    no_vote = "so there is no vote to read"
    if skipped := sum(len(annotations_of(task, every=True)) for task in tasks):
        return f"all {skipped} annotations of its {len(tasks)} tasks were skipped or cancelled, {no_vote}"
    told = {
        "predictions": "predictions, which are a model's and nobody's votes",
        "drafts": "drafts, which nobody has submitted",
    }
    counts = {name: sum(bool(task.get(name)) for task in tasks) for name in told}
    has = " and ".join(f"{count} have {told[name]}" for name, count in counts.items() if count)
    remedy = "export the project as JSON after its tasks were annotated"
    if any(task.get("total_annotations") for task in tasks):
        remedy = "its tasks were annotated, but this is a list of tasks: export the project as JSON"
    none = f"none of its {len(tasks)} tasks has an annotation{f' ({has})' if has else ''}"
    return f"{none}, {no_vote}; {remedy}"


def _prompt_and_keys(task: Task, where: str, records: Mapping[str, dict], known: Names) -> tuple[str, tuple[str, str]]:
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
    prompts = {key: records[key].get("prompt") for keys in named for key in keys}
    fits = [
        (a, b)
        for a in sorted(named[0])
        for b in sorted(named[1])
        if a != b and prompts[a] == prompts[b] and told in (None, str(prompts[a]).strip())
    ]
    if len(fits) > 1:
        raise VideoAlignError(
            f"{where}: its videos were imported under several prompts, such as {prompts[fits[0][0]]!r} and "
            f"{prompts[fits[1][0]]!r}, and data.prompt does not say which one was shown; add it"
        )
    if not fits:
        keys = tuple(min(keys) for keys in named)
        raise VideoAlignError(f"{where}: videos {keys} are not two of the prompt {told or prompts[keys[0]]!r}")
    return records[fits[0][0]]["prompt"], fits[0]
