"""The annotation page over HTTP: access, videos, votes, and the overview."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent))
from annotation_helpers import GOOD, ballot, task_of, write_sprites
from videoalign import VideoAlignError
from videoalign.annotation.beginning import begin
from videoalign.annotation.export import export
from videoalign.annotation.server import make_app
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.miniature.world.sprites import SOURCES


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("set") / "videos")


@pytest.fixture
def round_(videos, tmp_path):
    """A round without hidden repetitions, and a client of its server."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("repeats: 0.0\n")
    store = begin(str(videos), str(tmp_path / "votes.db"), 1, 0.2, 0.2, protocol=str(rules))
    app = make_app(store, ShardSet(videos), "admin-secret")
    with TestClient(app, headers={"content-type": "application/json"}) as client:
        yield store, client


# --- access -----------------------------------------------------------------------------------------------------------


def test_the_page_tells_nothing_of_sources_or_files(round_):
    store, client = round_
    token = store.invite("a")
    page = client.get(f"/a/{token}")
    assert page.status_code == 200
    told = page.text + client.get(f"/a/{token}/task").text
    assert not [word for word in (*(source.name for source in SOURCES), ".tar", "000-") if word in told]


def test_unknown_and_revoked_links_open_nothing(round_):
    store, client = round_
    token = store.invite("a")
    ticket = task_of(client, token)["ticket"]
    store.revoke("a")
    for path in ("", "/task", f"/video/{ticket}/left"):
        assert client.get(f"/a/{token}{path}").status_code == 404
        assert client.get(f"/a/nobody{path}").status_code == 404
    assert client.post(f"/a/{token}/vote", json={"ticket": ticket, "choices": GOOD}).status_code == 404
    in_a_browser = client.get(f"/a/{token}", headers={"accept": "text/html,*/*"})
    assert in_a_browser.headers["content-type"].startswith("text/plain")
    assert "revoked" in in_a_browser.text
    assert client.get("/overview/guess").status_code == 404
    assert client.get("/overview/admin-secret").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd",
        "/video/x/left",
        "/video/%2e%2e%2f%2e%2e%2fetc%2fpasswd/left",
        "/video/{ticket}/../index.json",
        "/video/{ticket}/middle",
        "/video/{ticket}/left/..",
    ],
)
def test_nothing_but_the_two_videos_can_be_read(round_, path):
    store, client = round_
    token = store.invite("a")
    ticket = task_of(client, token)["ticket"]
    answer = client.get(f"/a/{token}{path.format(ticket=ticket)}")
    assert answer.status_code in (404, 405)
    assert b"root:" not in answer.content


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/docs", "/openapi.json"]
)
def test_the_servers_own_files_stay_inside(round_, path):
    _, client = round_
    assert client.get(path).status_code == 404


def test_other_peoples_videos_are_not_shown(round_):
    store, client = round_
    a, b = store.invite("a"), store.invite("b")
    ticket = task_of(client, a)["ticket"]
    task_of(client, b)
    assert client.get(f"/a/{b}/video/{ticket}/left").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
)
def test_posts_of_other_sites_are_refused(round_, headers):
    store, client = round_
    token = store.invite("a")
    body = json.dumps(ballot(client, token))
    answer = client.post(f"/a/{token}/vote", content=body, headers=headers)
    assert answer.status_code == 403
    assert store.votes() == {}
    # behind a proxy the browser knows the page by another host than the server does
    own = {"origin": "https://rate.example.org", "sec-fetch-site": "same-origin"}
    assert client.post(f"/a/{token}/vote", content=body, headers=own).status_code == 200


def test_answers_forbid_frames_and_referrers(round_):
    store, client = round_
    headers = client.get(f"/a/{store.invite('a')}").headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"choices": {**GOOD, "VQ": "C"}}, 409),
        ({"choices": {}}, 409),
        ({"ticket": "forged"}, 409),
        ({"ticket": "é"}, 409),
        ({"flags": ["rude"]}, 409),
        ({"scores": {"A": {"VQ": 9}}}, 409),
        ({"choices": "A"}, 422),
        ({"scores": {"A": {"VQ": "x"}}}, 422),
        ({"ticket": "x" * 100}, 422),
    ],
)
def test_forged_votes_are_refused(round_, change, status):
    store, client = round_
    token = store.invite("a")
    answer = client.post(f"/a/{token}/vote", json=ballot(client, token) | change)
    assert answer.status_code == status
    assert store.votes() == {}


