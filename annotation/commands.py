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
from ..datamodules.ratings import COLUMNS, prompt_of
from ..datamodules.shards import Content, ShardSet, sha256
from ..datamodules.video import coding
from ..models.files import read_yaml
from . import label_studio
from .export import export
from .guideline import GUIDELINE, read_guideline
from .overview import overview
from .pairing import Pair, choose
from .protocol import CHOICES, RatingProtocol
from .store import Store, check_new, new_round

PLAYED = ("h264", "vp8", "vp9", "av1")
"""Codecs of browsers; of H.264 with 8-bit 4:2:0 colours only."""


def begin(
    videos: str,
    db: str,
    per_prompt: int = 3,
    validation: float = 0.1,
    benchmark: float = 0.1,
    seed: int = 0,
    protocol: str | None = None,
    references: str | None = None,
    select: str = "random",
    model: Sequence[str] = (),
    device: str = "auto",
) -> Store:
    """Start a round: choose the pairs and write the file.

    Args:
        videos: *videos* set with several sources per prompt. db: file to make. per_prompt, seed: see :func:`.pairing.choose`.
        validation, benchmark: shares of the prompts.
        protocol: YAML with some of :class:`.protocol.RatingProtocol`'s settings. references: CSV of the training round, with columns
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
    print(
        f"{len(pairs)} pairs to rate ({', '.join(f'{count} {split}' for split, count in counts.items())}), "
        f"{len(training)} for the training round: {db}"
    )
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


def _rules(path: str | None) -> RatingProtocol:
    found = read_yaml(path, "--protocol") if path else {}
    if not isinstance(found, dict):
        raise VideoAlignError(f"--protocol {path} holds no settings by name")
    return RatingProtocol.of(found)


def _references(path: str, contents: dict[str, Content], rules: RatingProtocol) -> list[tuple[Pair, dict[str, str]]]:
    """Training pairs and their right choices."""
    found: list[tuple[Pair, dict[str, str]]] = []
    lines: dict[frozenset[str], int] = {}
    for number, row in enumerate(_table(path), 2):
        where = f"--references {path}, line {number}"
        keys = row.get("key_A") or "", row.get("key_B") or ""
        choices = {column: row[column] for column in rules.columns if row.get(column)}  # of others nobody is asked
        if missing := [key for key in keys if key not in contents]:
            zeros = "; spreadsheets take the zeros of a key away" if missing[0].isdecimal() else ""
            raise VideoAlignError(f"{where}: there is no video {missing[0]!r} in the set{zeros}")
        if not choices or not {*choices.values()} <= {*CHOICES}:
            raise VideoAlignError(f"{where}: choices {choices} must be A, same or B in some of {', '.join(COLUMNS)}")
        if keys[0] == keys[1]:
            raise VideoAlignError(f"{where}: key_A and key_B are the same video {keys[0]!r}")
        if (first := lines.setdefault(frozenset(keys), number)) != number:
            raise VideoAlignError(f"{where}: repeats the pair of line {first}")
        a, b = (contents[key] for key in keys)
        prompt = prompt_of(a.record, a.name)
        if prompt != b.record.get("prompt"):
            raise VideoAlignError(f"{where}: the two videos are of different prompts")
        for column, said, known in (
            ("prompt", row.get("prompt"), prompt),
            *((f"{side}_model", row.get(f"{side}_model"), c.record.get("source")) for side, c in zip("AB", (a, b))),
            *((f"path_{side}", row.get(f"path_{side}"), c.record.get("path")) for side, c in zip("AB", (a, b))),
        ):
            if said and known and said.strip() != known.strip():
                raise VideoAlignError(
                    f"{where}: {column} is {said!r}, but the set's videos {keys} have {known!r}; the keys are those of another set"
                )
        found.append(
            (
                Pair(
                    prompt,
                    keys,
                    (str(a.record.get("source") or ""), str(b.record.get("source") or "")),
                    "training round",
                ),
                choices,
            )
        )
    return found


def _table(path: str) -> list[dict[str, str]]:
    """Rows of the CSV of references."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows, header = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VideoAlignError(f"--references {path} cannot be read ({error})") from None
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise VideoAlignError(
            f"--references {path} has the column {', '.join(twice)} more than once; leave one of each"
        )
    if not rows:
        raise VideoAlignError(f"--references {path} holds no pair; leave it out for a round without training")
    if short := [number for number, row in enumerate(rows, 2) if None in row or None in row.values()]:
        raise VideoAlignError(
            f"--references {path}, line {short[0]}: it has not as many fields as the header, {len(header)}"
        )
    return rows


