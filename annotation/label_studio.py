"""Pairwise ratings that were collected in Label Studio, as a round of ours.

Reads the JSON export of a project whose tasks hold ``prompt``, ``video_a`` and ``video_b`` (paths or URLs whose file names, without
extension, are keys of the *videos* set) and whose labelling interface asks for a choice in each dimension::

    <View>
      <Text name="prompt" value="$prompt"/>
      <Video name="a" value="$video_a"/> <Video name="b" value="$video_b"/>
      <Choices name="VQ" toName="a"><Choice value="A"/><Choice value="same"/><Choice value="B"/></Choices>
      ... the same for MQ, TA, and Overall where it is asked for ...
      <Choices name="flags" toName="a" choice="multiple"><Choice value="unsafe"/><Choice value="broken"/></Choices>
    </View>
"""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .. import VideoAlignError
from ..datamodules.ratings import COLUMNS
from ..datamodules.shards import ShardSet, sha256
from .pairing import Pair, split_prompts
from .protocol import CHOICES, Protocol
from .store import new_round


def import_label_studio(
    path: str | Path, videos: ShardSet, db: str | Path, shares: tuple[float, float] = (0.1, 0.1), seed: int = 0,
    protocol: Protocol | None = None, reviewers: tuple[str, ...] = (),
) -> dict[str, int]:  # fmt: skip
    """Write a file of votes out of an export; it can be reviewed, measured and exported like any other.

    Args:
        path: JSON export. videos: the set. db: file to make. shares, seed: see :func:`.pairing.split_prompts`.
        reviewers: people (as the export calls them) whose votes are final.

    Returns:
        Counts of pairs, votes and people.

    Raises:
        VideoAlignError: with the task's number where something is not as described.
    """
    tasks = _read(Path(path))
    contents = {content.key: content.record for content in videos.contents()}
    rules = protocol or Protocol()
    found = []
    for number, task in enumerate(tasks, 1):
        try:
            found.append(_task(task, number, contents, rules))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(
                f"task {task.get('id', number)} is not as Label Studio writes them ({error})"
            ) from None
    pairs: dict[tuple[str, str], Pair] = {}
    splits = split_prompts(sorted({prompt for prompt, _, _ in found}), shares, seed)
    votes: dict[tuple[str, str], list[tuple[str, dict[str, str], list[str], float]]] = {}
    for prompt, keys, said in found:
        if keys[::-1] in pairs:
            raise VideoAlignError(
                f"{path}: videos {keys} are a pair twice, with A and B exchanged; export one orientation"
            )
        sources = tuple(str(contents[key].get("source") or "") for key in keys)
        pairs[keys] = Pair(prompt, keys, sources, splits[prompt])
        votes.setdefault(keys, []).extend(said)
    names = sorted({name for said in votes.values() for name, *_ in said})
    if unknown := set(reviewers) - set(names):
        raise VideoAlignError(
            f"reviewers {sorted(unknown)} voted on nothing in {path}; it names {', '.join(names[:8])}"
        )
    with new_round(db, list(pairs.values()), rules, sha256(videos.path / "index.json")) as store:
        for name in names:
            store.invite(name, "reviewer" if name in reviewers else "annotator")
        count = store.bring_in({row.id: votes[row.key_a, row.key_b] for row in store.pairs()})
    return {"pairs": len(pairs), "votes": count, "people": len(names)}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VideoAlignError(f"{path} is no JSON export of Label Studio ({error})") from None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise VideoAlignError(
            f"{path} is no JSON export of Label Studio: it holds no list of tasks (JSON-MIN and CSV are not read)"
        )
    return tasks


def _task(
    task: dict[str, Any], number: int, contents: dict[str, dict], protocol: Protocol
) -> tuple[str, tuple[str, str], list[tuple[str, dict[str, str], list[str], float]]]:
    """Prompt, keys, and (name, choices, flags, seconds) of each annotation that was not skipped."""
    data = task.get("data") or {}
    where = f"task {task.get('id', number)}"
    keys = tuple(_key(data.get(name), where, name) for name in ("video_a", "video_b"))
    # uploads have eight random characters before their names
    keys = tuple(key if key in contents else re.sub(r"^[0-9a-f]{8}-", "", key) for key in keys)
    if missing := [key for key in keys if key not in contents]:
        raise VideoAlignError(f"{where}: there is no video {missing[0]!r} in the set")
    prompt = contents[keys[0]].get("prompt")
    if keys[0] == keys[1] or prompt != contents[keys[1]].get("prompt") or data.get("prompt", prompt) != prompt:
        raise VideoAlignError(f"{where}: videos {keys} are not two of the prompt {data.get('prompt', prompt)!r}")
    said = []
    for annotation in task.get("annotations") or []:
        if annotation.get("was_cancelled"):
            continue
        choices, flags = _choices(annotation.get("result") or [], where)
        if not flags and (lacking := [c for c in protocol.columns if c not in choices]):
            raise VideoAlignError(f"{where}: an annotation lacks a choice in {', '.join(lacking)}")
        said.append((_name(annotation, where), choices, flags, float(annotation.get("lead_time") or 0)))
    return prompt, keys, said


def _choices(result: list[dict[str, Any]], where: str) -> tuple[dict[str, str], list[str]]:
    choices: dict[str, str] = {}
    flags: list[str] = []
    for item in result:
        name, chosen = item.get("from_name"), (item.get("value") or {}).get("choices") or []
        if name == "flags":
            flags = [str(flag) for flag in chosen]
            if not {*flags} <= {"unsafe", "broken"}:
                raise VideoAlignError(f"{where}: flags {flags} are unknown; they are unsafe and broken")
        elif name in COLUMNS:
            if len(chosen) != 1 or chosen[0] not in CHOICES:
                raise VideoAlignError(f"{where}: {name} is {chosen}, not one of {', '.join(CHOICES)}")
            choices[name] = chosen[0]
    return choices, flags


def _key(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise VideoAlignError(f"{where}: data.{name} is missing")
    parts = urlsplit(value)
    path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]  # local files stand in ?d=
    return PurePosixPath(path).stem


def _name(annotation: dict[str, Any], where: str) -> str:
    """Who made an annotation: an e-mail address or a number, as the export has it."""
    who = annotation.get("completed_by")
    who = (who.get("email") or who.get("id")) if isinstance(who, dict) else who
    if who is None:
        raise VideoAlignError(f"{where}: an annotation does not say who made it (completed_by)")
    return str(who)
