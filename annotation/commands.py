"""What `videoalign annotate ...` does."""

import contextlib
import csv
import ipaddress
import json
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import VideoAlignError, stopping
from ..datamodules.ratings import COLUMNS
from ..datamodules.shards import Content, ShardSet, sha256
from ..datamodules.video import coding
from ..models.files import read_yaml
from . import label_studio
from .export import export
from .guideline import GUIDELINE, read_guideline
from .overview import overview
from .pairing import Pair, choose
from .protocol import CHOICES, Protocol
from .store import Store, check_new, new_round

PLAYED = ("h264", "vp8", "vp9", "av1")
"""Codecs of browsers; of H.264 with 8-bit 4:2:0 colours only."""


def begin(
    videos: str, db: str, per_prompt: int = 3, validation: float = 0.1, benchmark: float = 0.1, seed: int = 0,
    protocol: str | None = None, references: str | None = None, select: str = "random", model: Sequence[str] = (), device: str = "auto",
) -> Store:  # fmt: skip
    """Start a round: choose the pairs and write the file.

    Args:
        videos: *videos* set with several sources per prompt. db: file to make. per_prompt, seed: see :func:`.pairing.choose`.
        validation, benchmark: shares of the prompts.
        protocol: YAML with some of :class:`.protocol.Protocol`'s settings. references: CSV of the training round, with columns
            ``key_A, key_B, VQ, MQ, TA``. select: ``random``, or ``uncertain``: first the pairs that the reward models in
            ``model`` (one or two folders) know least of; computed on ``device``.
    """
    ranked, rules = _ranked(select, model), _rules(protocol)
    check_new(db)
    shards = _watchable(videos)
    contents = _played(shards)
    training = _references(references, {content.key: content for content in contents}, rules) if references else []
    taken = {key for pair, _ in training for key in pair.keys}
    pairs = choose(
        [content for content in contents if content.key not in taken], per_prompt, (validation, benchmark), seed
    )
    if ranked:
        pairs = [pairs[i] for i in _order(model, shards, [pair.keys for pair in pairs], db, device)]
    with new_round(db, pairs, rules, sha256(shards.path / "index.json"), training):
        pass
    counts = {
        split: sum(pair.split == split for pair in pairs) for split in dict.fromkeys(pair.split for pair in pairs)
    }
    print(f"{len(pairs)} pairs to rate ({', '.join(f'{count} {split}' for split, count in counts.items())}), "
          f"{len(training)} for the training round: {db}")  # fmt: skip
    return Store(db)


def _ranked(select: str, model: Sequence[str]) -> bool:
    """Whether reward models decide the order."""
    if (select == "uncertain") != bool(model):
        raise VideoAlignError("--select uncertain needs --model, and --model needs --select uncertain")
    return bool(model)


def _order(model: Sequence[str], shards: ShardSet, ends: Sequence[tuple[str, str]], db: str, device: str) -> list[int]:
    """Places of pairs, the least certain one first; rewards are kept beside the file of votes."""
    from .select import rank

    print(f"ranking {len(ends)} pairs by what {' and '.join(model)} know of them", file=sys.stderr, flush=True)
    found = rank(model, shards, ends, Path(f"{db}.rewards"), device)
    return found.argsort(descending=True, stable=True).tolist()


def _watchable(path: str) -> ShardSet:
    """A set of videos that people can look at."""
    shards = ShardSet(path, "videos")
    if shards.index.media != "mp4":
        raise VideoAlignError(f"--videos {path} holds decoded frames; people need the set with mp4 files")
    return shards


def _played(shards: ShardSet) -> list[Content]:
    """A set's contents, all of which browsers play."""
    contents, silent = list(shards.contents()), []
    print(f"looking whether browsers play the {len(contents)} videos of {shards.path}", file=sys.stderr, flush=True)
    for content in contents:
        codec, pixels = coding(content.read("mp4"), content.name)
        if codec not in PLAYED or (codec == "h264" and pixels not in ("yuv420p", "yuvj420p")):
            silent.append(f"{content.key}: {codec} {pixels}")
    if silent:
        raise VideoAlignError(
            f"browsers do not play {len(silent)} of the {len(contents)} videos in {shards.path}, first {silent[0]}; make H.264 files with "
            "4:2:0 colours of them (ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT) and import those"
        )
    return contents


