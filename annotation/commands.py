"""What `videoalign annotate ...` does."""

import csv
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import VideoAlignError
from ..datamodules.ratings import COLUMNS
from ..datamodules.shards import ShardSet, sha256
from . import label_studio
from .export import export
from .overview import overview
from .pairing import Pair, choose
from .protocol import CHOICES, Protocol
from .store import Store


def begin(
    videos: str, db: str, per_prompt: int = 3, shares: tuple[float, float] = (0.1, 0.1), seed: int = 0, protocol: str | None = None,
    references: str | None = None, select: str = "random", model: Sequence[str] = (), device: str = "auto",
) -> Store:  # fmt: skip
    """Start a round: choose the pairs and write the file.

    Args:
        videos: *videos* set with several sources per prompt. db: file to make. per_prompt, shares, seed: see :func:`.pairing.choose`.
        protocol: YAML with some of :class:`.protocol.Protocol`'s settings. references: CSV of the training round, with columns
            ``key_A, key_B, VQ, MQ, TA``. select: ``random``, or ``uncertain``: first the pairs that the reward models in
            ``model`` (one or two folders) know least of; computed on ``device``.
    """
    if (select == "uncertain") != bool(model):
        raise VideoAlignError("--select uncertain needs --model, and --model needs --select uncertain")
    shards = ShardSet(videos, "videos")
    if shards.index.media != "mp4":
        raise VideoAlignError(f"--videos {videos} holds decoded frames; people need the set with mp4 files")
    rules = Protocol.of(_yaml(protocol) if protocol else {})
    contents = list(shards.contents())
    training = _references(references, {content.key: content for content in contents}, rules) if references else []
    taken = {key for pair, _ in training for key in pair.keys}
    pairs = choose([content for content in contents if content.key not in taken], per_prompt, shares, seed)
    if Path(db).exists():
        raise VideoAlignError(f"--db {db} exists already; name a new file")
    store = Store(db, create=True)
    store.begin(pairs, rules, sha256(shards.path / "index.json"), training)
    counts = {
        split: sum(pair.split == split for pair in pairs) for split in dict.fromkeys(pair.split for pair in pairs)
    }
    print(f"{len(pairs)} pairs to rate ({', '.join(f'{count} {split}' for split, count in counts.items())}), "
          f"{len(training)} for the training round: {db}")  # fmt: skip
    return store


def _yaml(path: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VideoAlignError(f"--protocol {path} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise VideoAlignError(f"--protocol {path} holds no settings by name")
    return found


def _references(path: str, contents: dict, rules: Protocol) -> list[tuple[Pair, dict[str, str]]]:
    """Training pairs and their right choices."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VideoAlignError(f"--references {path} cannot be read ({error})") from None
    found = []
    for number, row in enumerate(rows, 2):
        keys = row.get("key_A") or "", row.get("key_B") or ""
        choices = {column: row[column] for column in rules.columns if row.get(column)}  # of others nobody is asked
        if missing := [key for key in keys if key not in contents]:
            raise VideoAlignError(f"--references {path}, line {number}: there is no video {missing[0]!r} in the set")
        if not choices or not {*choices.values()} <= {*CHOICES}:
            raise VideoAlignError(
                f"--references {path}, line {number}: choices {choices} must be A, same or B in some of {', '.join(COLUMNS)}"
            )
        a, b = (contents[key].record for key in keys)
        if a.get("prompt") != b.get("prompt"):
            raise VideoAlignError(f"--references {path}, line {number}: the two videos are of different prompts")
        found.append(
            (
                Pair(a["prompt"], keys, (str(a.get("source") or ""), str(b.get("source") or "")), "training round"),
                choices,
            )
        )
    return found


def serve(videos: str, db: str, host: str = "127.0.0.1", port: int = 8000, **begin_with: Any) -> None:
    """Serve the page until it is interrupted; a file that is not there yet is begun.

    Args:
        host, port: to listen at; nobody but this machine reaches the default. begin_with: see :func:`begin`.
    """
    uvicorn = _extra("uvicorn")
    from .server import make_app

    store = Store(db) if Path(db).exists() else begin(videos, db, **begin_with)
    admin = secrets.token_urlsafe(24)
    app = make_app(store, ShardSet(videos, "videos"), admin)
    print(f"overview      http://{host}:{port}/overview/{admin}\n"
          f"invite with   videoalign annotate invite NAME --db {db} --url http://{host}:{port}", flush=True)  # fmt: skip
    uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)


def _extra(name: str) -> Any:
    """A module of the extra."""
    try:
        return __import__(name)
    except ImportError:
        raise VideoAlignError(
            f"{name} is not installed; the page needs the extra: pip install 'videoalign[annotate]'"
        ) from None


def import_label_studio(
    file: str, videos: str, db: str, shares: tuple[float, float] = (0.1, 0.1), seed: int = 0, protocol: str | None = None, reviewer: Sequence[str] = (),
) -> None:  # fmt: skip
    """Read an export of Label Studio into a file of votes."""
    rules = Protocol.of(_yaml(protocol)) if protocol else None
    found = label_studio.import_label_studio(file, ShardSet(videos, "videos"), db, shares, seed, rules, tuple(reviewer))
    print(f"{found['pairs']} pairs, {found['votes']} votes of {found['people']} people: {db}")


def simulate(out: str, seeds: int) -> None:
    """Compare the two orders in the miniature world."""
    from .simulate import simulate as run

    run(out, seeds)


def invite(db: str, name: str, role: str, url: str) -> None:
    """Print a person's link."""
    print(f"{url.rstrip('/')}/a/{Store(db).invite(name, role)}")


def revoke(db: str, name: str) -> None:
    """Make a person's link worthless."""
    Store(db).revoke(name)
    print(f"the link of {name} opens nothing any more; what was rated stays")


def status(db: str) -> None:
    """Print where the round stands, as JSON."""
    found = json.loads(json.dumps(overview(Store(db))), parse_constant=lambda name: None)  # JSON has no NaN
    print(json.dumps(found, indent=1, ensure_ascii=False))


def write(db: str, videos: str, out: str, names: bool = False) -> None:
    """Export the decided pairs; print what was written."""
    card = export(Store(db), ShardSet(videos, "videos"), out, names)
    print("\n".join(f"{Path(out) / split}: {count} pairs" for split, count in card["exported"].items()))
    print(f"{Path(out) / 'card.md'}: agreement, labels, protocol")
