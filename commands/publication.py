"""What can be published: the kinds of folders, their files, whether they are whole, and what they say of themselves."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..bars import Progress
from ..datamodules.benchmark import PAIRS
from ..datamodules.contents import table_name
from ..datamodules.ratings import COLUMNS
from ..datamodules.shards import ShardSet, sha256
from ..models.files import read_json
from ..models.hub import address_of, at_commit

INDEX, CARD = "index.json", "card.json"
"""Files that mark a set, and what a round of annotation wrote around several."""
_EVERY = {"*": "all sources"}
"""Words for the source of a mask that lies over every video."""
_OF_SETS = tuple(f"{inside}{name}" for inside in ("", "*/") for name in (INDEX, "*.tar", "*.parquet", "*.csv"))


@dataclass
class Subject:
    """A folder that can be published.

    Attributes:
        kind: ``reward``, ``noisy reward``, ``lora``, ``generator``, ``transformer`` or ``data``.
        folder: The folder.
        files: Its files, relative to it; no others are published.
        base: Hub id of the model that it is built on; None where the folder names none on the hub.
        facts: What the card says of it.
        changed: Contents that replace those of files, by name.
        owned: Patterns of the files that an earlier publication of this kind may have left.
    """

    kind: str
    folder: Path
    files: list[str]
    base: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, bytes] = field(default_factory=dict)
    owned: tuple[str, ...] = ()

    @property
    def is_data(self) -> bool:
        """Whether it is a data set, not a model."""
        return self.kind == "data"


def subject_of(folder: Path, base: str | None) -> Subject:
    """Recognise a folder, and check that all of it is there and as it was written.

    Args:
        folder: The folder.
        base: Hub id that the user named for the model that it is built on.

    Raises:
        VideoAlignError: Where it is none of the kinds, is not whole, or was changed.
    """
    if not folder.is_dir():
        raise VideoAlignError(f"{folder}: there is no such folder to publish")
    for mark, read in _KINDS.items():
        if any(folder.glob(mark)):
            subject = read(folder, base)
            subject.files = sorted({*subject.files, *_notices(folder)})
            return subject
    raise VideoAlignError(
        f"{folder} is nothing that can be published: it holds neither reward.json (an exported reward model), "
        f"noisy_reward.json, adapters, model_index.json (a generator), {INDEX} (a set) nor the {CARD} of `annotate "
        "export`"
    )


def _notices(folder: Path) -> Iterator[str]:
    """Licences that stand beside the files."""
    yield from (path.name for name in ("LICENSE*", "NOTICE*") for path in folder.glob(name) if path.is_file())


def _below(folder: Path, *names: str) -> list[str]:
    """Files of the given names, and below the given folders."""
    found = []
    for name in names:
        place = folder / name
        found += [path for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".")]


# --- models -----------------------------------------------------------------------------------------------------------


def _reward(folder: Path, base: str | None) -> Subject:
    from ..models.reward_folder import PARTS, RECORD, RewardFolder

    content = RewardFolder.load(folder)  # compares all checksums
    subject = Subject("reward", folder, _below(folder, *(part.rstrip("/") for part in PARTS)))
    subject.owned = PARTS
    subject.facts = {
        "settings": content.settings,
        "sampling": content.sampling,
        "statistics": content.statistics,
        "backbone_inside": (folder / "backbone").exists(),
        "parameters": sum(tensor.numel() for tensor in content.trained.values()),
    }
    if subject.facts["backbone_inside"]:
        subject.base = base
        return subject
    record = read_json(folder / RECORD, "a reward model's folder")
    if base is None and address_of(content.backbone) is None:
        raise VideoAlignError(
            f"{folder} is built on the backbone {content.backbone}, a folder of this machine that nobody else has. "
            "Name it on the hub with --base ORG/NAME, or export the model with its backbone (--with-backbone)"
        )
    subject.base = base or at_commit(content.backbone, content.backbone_revision)
    if base:
        record = {**record, "backbone": base}
        record.pop("backbone_revision", None)
        subject.changed[RECORD] = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    return subject


def _noisy(folder: Path, base: str | None) -> Subject:
    from ..models.checksums import check
    from ..models.noisy_reward import RECORD

    record = read_json(folder / RECORD, "a noisy reward's folder")
    try:
        check(folder, dict(record["sha256"]["files"]), RECORD)
        facts = {"shape": record["shape"], "statistics": record["statistics"], "generator": record["generator"]}
    except (KeyError, TypeError, ValueError):
        raise VideoAlignError(f"{folder / RECORD} is not the record of a noisy reward. Export it again.") from None
    return Subject("noisy reward", folder, _below(folder, RECORD, "model.safetensors"), base, facts)


def _lora(folder: Path, base: str | None) -> Subject:
    from ..models.adapter_files import METADATA, file_of, read_adapters

    tensors, stated = read_adapters(str(folder))
    from safetensors import safe_open

    file = file_of(str(folder))
    with safe_open(file, "pt") as content:
        settings = json.loads((content.metadata() or {}).get(METADATA, "{}"))
    named = {key.removeprefix("transformer."): value for key, value in settings.items()}
    if (config := folder / "adapter_config.json").is_file():
        named |= read_json(config, "adapters")
    own = named.get("base_model_name_or_path")
    if own and address_of(own) is None:
        own = None
    facts = {"rank": stated.rank, "alpha": stated.alpha, "parameters": sum(t.numel() for t in tensors.values())}
    facts["expert"] = stated.expert
    base = base or (at_commit(own, named.get("revision")) if own else None)
    owned = ("*.safetensors", config.name)
    return Subject("lora", folder, _below(folder, file.name, config.name), base, facts, owned=owned)


def _generator(folder: Path, base: str | None) -> Subject:
    from ..models.whole import check_files

    index = read_json(folder / "model_index.json", "a generator")
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]]
    for part in parts:
        if not (folder / part).is_dir():
            raise VideoAlignError(f"{folder} is not whole: model_index.json lists {part}, which is missing")
        check_files(folder / part, f"the {part} of {folder}")
    facts = {"pipeline": index.get("_class_name")}
    return Subject("generator", folder, _below(folder, "model_index.json", *parts), base, facts)


def _transformer(folder: Path, base: str | None) -> Subject:
    from ..models.whole import check_files

    check_files(folder, str(folder))
    names = [path.name for path in folder.glob("diffusion_pytorch_model*")]
    config = read_json(folder / "config.json", "an exported transformer")
    return Subject(
        "transformer", folder, _below(folder, "config.json", *names), base, {"class": config.get("_class_name")}
    )


# --- data -------------------------------------------------------------------------------------------------------------


ROUND = ("card.md", "votes.jsonl", "decided.csv", "masks.csv", "scores.csv", "rankings.csv", "images")
"""What `annotate export` writes beside the sets."""


def _data(folder: Path, base: str | None) -> Subject:
    if (folder / INDEX).is_file():
        sets, around = {"": folder}, folder.parent / CARD
    else:
        sets = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{INDEX}"))}
        around = folder / CARD
    if not sets:
        raise VideoAlignError(f"{folder} holds a {CARD}, but no set (a folder with {INDEX}) to publish")
    subject = Subject("data", folder, [], owned=_OF_SETS)
    for name, place in sets.items():
        subject.files += [f"{name}/{file}".lstrip("/") for file in _sound(place)]
    described = _described(around, sets)
    if folder == around.parent:
        subject.files += _below(folder, CARD, *ROUND)
    subject.facts = {"sets": {name: _counts(place) for name, place in sets.items()}, **described}
    return subject


def _sound(folder: Path) -> list[str]:
    """Files of a set; refuses one whose shards or tables are not those of its index."""
    shards, progress = ShardSet(folder), Progress()
    wanted = {shard.name: shard.sha256 for shard in shards.index.shards} | dict(shards.index.tables)
    wanted |= {table_name(s.name): s.contents for s in shards.index.shards if s.contents}
    for number, (name, digest) in enumerate(wanted.items(), 1):
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise VideoAlignError(
                f"{folder / name} is not the file that {INDEX} lists (its SHA-256 differs, or it is missing); "
                f"`videoalign shards verify {folder}` tells more, and nothing was published"
            )
        progress("files checked", number, len(wanted))
    return [INDEX, *wanted]


def _counts(folder: Path) -> dict[str, Any]:
    """Numbers of a set for its card."""
    shards = ShardSet(folder)
    prompts, sources, labels, votes = set(), Counter(), {}, []
    for content in shards.contents():
        record = content.record
        prompts.add(record.get("prompt"))
        ends = record["sources"].values() if isinstance(record.get("sources"), dict) else [record.get("source")]
        sources.update(source or "unknown" for source in ends)
        _tally(labels, record.get("labels") or {})
        votes.append(record.get("votes") or [])
    pairs = shards.table(PAIRS) if PAIRS in shards.index.tables else []
    for row in pairs:
        _tally(labels, row)
    index = shards.index
    return {
        "kind": index.kind,
        "media": index.media,
        "samples": index.samples,
        "pairs": len(pairs),
        "bytes": sum(shard.bytes for shard in index.shards),
        "shards": [shard.name for shard in index.shards],
        "prompts": len(prompts),
        "sources": dict(sources.most_common()),
        "labels": labels,
        "agreement": _raw_agreement(votes),
    }


def _tally(labels: dict[str, Counter], row: dict[str, Any]) -> None:
    for column in COLUMNS:
        if row.get(column):
            labels.setdefault(column, Counter())[row[column]] += 1


def _raw_agreement(votes: list[list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Share of two independent votes on one pair that are equal, by column; empty where no pair has two."""
    found: dict[str, list[bool]] = {}
    for of_pair in votes:
        independent = [vote["choices"] for vote in of_pair if not vote.get("review") and not vote.get("flags")]
        for one, other in combinations(independent, 2):
            for column in one.keys() & other.keys():
                found.setdefault(column, []).append(one[column] == other[column])
    return {c: {"raw": sum(found[c]) / len(found[c]), "compared": len(found[c])} for c in COLUMNS if c in found}