def _rules(path: str | None) -> Protocol:
    found = read_yaml(path, "--protocol") if path else {}
    if not isinstance(found, dict):
        raise VideoAlignError(f"--protocol {path} holds no settings by name")
    return Protocol.of(found)


def _references(path: str, contents: dict, rules: Protocol) -> list[tuple[Pair, dict[str, str]]]:
    """Training pairs and their right choices."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VideoAlignError(f"--references {path} cannot be read ({error})") from None
    if not rows:
        raise VideoAlignError(f"--references {path} holds no pair; leave it out for a round without training")
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


def serve(
    videos: str, db: str, host: str = "127.0.0.1", port: int = 8000, guideline: str | None = None, **options: Any
) -> None:
    """Serve the page until it is interrupted; a file that is not there yet is begun.

    Args:
        host, port: to listen at; nobody but this machine reaches the default. guideline: YAML of one's own. options: of
            :func:`begin`, where they are given. Of a round that has begun ``select`` and ``model`` alone: what is left to rate is put
            in a new order.
    """
    from .server import make_app

    shards, told = _watchable(videos), read_guideline(guideline) if guideline else GUIDELINE
    if Path(db).exists():
        store = Store(db)
        if settled := sorted(options.keys() - {"select", "model", "device"}):
            named = ", ".join("--" + name.replace("_", "-") for name in settled)
            print(f"note: {db} goes on as it was begun, whatever {named} says now", file=sys.stderr)
    else:
        store, options = begin(videos, db, **options), {}
    admin = secrets.token_urlsafe(24)
    app = make_app(store, shards, admin, told)
    if _ranked(options.get("select", "random"), options.get("model", ())):
        if rows := [row for row in store.pairs() if row.state == "open"]:
            ends = [(row.key_a, row.key_b) for row in rows]
            store.prioritise(
                [rows[i].id for i in _order(options["model"], shards, ends, db, options.get("device", "auto"))]
            )
    if not _loopback(host):
        print(f"note: votes and links travel to {host} unencrypted; let others in through HTTPS (a reverse proxy) or a tunnel",
              file=sys.stderr)  # fmt: skip
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(
        f"overview      {url}/overview/{admin}\ninvite with   videoalign annotate invite NAME --db {db} --url {url}",
        flush=True,
    )
    listen(app, host, port)


def listen(app: Any, host: str, port: int) -> None:
    """Serve until a signal asks to end; requests that run get five seconds.

    Args:
        app: What is served.
        host: Address to listen at.
        port: Port to listen at. Where another program has it, that is an OSError; uvicorn would end with a status of its own.
    """
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        )
        server.capture_signals = (
            contextlib.nullcontext
        )  # they would be raised anew at the end, and know nothing of SIGHUP

        def end() -> None:
            server.should_exit = True

        with stopping.deferred(end):
            server.run(sockets=[listening])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def import_label_studio(
    file: str, videos: str, db: str, validation: float = 0.1, benchmark: float = 0.1, seed: int = 0, protocol: str | None = None,
    reviewer: Sequence[str] = (),
) -> None:  # fmt: skip
    """Read an export of Label Studio into a file of votes."""
    check_new(db)
    found = label_studio.import_label_studio(
        file, _watchable(videos), db, (validation, benchmark), seed, _rules(protocol), tuple(reviewer)
    )
    print(f"{found['pairs']} pairs, {found['votes']} votes of {found['people']} people: {db}")


def simulate(out: str, seeds: int) -> None:
    """Compare the orders in the miniature world."""
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
    found = json.loads(json.dumps(overview(Store(db).round())), parse_constant=lambda name: None)  # JSON has no NaN
    print(json.dumps(found, indent=1, ensure_ascii=False))


def write(db: str, videos: str, out: str, names: bool = False) -> None:
    """Export the decided pairs; print what was written."""
    card = export(Store(db), ShardSet(videos, "videos"), out, names)
    print("\n".join(f"{Path(out) / split}: {count} pairs" for split, count in card["exported"].items()))
    print(f"{Path(out) / 'card.md'}: agreement, labels, protocol")