def serve(
    videos: str,
    db: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    guideline: str | None = None,
    allow_host: Sequence[str] = (),
    **options: Any,
) -> None:
    """Serve the page until it is interrupted; a file that is not there yet is begun.

    Args:
        videos: The *videos* set.
        db: The file of votes.
        host: Address to listen at; nobody but this machine reaches the default.
        port: Port to listen at.
        guideline: YAML of one's own.
        allow_host: Further names under which the page may be opened, such as that of a proxy before it.
        options: Those of :func:`begin`, where they are given. Of a round that has begun ``select`` and ``model`` alone: what is left
            to rate is put in a new order.
    """
    from .server import host_of, make_app

    hosts = {"127.0.0.1", "localhost", "[::1]"}
    for name in (f"[{host}]" if ":" in host else host, *allow_host):
        if not (called := host_of([name])):
            option = "--allow-host" if name in allow_host else "--host"
            raise VideoAlignError(
                f"{option} {name} is no name of a host; name it without http:// and path, IPv6 in brackets"
            )
        hosts.add(called)

    shards, told = _watchable(videos), read_guideline(guideline) if guideline else GUIDELINE
    if Path(db).exists():
        store = Store(db)
        if settled := sorted(options.keys() - {"select", "model", "device"}):
            named = ", ".join("--" + name.replace("_", "-") for name in settled)
            print(f"note: {db} goes on as it was begun, whatever {named} says now", file=sys.stderr)
    else:
        store, options = begin(videos, db, **options), {}
    admin = secrets.token_urlsafe(24)
    app = make_app(store, shards, admin, told, hosts - {"0.0.0.0", "[::]"})
    if _ranked(options.get("select", "random"), options.get("model", ())):
        if rows := [row for row in store.pairs() if row.state == "open"]:
            ends = [(row.key_a, row.key_b) for row in rows]
            store.prioritise(
                [rows[i].id for i in _order(options["model"], shards, ends, db, options.get("device", "auto"))]
            )
    if not _loopback(host):
        print(
            f"note: votes and links travel to {host} unencrypted; let others in through HTTPS (a reverse proxy) or a tunnel",
            file=sys.stderr,
        )
    if host in ("0.0.0.0", "::") and not allow_host:
        print(
            f"note: --host {host} is every address of this machine, but none that people type; name those under which they open the page "
            "with --allow-host, others are refused",
            file=sys.stderr,
        )
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(
        f"overview      {url}/overview/{admin}\ninvite with   videoalign annotate invite NAME --db {db} --url {url}",
        flush=True,
    )
    listen(app, host, port)


def server_of(app: Any) -> Any:
    """uvicorn's server of an app: patient with nobody, and ended by this package's own handling of signals."""
    import uvicorn

    from .connections import LIMITS, Impatient

    server = uvicorn.Server(uvicorn.Config(app, http=Impatient, log_level="warning", server_header=False, **LIMITS))
    # signals would be raised anew at the end, and it knows nothing of SIGHUP
    server.capture_signals = contextlib.nullcontext
    return server


def listen(app: Any, host: str, port: int) -> None:
    """Serve until a signal asks to end; requests that run get five seconds.

    Args:
        app: What is served.
        host: Address to listen at.
        port: Port to listen at. Where another program has it, that is an OSError; uvicorn would end with a status of its own.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        server = server_of(app)

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
    file: str,
    videos: str,
    db: str,
    validation: float = 0.1,
    benchmark: float = 0.1,
    seed: int = 0,
    protocol: str | None = None,
    reviewer: Sequence[str] = (),
    names: str = "both",
) -> None:
    """Read an export of Label Studio into a file of votes."""
    check_new(db)
    found = label_studio.import_label_studio(
        file, _watchable(videos), db, (validation, benchmark), seed, _rules(protocol), tuple(reviewer), names
    )
    print(f"{found['pairs']} pairs, {found['votes']} votes of {found['people']} people: {db}")
    if skipped := found.get("skipped"):
        print(f"left out: {skipped} annotations that were skipped or cancelled")
    if repeated := found.get("repeated"):
        print(f"left out: {repeated} copies of annotations that the export holds more than once")


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