def _described(around: Path, sets: dict[str, Path]) -> dict[str, Any]:
    """What the card of a round of annotation says of these sets; empty where there is none."""
    card = read_json(around, "a round of annotation") if around.is_file() else {}
    exported = card.get("exported") if isinstance(card, dict) else None
    if not isinstance(exported, dict) or not {place.name for place in sets.values()} <= exported.keys():
        return {"agreement": {}, "masked": []}
    masks = list(card.get("masks") or [])
    if (table := around.with_name("masks.csv")).is_file():
        with open(table, newline="", encoding="utf-8") as file:
            masks += csv.DictReader(file)
    return {
        "agreement": card.get("agreement") or {},
        "votes": card.get("votes"),
        "people": sum(person.get("votes", 0) > 0 for person in card.get("people") or []),
        "protocol": card.get("protocol") or {},
        "masked": sorted(
            {_EVERY.get(m["source"], m["source"]) for m in masks if isinstance(m, dict) and m.get("source")}
        ),
    }


_KINDS: dict[str, Callable[[Path, str | None], Subject]] = {
    "reward.json": _reward,
    "noisy_reward.json": _noisy,
    "model_index.json": _generator,
    "pytorch_lora_weights.safetensors": _lora,
    "adapter_model.safetensors": _lora,
    "diffusion_pytorch_model*.safetensors*": _transformer,
    INDEX: _data,
    CARD: _data,
}
"""How a folder is read, by a file that marks it."""