def test_long_posts_are_refused_unread(round_):
    store, client = round_
    assert client.post(f"/a/{store.invite('a')}/vote", content=b" " * 20_000).status_code == 413


def test_a_second_vote_takes_an_undo(round_):
    store, client = round_
    token = store.invite("a")
    sent = ballot(client, token)
    assert client.post(f"/a/{token}/vote", json=sent).json() == {"stored": True, "reference": None}
    assert client.post(f"/a/{token}/vote", json=sent).status_code == 409
    assert client.post(f"/a/{token}/undo", json={}).json() == {"undone": True}
    assert store.votes() == {}
    assert client.post(f"/a/{token}/vote", json=ballot(client, token)).status_code == 200


def test_a_file_that_cannot_be_written_says_that_nothing_was_stored(round_):
    store, client = round_
    token = store.invite("a")
    sent = ballot(client, token)
    with store.file.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA query_only=ON")
    try:
        answer = client.post(f"/a/{token}/vote", json=sent)
    finally:
        store.file.engine.dispose()
    assert answer.status_code == 503
    assert "nothing was stored" in answer.json()["error"]
    assert client.post(f"/a/{token}/vote", json=sent).status_code == 200


# --- videos -----------------------------------------------------------------------------------------------------------


def test_videos_come_whole_and_in_parts(round_, videos):
    store, client = round_
    token = store.invite("a")
    url = f"/a/{token}/video/{task_of(client, token)['ticket']}/left"
    whole = client.get(url)
    assert whole.status_code == 200
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-type"] == "video/mp4"
    expected = {content.read("mp4") for content in ShardSet(videos).contents()}
    assert whole.content in expected
    assert client.get(url.replace("left", "right")).content in expected - {whole.content}
    size = len(whole.content)
    parts = {
        "bytes=0-9": (0, 10),
        "bytes=10-": (10, size),
        "bytes=-7": (size - 7, size),
        f"bytes=5-{size + 99}": (5, size),
    }
    for wanted, (first, end) in parts.items():
        answer = client.get(url, headers={"range": wanted})
        assert answer.status_code == 206
        assert answer.content == whole.content[first:end]
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{size}"
    assert client.get(url, headers={"range": f"bytes={size}-"}).status_code == 416
    assert client.get(url, headers={"range": "bytes=-0"}).status_code == 416
    for no_range in ("lines=1-2", "bytes=-", "bytes=5-2", f"bytes={'9' * 5000}-"):
        assert client.get(url, headers={"range": no_range}).status_code == 200


def test_a_locked_file_stores_nothing_and_says_so(round_, monkeypatch):
    store, client = round_
    token = store.invite("a")
    sent = ballot(client, token)
    store.close()
    monkeypatch.setattr("videoalign.annotation.vote_file.BUSY_MS", 100)
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        assert ballot(client, token) == sent  # looking goes on
        answer = client.post(f"/a/{token}/vote", json=sent)
        assert answer.status_code == 503
        assert "nothing was stored: database is locked" in answer.json()["error"]
        assert str(store.path) not in answer.text
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert client.post(f"/a/{token}/vote", json=sent).status_code == 200
    assert sum(map(len, store.votes().values())) == 1


def test_videos_of_another_set_are_refused(videos, tmp_path):
    store = begin(str(videos), str(tmp_path / "votes.db"))
    with ShardWriter(tmp_path / "other", "videos") as writer:
        content = ShardSet(videos).contents()[0]
        writer.write("x", {"": content.read("mp4")}, content.record)
    with pytest.raises(VideoAlignError, match="not the set"):
        make_app(store, ShardSet(tmp_path / "other"), "x")
    with pytest.raises(VideoAlignError, match="not the set"):
        export(store, ShardSet(tmp_path / "other"), tmp_path / "out")


def test_an_overview_of_a_round_shows_people_sources_and_disputes(round_):
    store, client = round_
    for name, choices in (("ann", GOOD), ("bob", dict.fromkeys(GOOD, "A"))):
        token = store.invite(name)
        for _ in range(4):
            client.post(f"/a/{token}/vote", json=ballot(client, token, choices))
    page = client.get("/overview/admin-secret").text
    assert not [words for words in ("ann", "bob", "Krippendorff", "8 votes on 10 pairs") if words not in page]
