"""What the tests of stores share: an S3 server on loopback, web servers of files, and faults in front of either."""

import http.client
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import boto3
import pytest
from moto.server import ThreadedMotoServer

from videoalign.datamodules import attempts, stores

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYsecretKEY"
KEY_ID = "AKIAIOSFODNN7EXAMPLE"
BUCKET = "bucket"


@dataclass
class Answer:
    """An answer of a server, before a fault changes it."""

    status: int
    headers: dict[str, str]
    body: bytes


Fault = Callable[[BaseHTTPRequestHandler, Answer], Answer | None]
"""Changes an answer; None where it has dealt with the connection itself."""


def reset(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Half of the body, then a connection that is reset."""
    _head(handler, answer)
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for opened in (handler.rfile, handler.wfile, handler.connection):  # the last of them to close sends the reset
        opened.close()
    handler.close_connection = True


def truncated(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Half of the body, then an orderly end."""
    _head(handler, answer)
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.close_connection = True


def short(handler: BaseHTTPRequestHandler, answer: Answer) -> Answer:
    """A whole answer with half of the bytes that were asked for."""
    return Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2])


def flipped(handler: BaseHTTPRequestHandler, answer: Answer) -> Answer:
    middle = len(answer.body) // 2
    body = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]
    return Answer(answer.status, {k: v for k, v in answer.headers.items() if "checksum" not in k.lower()}, body)


def slow(seconds: float) -> Fault:
    def fault(handler: BaseHTTPRequestHandler, answer: Answer) -> Answer:
        time.sleep(seconds)
        return answer

    return fault


def status(number: int, code: str = "", text: str = "") -> Fault:
    def fault(handler: BaseHTTPRequestHandler, answer: Answer) -> Answer:
        body = f"<Error><Code>{code}</Code><Message>{text or code}</Message></Error>".encode()
        return Answer(number, {"Content-Type": "application/xml"}, body)

    return fault


def _head(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    handler.send_response(answer.status)
    for name, value in answer.headers.items():
        if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
            handler.send_header(name, value)
    length = answer.headers.get("Content-Length") if handler.command == "HEAD" else None
    handler.send_header("Content-Length", length or str(len(answer.body)))
    handler.end_headers()


@dataclass
class Server:
    """A server on loopback with faults.

    Attributes:
        answer: Gives the answer to a request.
        faults: Faults of the next requests whose method and path match a pattern, in order.
        log: Method, path and range of every request.
    """

    answer: Callable[[BaseHTTPRequestHandler, bytes], Answer]
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(length)
                answer = outer.answer(self, sent)
                with lock:
                    outer.log.append((self.command, self.path, self.headers.get("Range", "")))
                    line = f"{self.command} {self.path}"
                    place = next((i for i, (p, _) in enumerate(outer.faults) if re.search(p, line)), None)
                    fault = outer.faults.pop(place)[1] if place is not None else None
                if fault:
                    answer = fault(self, answer)
                if answer is None:
                    return
                _head(self, answer)
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, pattern: str) -> int:
        """Number of GET requests whose path matches."""
        return sum(method == "GET" and bool(re.search(pattern, path)) for method, path, _ in self.log)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def upstream(host: str, port: int) -> Callable[[BaseHTTPRequestHandler, bytes], Answer]:
    """Answers of another server."""

    def answer(handler: BaseHTTPRequestHandler, sent: bytes) -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=30)
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("connection", "expect")}
        connection.request(handler.command, handler.path, sent, headers)
        got = connection.getresponse()
        found = Answer(got.status, dict(got.getheaders()), got.read())
        connection.close()
        return found

    return answer


def files_of(folder: Path) -> Callable[[BaseHTTPRequestHandler, bytes], Answer]:
    """Answers of a web server that serves ranges of files."""

    def answer(handler: BaseHTTPRequestHandler, sent: bytes) -> Answer:
        path = folder / unquote(handler.path.partition("?")[0]).lstrip("/")
        if not path.is_file():
            return Answer(404, {}, b"")
        content = path.read_bytes()
        if not (found := re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))):
            return Answer(200, {"Content-Length": str(len(content))}, content)
        first, last = int(found[1]), int(found[2] or len(content) - 1)
        if first >= len(content):
            return Answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        body = content[first : last + 1]
        return Answer(206, {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(content)}"}, body)

    return answer


logging.getLogger("werkzeug").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    """Port of an S3 server on loopback."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own, no connection of an earlier test, and short pauses."""
    monkeypatch.setenv("VIDEOALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "_filesystems", {})
    monkeypatch.setattr(attempts, "PAUSE", 0.01)


@pytest.fixture
def s3(moto_port: int, quick: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An empty bucket behind a server that makes faults."""
    server = Server(upstream("127.0.0.1", moto_port))
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    client = bucket()
    client.create_bucket(Bucket=BUCKET)
    server.log.clear()
    yield server
    server.faults.clear()
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)
    server.close()


def bucket() -> "boto3.client":
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def upload(folder: Path, prefix: str) -> str:
    """Put a folder's files into the bucket; their address."""
    client = bucket()
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
    return f"s3://{BUCKET}/{prefix}"


def objects(prefix: str = "") -> set[str]:
    """Keys of the objects in the bucket."""
    found = bucket().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"] for entry in found.get("Contents", [])}


@pytest.fixture
def web(quick: None, tmp_path: Path) -> Iterator[Server]:
    """A web server of the folder ``web``."""
    (tmp_path / "web").mkdir()
    server = Server(files_of(tmp_path / "web"))
    yield server
    server.close()
