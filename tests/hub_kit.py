"""A stand-in of the Hugging Face hub on loopback: the part of its protocol that huggingface_hub speaks, with faults.

Repositories live in memory: commits by id, files by path, branches by name. Files above :data:`LARGE` bytes and binary
ones go through LFS, as on the hub: a redirect to another address on download, batch and upload before the commit.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_SecretOfTheTests"
"""The token that may write, and read what is private."""
READER = "hf_ReadsAlone"
"""A token that may not write."""
LARGE = 10_000
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass
class Repo:
    """A repository.

    Attributes:
        commits: Files by path, by commit; the newest last.
        branches: Commits by branch or tag.
        private: Whether a token is asked for.
        gated: Whether nobody has been let in.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files; returns its id."""
        number = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[number] = dict(files)
        self.branches[branch] = number
        return number

    def at(self, revision: str) -> str | None:
        """Commit of a branch, a tag or a commit."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def is_lfs(name: str, content: bytes) -> bool:
    return len(content) > LARGE or name.endswith((".safetensors", ".tar", ".zip", ".parquet", ".mp4", ".pth"))


def blob_id(content: bytes) -> str:
    """The id that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The server, its repositories, what was asked of it, and the faults that it has been told to have.

    Attributes:
        repos: Repositories by (kind, id).
        log: Method and path of every request.
        cut: Bytes after which a download of a large file breaks off, as often as :attr:`cuts` says.
        status: Status that every answer has; None for sound answers.
        refused: Part of the paths that are answered with 500; empty for none.
        delay: Seconds before every answer.
        url: Address of the hub itself.
        storage: Address of its storage of large files, which gets no token.
        ranges: Range headers of downloads.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploaded: dict[str, bytes] = {}
        self.log: list[str] = []
        self.ranges: list[str] = []
        self.refused = ""
        self.cut, self.cuts, self.status, self.delay = 0, 0, None, 0.0
        bound = type("Bound", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), bound) for _ in range(2)]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, source: Path | dict[str, bytes], kind: str = "model", branch: str = "main") -> str:
        """Add a commit with a folder's files; returns its id."""
        if isinstance(source, Path):
            paths = (path for path in source.rglob("*") if path.is_file())
            source = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
        return self.repos.setdefault((kind, name), Repo()).commit(source, branch)

    def files(self, name: str, kind: str = "model", branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[kind, name]
        return repo.commits[repo.branches[branch]]

    def asked(self, part: str) -> list[str]:
        """The requests that hold a text."""
        return [line for line in self.log if part in line]

    @contextmanager
    def faults(self, **values) -> Iterator[None]:
        """Have faults during a block."""
        before = {name: getattr(self, name) for name in values}
        for name, value in values.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


class Refusal(Exception):
    """An answer with an error's status and the hub's own code for it."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        self.hub.log.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self._chunk, b""))
        time.sleep(self.hub.delay)
        try:
            if self.hub.status:
                raise Refusal(self.hub.status, "", "the stand-in was told to")
            if self.hub.refused and self.hub.refused in self.path:
                raise Refusal(500, "", "the stand-in was told to")
            url = urlsplit(self.path)
            self.query = parse_qs(url.query)
            self.route([unquote(part) for part in url.path.strip("/").split("/")])
        except Refusal as refusal:
            status, code, text = refusal.args
            self.send(b"", status, {"X-Error-Code": code, "X-Error-Message": text})
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content

    def send(self, content: bytes | list | dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- what is asked --------------------------------------------------------------------------------------------

    def route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "whoami-v2"]:
                self.check(write=True)
                self.send({"name": "org", "type": "user", "orgs": []})
            case ["api", "validate-yaml"]:
                self.send({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self.create(json.loads(self.body))
            case ["api", kind, org, name, "preupload", revision]:
                self.preupload(self.repo(KINDS[kind], f"{org}/{name}", write=True), revision)
            case ["api", kind, org, name, "commit", revision]:
                self.commit(self.repo(KINDS[kind], f"{org}/{name}", write=True), self.page(kind, org, name), revision)
            case ["api", kind, org, name, "branch", branch]:
                repo = self.repo(KINDS[kind], f"{org}/{name}", write=True)
                repo.branches.setdefault(branch, repo.branches["main"])
                self.send({})
            case ["api", kind, org, name, "tree", revision, *_]:
                self.tree(*self.at(KINDS[kind], f"{org}/{name}", revision))
            case ["api", kind, org, name, "revision", revision]:
                self.info(f"{org}/{name}", *self.at(KINDS[kind], f"{org}/{name}", revision))
            case ["api", kind, org, name]:
                self.info(f"{org}/{name}", *self.at(KINDS[kind], f"{org}/{name}", "main"))
            case ["datasets", org, name, "resolve", revision, *path]:
                self.resolve(*self.at("dataset", f"{org}/{name}", revision), "/".join(path))
            case ["datasets", *_, "info", "lfs", "objects", "batch"] | [_, _, "info", "lfs", "objects", "batch"]:
                self.batch(json.loads(self.body))
            case [org, name, "resolve", revision, *path]:
                self.resolve(*self.at("model", f"{org}/{name}", revision), "/".join(path))
            case ["blobs", digest]:
                assert not self.headers.get("Authorization"), "the hub's token was sent to its storage"
                self.blob(digest)
            case ["uploads", digest]:
                if hashlib.sha256(self.body).hexdigest() != digest:
                    raise Refusal(400, "", "another content")
                self.hub.uploaded[digest] = self.body
                self.send(b"")
            case _:
                raise Refusal(404, "", f"the stand-in does not know {self.path}")

    def check(self, write: bool = False) -> None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given not in (("", READER, TOKEN) if not write else (READER, TOKEN)):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if write and given == READER:
            raise Refusal(403, "", "this token has no write access")

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        self.check(write)
        repo, known = self.hub.repos.get((kind, name)), self.headers.get("Authorization")
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        if repo.gated:
            raise Refusal(403, "GatedRepo", "Access is restricted")
        return repo

    def at(self, kind: str, name: str, revision: str) -> tuple[Repo, str]:
        repo = self.repo(kind, name)
        if (commit := repo.at(revision)) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    # --- reading --------------------------------------------------------------------------------------------------

    def info(self, name: str, repo: Repo, commit: str) -> None:
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        self.send(
            {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
        )

    def tree(self, repo: Repo, commit: str) -> None:
        entries: dict[str, dict] = {}
        for path, content in repo.commits[commit].items():
            for parent in Path(path).parents[:-1]:
                entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": "0" * 40, "size": 0}
            entry = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
            if is_lfs(path, content):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries[path] = entry
        self.send([*entries.values()])

    def resolve(self, repo: Repo, commit: str, path: str) -> None:
        head = {"X-Repo-Commit": commit}
        if path not in repo.commits[commit]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = repo.commits[commit][path]
        if is_lfs(path, content):
            digest = hashlib.sha256(content).hexdigest()
            self.hub.uploaded[digest] = content
            head |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self.send(b"", 302, {**head, "Location": f"{self.hub.storage}/blobs/{digest}"})
        else:
            self.content(content, {**head, "ETag": f'"{blob_id(content)}"'})

    def blob(self, digest: str) -> None:
        self.content(self.hub.uploaded[digest], {"ETag": f'"{digest}"'})

    def content(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a content, from where the Range header says; break off where a fault says so."""
        first, status, size = 0, 200, len(content)
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            first, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            headers |= {"Content-Range": f"bytes {first}-{size - 1}/{size}"}
        rest = content[first:]
        if self.command == "GET" and self.hub.cut and self.hub.cuts > 0 and len(rest) > self.hub.cut:
            self.hub.cuts -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(rest)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(rest[: self.hub.cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.send(rest, status, headers)

    # --- writing --------------------------------------------------------------------------------------------------

    def create(self, wanted: dict) -> None:
        self.check(write=True)
        name = f"{wanted['organization']}/{wanted['name']}"
        kind = wanted.get("type", "model")
        page = self.page(f"{kind}s", wanted["organization"], wanted["name"])
        if wanted["organization"] == "closed":
            raise Refusal(403, "", "You don't have the rights to create a model under the namespace closed")
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            repo = self.hub.repos[kind, name] = Repo(private=wanted.get("visibility") == "private")
            repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.send({"url": page, "id": name, "name": name})
        else:
            self.send({"url": page, "error": "You already created this repo"}, 409)

    def preupload(self, repo: Repo, revision: str) -> None:
        if (commit := repo.at(revision)) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        there, answer = repo.commits[commit], []
        for file in json.loads(self.body)["files"]:
            path, content = file["path"], there.get(file["path"])
            large = is_lfs(path, b"\0" * file["size"])
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if content is not None:
                entry["oid"] = hashlib.sha256(content).hexdigest() if large else blob_id(content)
            answer.append(entry)
        self.send({"files": answer})

    def batch(self, wanted: dict) -> None:
        self.check(write=True)
        objects = []
        for one in wanted["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.uploaded:
                entry["actions"] = {"upload": {"href": f"{self.hub.storage}/uploads/{one['oid']}"}}
            objects.append(entry)
        self.send({"transfer": "basic", "objects": objects}, 200, {"Content-Type": "application/vnd.git-lfs+json"})

    def page(self, kind: str, org: str, name: str) -> str:
        return f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{org}/{name}"

    def commit(self, repo: Repo, page: str, revision: str) -> None:
        files = dict(repo.commits[repo.at(revision)])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.uploaded[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        number = repo.commit(files, revision)
        self.send({"success": True, "commitOid": number, "commitUrl": f"{page}/commit/{number}"})


# --- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A stand-in without repositories."""
    server = Hub()
    yield server
    server.close()


def environment(hub: Hub | str, home: Path, **more: str) -> dict[str, str]:
    """Variables of a process that knows this hub alone, with a cache of its own and no token."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    url = hub if isinstance(hub, str) else hub.url
    return {
        **kept,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def apart(code: str, env: dict[str, str], timeout: float = 120) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own: the hub's client reads its variables when it is imported."""
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def reached(hub, tmp_path, monkeypatch) -> Hub:
    """A stand-in that this process takes for the hub, with an empty cache, no token, and nothing remembered."""
    from huggingface_hub import constants

    from videoalign.models import hub as ours

    point_at(hub.url, tmp_path / "home", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    forget()
    yield hub
    forget()
    assert ours._commits == {}


def point_at(url: str, home: Path, monkeypatch) -> None:
    """Let this process's client ask another address, with another cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))


def forget() -> None:
    """Forget what a process remembers of the hub, as a new one would."""
    from videoalign.models import hub as ours

    ours._commits.clear()
    ours._silent.clear()
    ours._say.cache_clear()
