"""`videoalign annotate serve`: the annotation page, until a signal ends it."""

import secrets
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from .. import VideoAlignError
from ..commands.host_names import bracketed, is_loopback
from ..commands.web_server import serve_until_signal, web_server
from ..datamodules.shards import ShardSet
from . import server
from .beginning import begin, order_by_models, ranks_by_models, watchable
from .connections import LIMITS, Impatient
from .guideline import GUIDELINE, read_guideline
from .request_guard import host_of
from .store import Store

LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names under which this machine may always open the page."""
EVERY_ADDRESS = ("0.0.0.0", "::")
"""Values of --host that mean all addresses of a machine, but are the name of none."""


def serve(
    videos: str,
    db: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    guideline: str | None = None,
    allow_host: Sequence[str] = (),
    refuse_fast: bool = False,
    **options: Any,
) -> None:
    """Serve the page until a signal ends it; begins the round if there is no file of votes yet.

    Args:
        videos: Folder of the *videos* set.
        db: The file of votes.
        host: Address to listen at; only this machine reaches the default.
        port: Port to listen at.
        guideline: YAML file with a guideline that replaces the paper's.
        allow_host: Further names under which the page may be opened, such as that of a proxy before it.
        refuse_fast: Whether votes before one full play of all videos are refused.
        options: Options of :func:`.beginning.begin`, where they are given. A round that has begun uses only ``select``,
            ``model`` and ``device``: they put what is left to rate in a new order.
    """
    hosts = _allowed_hosts(host, allow_host)
    shards, told = watchable(videos), read_guideline(guideline) if guideline else GUIDELINE
    is_new = not Path(db).exists()
    store = begin(videos, db, **options) if is_new else Store(db)
    if not is_new:
        _note_settled(db, options)
    admin = secrets.token_urlsafe(24)
    app = server.make_app(store, shards, admin, told, hosts, refuse_fast)
    if not is_new:
        _reorder(store, shards, db, options)
    _note_reach(host, allow_host)
    url = f"http://{bracketed(host)}:{port}"
    print(f"overview      {url}/overview/{admin}")
    print(f"invite with   videoalign annotate invite NAME --db {db} --url {url}", flush=True)
    listen(app, host, port)


def listen(app: Any, host: str, port: int) -> None:
    """Serve until a signal asks to end; requests that run then have five seconds left.

    Args:
        app: The web application.
        host: Address to listen at.
        port: Port to listen at.
    """
    serve_until_signal(server_of(app), host, port)


def server_of(app: Any) -> uvicorn.Server:
    """uvicorn's server of an application, with limits on the time that a request and a reader take."""
    return web_server(app, http=Impatient, **LIMITS)


def _allowed_hosts(host: str, allow_host: Sequence[str]) -> Collection[str]:
    """Names under which the page may be opened."""
    hosts = {*LOCAL}
    for name in (bracketed(host), *allow_host):
        if not (called := host_of([name])):
            option = "--allow-host" if name in allow_host else "--host"
            raise VideoAlignError(
                f"{option} {name} is no name of a host; name it without http:// and path, IPv6 in brackets"
            )
        hosts.add(called)
    return hosts - {bracketed(address) for address in EVERY_ADDRESS}


def _note_settled(db: str, options: Mapping[str, Any]) -> None:
    """Say that options of a new round change nothing in one that has begun."""
    if settled := sorted(options.keys() - {"select", "model", "device"}):
        named = ", ".join("--" + name.replace("_", "-") for name in settled)
        print(f"note: {db} goes on as it was begun, whatever {named} says now", file=sys.stderr)


def _reorder(store: Store, shards: ShardSet, db: str, options: Mapping[str, Any]) -> None:
    """Put what is left to rate in the order that the options ask for."""
    model = options.get("model", ())
    if not ranks_by_models(options.get("select", "random"), model, store.protocol):
        return
    if rows := [row for row in store.pairs() if row.state == "open"]:
        ends = [(row.key_a, row.key_b) for row in rows]
        order = order_by_models(model, shards, ends, db, options.get("device", "auto"))
        store.prioritise([rows[i].id for i in order])


def _note_reach(host: str, allow_host: Sequence[str]) -> None:
    """Say what to mind where others than this machine reach the page."""
    if not is_loopback(host):
        print(
            f"note: votes and links travel to {host} unencrypted; let others in through HTTPS (a reverse proxy) or a "
            "tunnel",
            file=sys.stderr,
        )
    if host in EVERY_ADDRESS and not allow_host:
        print(
            f"note: --host {host} is every address of this machine, but none that people type; name those under which "
            "they open the page with --allow-host, others are refused",
            file=sys.stderr,
        )
