"""The annotation page: access, videos, votes over HTTP, and people at the keyboard."""

import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import torch
import yaml
from fastapi.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent))
from chrome import BROWSER, Chrome

from videoalign import VideoAlignError
from videoalign.annotation.beginning import begin
from videoalign.annotation.export import export
from videoalign.annotation.label_studio import import_label_studio
from videoalign.annotation.protocol import flipped
from videoalign.annotation.server import make_app
from videoalign.annotation.store import Store
from videoalign.callbacks.reward_rows import read_rewards
from videoalign.cli import main
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.verify import verify
from videoalign.datamodules.video import encode
from videoalign.miniature.world.sprites import CONTENTS, FPS, FRAMES, SOURCES, render, shown
from videoalign.models import VideoReward
from videoalign.models.video_reward import Statistics

GOOD = {"VQ": "A", "MQ": "same", "TA": "B"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two sources, one video each, of ten prompts."""
    folder, rng = tmp_path_factory.mktemp("set") / "videos", np.random.default_rng(0)
    with ShardWriter(folder, "videos", per_shard=8) as writer:
        for number, content in enumerate(CONTENTS[:10]):
            for source in (SOURCES[0], SOURCES[-1]):
                flaws = source.sample(rng)
                video = encode(render(shown(content, flaws.wrong, rng), flaws, rng), FPS)
                record = {"prompt": content.prompt, "source": source.name, "fps": FPS, "num_frames": FRAMES}
                writer.write(f"{number:03d}-{source.name}", {"": video}, record)
    return folder


@pytest.fixture
def round_(videos, tmp_path):
    """A round without hidden repetitions, and a client of its server."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("repeats: 0.0\n")
    store = begin(str(videos), str(tmp_path / "votes.db"), 1, 0.2, 0.2, protocol=str(rules))
    app = make_app(store, ShardSet(videos), "admin-secret")
    with TestClient(app, headers={"content-type": "application/json"}) as client:
        yield store, client


def task_of(client, token):
    return client.get(f"/a/{token}/task").json()["task"]


def vote(client, token, choices=GOOD, **more):
    sent = {"ticket": task_of(client, token)["ticket"], "choices": choices, **more}
    return client.post(f"/a/{token}/vote", json=sent)


# --- access -----------------------------------------------------------------------------------------------------------


def test_the_page_tells_nothing_of_sources_or_files(round_):
    store, client = round_
    token = store.invite("a")
    page = client.get(f"/a/{token}")
    told = page.text + client.get(f"/a/{token}/task").text
    assert (
        page.status_code == 200
        and not [s.name for s in SOURCES if s.name in told]
        and ".tar" not in told
        and "000-" not in told
    )


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
    assert in_a_browser.headers["content-type"].startswith("text/plain") and "revoked" in in_a_browser.text
    assert client.get("/overview/guess").status_code == 404 and client.get("/overview/admin-secret").status_code == 200


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
    assert answer.status_code in (404, 405) and b"root:" not in answer.content


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
    body = json.dumps({"ticket": task_of(client, token)["ticket"], "choices": GOOD})
    answer = client.post(f"/a/{token}/vote", content=body, headers=headers)
    assert answer.status_code == 403 and store.votes() == {}
    # behind a proxy the browser knows the page by another host than the server does
    own = {"origin": "https://rate.example.org", "sec-fetch-site": "same-origin"}
    assert client.post(f"/a/{token}/vote", content=body, headers=own).status_code == 200


def test_answers_forbid_frames_and_referrers(round_):
    store, client = round_
    headers = client.get(f"/a/{store.invite('a')}").headers
    assert (
        "frame-ancestors 'none'" in headers["content-security-policy"] and headers["referrer-policy"] == "no-referrer"
    )


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
    sent = {"ticket": task_of(client, token)["ticket"], "choices": GOOD, **change}
    answer = client.post(f"/a/{token}/vote", json=sent)
    assert answer.status_code == status and store.votes() == {}


def test_long_posts_are_refused_unread(round_):
    store, client = round_
    assert client.post(f"/a/{store.invite('a')}/vote", content=b" " * 20_000).status_code == 413


def test_a_second_vote_takes_an_undo(round_):
    store, client = round_
    token = store.invite("a")
    sent = {"ticket": task_of(client, token)["ticket"], "choices": GOOD}
    assert client.post(f"/a/{token}/vote", json=sent).json() == {"stored": True, "reference": None}
    assert client.post(f"/a/{token}/vote", json=sent).status_code == 409
    assert client.post(f"/a/{token}/undo", json={}).json() == {"undone": True} and store.votes() == {}
    assert vote(client, token).status_code == 200


def test_a_file_that_cannot_be_written_says_that_nothing_was_stored(round_):
    store, client = round_
    token = store.invite("a")
    ticket = task_of(client, token)["ticket"]
    with store.file.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA query_only=ON")
    try:
        answer = client.post(f"/a/{token}/vote", json={"ticket": ticket, "choices": GOOD})
    finally:
        store.file.engine.dispose()
    assert answer.status_code == 503 and "nothing was stored" in answer.json()["error"]
    assert client.post(f"/a/{token}/vote", json={"ticket": ticket, "choices": GOOD}).status_code == 200


# --- videos -----------------------------------------------------------------------------------------------------------


def test_videos_come_whole_and_in_parts(round_, videos):
    store, client = round_
    token = store.invite("a")
    url = f"/a/{token}/video/{task_of(client, token)['ticket']}/left"
    whole = client.get(url)
    assert (
        whole.status_code == 200
        and whole.headers["accept-ranges"] == "bytes"
        and whole.headers["content-type"] == "video/mp4"
    )
    expected = {content.read("mp4") for content in ShardSet(videos).contents()}
    assert whole.content in expected and client.get(url.replace("left", "right")).content in expected - {whole.content}
    size = len(whole.content)
    for wanted, part in {
        "bytes=0-9": slice(0, 10),
        "bytes=10-": slice(10, None),
        "bytes=-7": slice(size - 7, None),
        f"bytes=5-{size + 99}": slice(5, None),
    }.items():
        answer = client.get(url, headers={"range": wanted})
        assert answer.status_code == 206 and answer.content == whole.content[part]
        first = part.start or 0
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{size}"
    assert client.get(url, headers={"range": f"bytes={size}-"}).status_code == 416
    assert client.get(url, headers={"range": "bytes=-0"}).status_code == 416
    for no_range in ("lines=1-2", "bytes=-", "bytes=5-2", f"bytes={'9' * 5000}-"):
        assert client.get(url, headers={"range": no_range}).status_code == 200


def test_a_locked_file_stores_nothing_and_says_so(round_, monkeypatch):
    store, client = round_
    token = store.invite("a")
    ticket = task_of(client, token)["ticket"]
    store.close()
    monkeypatch.setattr("videoalign.annotation.vote_file.BUSY_MS", 100)
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        assert task_of(client, token)["ticket"] == ticket  # looking goes on
        answer = client.post(f"/a/{token}/vote", json={"ticket": ticket, "choices": GOOD})
        assert answer.status_code == 503 and "nothing was stored" in answer.json()["error"] and "locked" in answer.text
        assert str(store.path) not in answer.text
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert client.post(f"/a/{token}/vote", json={"ticket": ticket, "choices": GOOD}).status_code == 200
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


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(videos, tmp_path, request):
    """A server of two votes a pair, or of other rules."""
    with serving(videos, tmp_path, getattr(request, "param", "{votes: 2, repeats: 0.0}")) as found:
        yield found


@contextmanager
def serving(videos, tmp_path, text):
    """A server in a process of its own: (url, file, stop, start)."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, db, running = f"http://127.0.0.1:{port}", tmp_path / "votes.db", []

    def start():
        command = [
            sys.executable,
            "-m",
            "videoalign",
            "annotate",
            "serve",
            "--videos",
            videos,
            "--db",
            db,
            "--port",
            str(port),
            "--per-prompt",
            "1",
            "--protocol",
            rules,
            "--validation",
            "0",
            "--benchmark",
            "0",
        ]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                return httpx.get(f"{url}/static/style.css").raise_for_status()
            except httpx.HTTPError:
                assert running[-1].poll() is None, running[-1].stderr.read()
                time.sleep(0.1)
        raise TimeoutError

    def stop(how):
        running[-1].send_signal(how)
        running[-1].wait()

    start()
    try:
        yield url, db, stop, start
    finally:
        stop(signal.SIGKILL)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_two_annotators_and_a_reviewer_at_the_keyboard(served, videos, tmp_path):
    url, db, _, _ = served
    store = Store(db)
    links = {
        name: f"{url}/a/{store.invite(name, role)}"
        for name, role in (("ann", "annotator"), ("bob", "annotator"), ("rev", "reviewer"))
    }
    ready = "!busy && document.querySelector('#prompt').textContent.startsWith('a ') && [...document.querySelectorAll('video')].every(v => v.readyState > 1)"
    mine = "Number(document.querySelector('#progress').textContent.split(' ')[0])"
    with Chrome() as chrome:
        chrome.open(links["ann"])
        chrome.until(ready)
        chrome.key(" ")  # pause, and step through the frames
        chrome.look("videos.forEach(v => v.currentTime = 0.5)")
        chrome.key("ArrowRight")
        chrome.until("videos.every(v => Math.abs(v.currentTime - 0.625) < 0.01 && v.paused)")
        chrome.key("h")
        assert chrome.until("document.querySelector('#guideline').open")
        chrome.key("h")
        assert chrome.look("document.querySelector('#send').disabled")
        for number in range(10):
            chrome.until(f"{ready} && {mine} == {number}")
            for key in ("xEnter" if number == 4 else "159Enter").partition("Enter")[0]:
                chrome.key(key)
            chrome.key("Enter")
            if number == 2:  # took the wrong one
                chrome.until(f"{ready} && {mine} == 3")
                chrome.key("u")
                chrome.until(f"{ready} && {mine} == 2")
                for key in "368":
                    chrome.key(key)
                chrome.key("Enter")
        chrome.until("!document.querySelector('#done').hidden")
        chrome.open(links["bob"])
        for number in range(10 - 1):  # the unsafe one is out
            chrome.until(f"{ready} && {mine} == {number}")
            for key in ["2", "5", "8", "Enter"]:
                chrome.key(key)
        chrome.until("!document.querySelector('#done').hidden")
        chrome.open(links["rev"])
        for number in range(9):
            chrome.until(f"{ready} && {mine} == {number}")
            assert "review" in chrome.look("document.querySelector('#kind').textContent")
            for key in ["1", "4", "7", "Enter"]:
                chrome.key(key)
        chrome.until("!document.querySelector('#done').hidden")
    kept = store.votes()
    for pair in store.pairs():  # what was pressed, turned as the sides were
        ann = next(vote for vote in kept[pair.id] if vote.annotator == "ann")
        assert ann.flags == ("unsafe",) or sorted(ann.choices.items()) in [
            sorted(c.items())
            for pressed in (GOOD, {"VQ": "B", "MQ": "B", "TA": "same"})
            for c in (pressed, flipped(pressed))
        ]
    again = [v for votes in kept.values() for v in votes if v.annotator == "ann" and v.choices.get("TA") == "same"]
    assert len(again) == 1 and again[0].choices["VQ"] == again[0].choices["MQ"]  # the vote after the undo
    decisions = store.decisions()
    assert Counter(d.state for d in decisions.values()) == {"done": 9, "unsafe": 1}
    main(["annotate", "export", "--db", str(db), "--videos", str(videos), "--out", str(tmp_path / "out")])
    shards = ShardSet(tmp_path / "out/train", "pairs")
    assert not [*verify(shards)] and shards.index.samples == 9
    for content in shards.contents():
        votes = content.record["votes"]
        assert [v["annotator"] for v in votes] == ["person-001", "person-002", "person-003"] and set(
            votes[1]["choices"].values()
        ) == {"same"}
        assert len(set(content.record["sources"].values())) == 2
    every = [json.loads(line) for line in (tmp_path / "out/votes.jsonl").read_text().splitlines()]
    assert len(every) == 11 + 9 + 9 and sum(vote["taken_back"] is not None for vote in every) == 1
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert "ann" not in {person["name"] for person in card["people"]}
    assert (
        card["states"] == {"done": 9, "unsafe": 1}
        and card["exported"] == {"train": 9}
        and "alpha" in (tmp_path / "out/card.md").read_text()
    )


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize("served", ["{votes: 1, repeats: 0.0, overall: true, scores: true}"], indirect=True)
def test_scores_and_an_overall_choice_by_keyboard_of_any_country(served):
    url, db, _, _ = served
    with Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        chrome.until("!busy && document.querySelector('#prompt').textContent.startsWith('a ')")
        chrome.key("&", "Digit1")  # a French keyboard
        chrome.key("5", "Numpad5")
        chrome.key(")", "Digit9")  # with Shift
        chrome.key("\N{CYRILLIC SMALL LETTER SHCHA}", "KeyO")
        chrome.look("document.querySelector('summary').focus()")
        for score in "1234":  # the sixth is left open
            chrome.key("Tab")
            chrome.key(score, f"Digit{score}")
        chrome.key("Tab")
        for _ in range(5):  # through the list by arrows
            chrome.key("ArrowDown")
        chrome.until("!document.querySelector('#send').disabled")
        chrome.key("Enter")  # leaves the list
        chrome.key("Enter")
        chrome.until("document.querySelector('#progress').textContent.startsWith('1 ')")
    store = Store(db)
    (found,) = [(pair, vote) for pair, votes in store.votes().items() for vote in votes]
    row, vote = next(row for row in store.pairs() if row.id == found[0]), found[1]
    left = {"VQ": "A", "MQ": "same", "TA": "B", "Overall": "same"}
    swapped = vote.choices != left
    assert vote.choices == (flipped(left) if swapped else left) and row.votes == 1
    sides = "BA" if swapped else "AB"
    assert vote.scores == {sides[0]: {"VQ": 1, "MQ": 2, "TA": 3}, sides[1]: {"VQ": 4, "MQ": 5}}


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_enter_right_after_the_guideline_sends(served):
    url, db, _, _ = served
    with Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        chrome.until("!busy && document.querySelector('#prompt').textContent.startsWith('a ')")
        for key in "159":
            chrome.key(key)
        # in one script, that is before the browser draws a frame: until then the focus is on the button that closed the guideline
        enter = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true}))"
        chrome.look(f"guideline(); guideline(); {enter}")
        chrome.until("document.querySelector('#progress').textContent.startsWith('1 ')")


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_enter_after_an_undo_sends_and_does_not_undo_once_more(served):
    url, db, _, _ = served
    done = "Number(document.querySelector('#progress').textContent.split(' ')[0])"
    with Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        for number in range(2):
            chrome.until(f"!busy && task && {done} == {number}")
            for key in ["1", "5", "9", "Enter"]:
                chrome.key(key)
        chrome.until(f"!busy && task && {done} == 2")
        chrome.look("document.querySelector('#undo').focus()")
        chrome.key("Enter")
        chrome.until(f"!busy && task && {done} == 1")
        for key in ["3", "6", "9", "Enter"]:
            chrome.key(key)
        chrome.until(f"!busy && task && {done} == 2")


@pytest.fixture
def uneven(tmp_path):
    """One pair of one second and three."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "uneven", "videos") as writer:
        for source, seconds in (("short", 1), ("long", 3)):
            frames = rng.integers(0, 255, (8 * seconds, 32, 32, 3), dtype=np.uint8)
            writer.write(
                source,
                {"": encode(frames, 8)},
                {"prompt": "a dot", "source": source, "fps": 8, "num_frames": len(frames)},
            )
    return tmp_path / "uneven"


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_longer_one_of_two_videos_is_seen_to_its_end(uneven, tmp_path):
    """Stepping and pausing after the shorter one's end; keys work before anything is loaded."""
    with serving(uneven, tmp_path, "{votes: 1, repeats: 0.0}") as (url, db, _, _), Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        chrome.until("!busy && task && videos.every(v => v.readyState > 1)")
        chrome.key("l")  # no loop
        chrome.key("ArrowRight")
        chrome.look("videos.forEach(v => { v.currentTime = 0.9 })")
        chrome.until("videos.every(v => !v.seeking)")
        for _ in range(8):
            chrome.key("ArrowRight")
            chrome.until("videos.every(v => !v.seeking)")
        times = "videos.map(v => v.currentTime).sort((a, b) => a - b)"
        first, second = chrome.look(times)
        assert first == pytest.approx(1.0) and second == pytest.approx(1.9)
        chrome.key(" ")
        chrome.until(f"{times}[1] > 2")
        chrome.key(" ")
        first, second = chrome.look(times)
        assert first == pytest.approx(1.0) and second > 2
        chrome.key(" ")
        chrome.until("videos.every(v => v.ended)")
        chrome.key(" ")  # from the beginning
        chrome.until("videos.every(v => v.currentTime < 1 && !v.paused)")


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_page_fits_a_phone(served):
    url, db, _, _ = served
    with Chrome(390, 844) as chrome:
        chrome("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        chrome.open(f"{url}/a/{Store(db).invite('phone')}")
        chrome.until("document.querySelector('#prompt').textContent.startsWith('a ')")
        assert chrome.look("document.documentElement.scrollWidth <= innerWidth")
        small = "[...document.querySelectorAll('button')].filter(b => b.offsetParent && b.getBoundingClientRect().height < 40).length"
        assert chrome.look(small) == 0


def test_a_killed_server_loses_no_acknowledged_vote(served):
    url, db, stop, start = served
    token = Store(db).invite("a")
    acknowledged = 0
    for number in range(6):
        ticket = httpx.get(f"{url}/a/{token}/task").json()["task"]["ticket"]
        answer = httpx.post(f"{url}/a/{token}/vote", json={"ticket": ticket, "choices": GOOD})
        acknowledged += answer.status_code == 200
        if number % 2:
            stop(signal.SIGKILL)
            start()
    assert acknowledged == 6 == sum(map(len, Store(db).votes().values()))


def test_twenty_people_at_once_lose_nothing(served):
    url, db, _, _ = served
    store = Store(db)
    tokens = {f"p{i}": store.invite(f"p{i}") for i in range(20)}
    acknowledged, errors = [], []

    def at_work(name, token):
        with httpx.Client(timeout=60) as client:
            while task := client.get(f"{url}/a/{token}/task").json()["task"]:
                client.get(f"{url}/a/{token}/video/{task['ticket']}/left")
                answer = client.post(f"{url}/a/{token}/vote", json={"ticket": task["ticket"], "choices": GOOD})
                (acknowledged if answer.status_code == 200 else errors).append((name, answer.status_code))

    threads = [threading.Thread(target=at_work, args=item) for item in tokens.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = store.votes()
    assert not errors and len(acknowledged) == 20 == sum(map(len, votes.values()))
    assert all(len({vote.annotator for vote in of_pair}) == 2 == len(of_pair) for of_pair in votes.values())


def test_benchmark_prompts_become_a_benchmark(round_, videos, tmp_path):
    store, client = round_
    for name in "abc":
        token = store.invite(name)
        while task_of(client, token):
            flip = {"A": "B", "B": "A", "same": "same"}
            shown_ = store.shown(store.who(token))
            row = next(row for row in store.pairs() if row.id == shown_.pair_id)
            vote(client, token, GOOD if shown_.left == row.key_a else {c: flip[v] for c, v in GOOD.items()})
    card = export(store, ShardSet(videos), tmp_path / "out")
    assert card["exported"] == {"train": 6, "validation": 2, "benchmark": 2} and card["agreement"]["VQ"]["raw"] == 1.0
    benchmark = Benchmark(tmp_path / "out/benchmark")
    assert len(benchmark.rows) == 2 and benchmark.labels[:, :3].tolist() == [[1, 0, -1]] * 2
    prompts = [
        {c.record["prompt"] for c in ShardSet(tmp_path / f"out/{s}").contents()}
        for s in ("train", "validation", "benchmark")
    ]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_an_overview_of_a_round_shows_people_sources_and_disputes(round_):
    store, client = round_
    for name, choices in (("ann", GOOD), ("bob", dict.fromkeys(GOOD, "A"))):
        token = store.invite(name)
        for _ in range(4):
            vote(client, token, choices)
    page = client.get("/overview/admin-secret").text
    assert "ann" in page and "bob" in page and "Krippendorff" in page and "8 votes on 10 pairs" in page


def test_nothing_decided_is_nothing_to_export(round_, videos, tmp_path):
    store, _ = round_
    with pytest.raises(VideoAlignError, match=r"no pair .* is decided"):
        export(store, ShardSet(videos), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Label Studio -----------------------------------------------------------------------------------------------------


def studio(videos, change=None):
    """An export: three people on every pair, of whom one is overruled."""
    keys = sorted(content.key for content in ShardSet(videos).contents())
    records = {content.key: content.record for content in ShardSet(videos).contents()}
    tasks = []
    for number, (a, b) in enumerate(zip(keys[::2], keys[1::2])):
        annotations = []
        for who, vq in (("x@lab", "A"), ("y@lab", "A"), ("z@lab", "B" if number == 0 else "A"), ("chief@lab", "same")):
            result = [
                {"from_name": c, "to_name": "a", "type": "choices", "value": {"choices": [vq if c == "VQ" else "same"]}}
                for c in GOOD
            ]
            if who != "chief@lab" or number == 0:
                annotations.append({"completed_by": {"email": who}, "lead_time": 9.5, "result": result})
        data = {
            "prompt": records[a]["prompt"],
            "video_a": f"/data/local-files/?d={a}.mp4",
            "video_b": f"s3://bucket/{b}.mp4",
        }
        if number % 2:
            data |= {"video_a": f"https://host/files/{a}.mp4?token=1", "video_b": f"/data/upload/1/1a2b3c4d-{b}.mp4"}
        tasks.append({"id": number, "data": data, "annotations": annotations})
    if change:
        change(tasks)
    return tasks


def test_label_studios_ratings_become_the_same_pairs(videos, tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(studio(videos)))
    found = import_label_studio(path, ShardSet(videos), tmp_path / "votes.db", (0.0, 0.0), reviewers=("chief@lab",))
    assert found == {"pairs": 10, "votes": 31, "people": 4}
    card = export(Store(tmp_path / "votes.db"), ShardSet(videos), tmp_path / "out")
    assert card["labels"]["VQ"] == {"same": 1, "A": 9} and card["exported"] == {"train": 10}
    assert not [*verify(ShardSet(tmp_path / "out/train"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[0]["data"].pop("video_a"), "task 0: data.video_a is missing"),
        (lambda t: t[3]["data"].update(video_b="nowhere.mp4"), "task 3: there is no video 'nowhere'"),
        (lambda t: t[1]["data"].update(video_b=t[2]["data"]["video_b"]), "task 1: videos"),
        (lambda t: t[2]["annotations"][0]["result"].pop(), "task 2: an annotation lacks a choice in TA"),
        (lambda t: t[2]["annotations"][0]["result"][0]["value"].update(choices=["C"]), "task 2: VQ is"),
        (lambda t: t[2]["annotations"][0].pop("completed_by"), "task 2: an annotation does not say who"),
        (lambda t: t[1].update(annotations=[5]), "task 1 is not as Label Studio writes"),
        (lambda t: t[1].update(data="x"), "task 1 is not as Label Studio writes"),
        (lambda t: t[1]["annotations"][0].update(lead_time="x"), "task 1 is not as Label Studio writes"),
        (lambda t: t.clear(), "no list of tasks"),
    ],
)
def test_exports_that_are_something_else_are_refused(videos, tmp_path, change, message):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(studio(videos, change)))
    with pytest.raises(VideoAlignError, match=message):
        import_label_studio(path, ShardSet(videos), tmp_path / "votes.db")
    assert not (tmp_path / "votes.db").exists()


def test_unknown_reviewers_are_refused_before_anything_is_written(videos, tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(studio(videos)))
    with pytest.raises(VideoAlignError, match="reviewers"):
        import_label_studio(path, ShardSet(videos), tmp_path / "votes.db", reviewers=("nobody",))
    assert not (tmp_path / "votes.db").exists()


# --- beginning --------------------------------------------------------------------------------------------------------


def test_a_training_round_comes_from_a_table(videos, tmp_path):
    keys = sorted(content.key for content in ShardSet(videos).contents())
    table = tmp_path / "references.csv"
    table.write_text(f"key_A,key_B,VQ,MQ,TA\n{keys[0]},{keys[1]},A,A,same\n")
    store = begin(str(videos), str(tmp_path / "votes.db"), references=str(table))
    task = store.task(store.who(store.invite("a")))
    assert task.kind == "training" and {task.left, task.right} == {keys[0], keys[1]}
    assert all(keys[0] not in (row.key_a, row.key_b) for row in store.pairs() if row.reference is None)


def test_references_without_a_pair_are_refused(videos, tmp_path):
    (tmp_path / "references.csv").write_text("key_A,key_B,VQ,MQ,TA\n")
    with pytest.raises(VideoAlignError, match="holds no pair"):
        begin(str(videos), str(tmp_path / "votes.db"), references=str(tmp_path / "references.csv"))
    assert not (tmp_path / "votes.db").exists()


def test_videos_that_browsers_do_not_play_are_refused(tmp_path):
    """MPEG-4 part 2, as some tools write it, and H.264 with full colours."""
    for name, codec, pixels in (("old", "mpeg4", "yuv420p"), ("full", "libx264", "yuv444p")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", "mp4") as container:
            stream = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for _ in range(4):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            container.mux(stream.encode())
        with ShardWriter(tmp_path / name, "videos") as writer:
            for source in "ab":
                writer.write(
                    source, {"": buffer.getvalue()}, {"prompt": "a dot", "source": source, "fps": 8, "num_frames": 4}
                )
        told = f"browsers do not play 2 of the 2 videos .* first a: (mpeg4|h264) {pixels}; make H.264"
        with pytest.raises(VideoAlignError, match=told):
            begin(str(tmp_path / name), str(tmp_path / "votes.db"), validation=0, benchmark=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nothing,{1},A,A,A", "no video 'nothing'"),
        ("{0},{1},C,A,A", "must be A, same or B"),
        ("{0},{2},A,A,A", "different prompts"),
    ],
)
def test_wrong_references_are_refused_with_their_line(videos, tmp_path, row, message):
    keys = sorted(content.key for content in ShardSet(videos).contents())
    table = tmp_path / "references.csv"
    table.write_text(f"key_A,key_B,VQ,MQ,TA\n{row.format(*keys)}\n")
    with pytest.raises(VideoAlignError, match=f"line 2: .*{message}"):
        begin(str(videos), str(tmp_path / "votes.db"), references=str(table))
    assert not (tmp_path / "votes.db").exists()


@pytest.fixture(scope="module")
def judges(backbone, sampling, tmp_path_factory):
    """Two small reward models with random weights."""
    folder = tmp_path_factory.mktemp("judges")
    for seed in range(2):
        network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
        for parameter in network.head.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        network.statistics = Statistics([0.0] * 3, [0.5, 2.0, 0.25])
        network.save_pretrained(folder / str(seed))
    return [str(folder / "0"), str(folder / "1")]


@pytest.mark.parametrize("count", [1, 2])
def test_what_models_know_least_of_is_rated_first(videos, judges, tmp_path, monkeypatch, capsys, count):
    db = tmp_path / "votes.db"
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda app, host, port: None)

    def serve(models, *more):
        main(
            [
                "annotate",
                "serve",
                "--videos",
                str(videos),
                "--db",
                str(db),
                "--select",
                "uncertain",
                "--model",
                *models,
                "--device",
                "cpu",
                *more,
            ]
        )

    serve(judges[:count], "--per-prompt", "1")
    rows = Store(db).pairs()
    rewards = [read_rewards(place) for place in (tmp_path / "votes.db.rewards").iterdir()]  # in any order
    assert len(rewards) == count
    assert len({str(raw) for raw in rewards}) == count
    margins = [{r.id: torch.tensor(raw[r.key_a]) - torch.tensor(raw[r.key_b]) for r in rows} for raw in rewards]
    scale = torch.tensor([0.5, 2.0, 0.25])

    def unknown(row):
        if count == 2:
            return ((margins[0][row.id] - margins[1][row.id]) / scale).abs().mean().item()
        d, theta = margins[0][row.id].double(), 5.0  # Rao-Kupper: the paper's equation of a tie
        tie = (theta**2 - 1) * d.exp() / ((d.exp() + theta) * (1 + theta * d.exp()))
        return tie.mean().item()

    expected = sorted(rows, key=unknown, reverse=True)
    assert len(rows) == 10 and [row.id for row in rows] == [row.id for row in expected]  # stored in this order
    # what is left of a round can be put in order at any time
    store = Store(db)
    store.prioritise([row.id for row in reversed(rows)])
    store.vote(who := store.who(store.invite("a")), store.task(who).ticket, {}, flags=["unsafe"])
    capsys.readouterr()
    serve(judges[:count], "--seed", "3")
    assert "goes on as it was begun, whatever --seed says" in capsys.readouterr().err
    left = [row.id for row in sorted(store.pairs(), key=lambda row: row.priority) if row.state == "open"]
    assert left == [row.id for row in rows[:-1]]
    serve([*reversed(judges)])  # by other models than at first
    assert sorted(row.id for row in store.pairs() if row.state == "open") == sorted(left)
    with sqlite3.connect(store.path) as file:
        file.execute("update pairs set state = 'review'")  # nothing is left to put in order
    serve(judges[:count])


@pytest.mark.parametrize("given", [["--select", "uncertain"], ["--model", "m"]])
def test_an_order_needs_a_model_and_a_model_an_order(videos, tmp_path, given, capsys):
    for command in ("begin", "serve"):
        with pytest.raises(SystemExit):
            main(["annotate", command, "--videos", str(videos), "--db", str(tmp_path / "votes.db"), *given])
        assert "--select uncertain needs --model" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def serve(videos, tmp_path):
    return ["annotate", "serve", "--videos", str(videos), "--db", str(tmp_path / "votes.db")]


def test_a_guideline_of_ones_own_is_shown(videos, tmp_path, monkeypatch, capsys):
    path, apps = tmp_path / "guideline.yaml", []
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda app, host, port: apps.append(app))
    command = [*serve(videos, tmp_path), "--guideline", str(path)]
    part = {"title": "Looks", "question": "Which?", "points": ["fur", "<b>eyes</b>"], "good": "a cat", "bad": "a blur"}
    path.write_text(yaml.safe_dump([part]))
    main(command)
    with TestClient(apps[0], "http://localhost") as client:
        page = client.get(f"/a/{Store(tmp_path / 'votes.db').invite('a')}").text
    assert "<h2>Looks</h2>" in page and "&lt;b&gt;eyes" in page and "Visual quality</h2>" not in page
    for wrong, message in (
        ([], "no list"),
        ([{**part, "points": "fur"}], "part 1"),
        ([part, {"title": "x"}], "part 2"),
        ([{**part, "title": ["a"]}], "part 1"),
        (None, "no list"),
    ):
        path.write_text(yaml.safe_dump(wrong))
        with pytest.raises(SystemExit):
            main(command)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--port", "99999"], "from 1 to 65535"), (["--protocol", "{0}/rules.yaml"], "rules.yaml cannot be read")],
)
def test_mistakes_are_told_before_anything_is_begun(videos, tmp_path, capsys, more, message):
    (tmp_path / "rules.yaml").write_text("since: 2024-13-45")
    with pytest.raises(SystemExit):
        main([*serve(videos, tmp_path), *(m.format(tmp_path) for m in more)])
    assert message in capsys.readouterr().err and not (tmp_path / "votes.db").exists()


def test_without_the_extra_it_is_named(tmp_path):
    script = "import sys; sys.modules['sqlalchemy'] = None; from videoalign.cli import main; main(['annotate', 'status', '--db', 'x'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "videoalign[annotate]" in done.stderr and "Traceback" not in done.stderr


def test_others_are_let_in_with_a_warning(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda app, host, port: None)
    for host, warned in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        main([*serve(videos, tmp_path), "--host", host])
        assert ("unencrypted" in capsys.readouterr().err) is warned


def test_an_export_trains_a_reward_model(round_, videos, backbone, tmp_path):
    store, _ = round_
    people = [store.who(store.invite(name)) for name in "abc"]
    for who in people:
        while task := store.task(who):
            row = next(row for row in store.pairs() if row.id == task.pair_id)
            store.vote(who, task.ticket, GOOD if task.left == row.key_a else flipped(GOOD))
    export(store, ShardSet(videos), tmp_path / "rated")
    config = yaml.safe_load((Path(__file__).parents[1] / "experiments/debug/tiny.yaml").read_text())
    config["trainer"] |= {
        "max_steps": 3,
        "logger": False,
        "default_root_dir": str(tmp_path),
        "enable_checkpointing": False,
    }
    config["trainer"]["callbacks"] = [config["trainer"]["callbacks"][2]]
    config["trainer"]["callbacks"][0]["init_args"]["out"] = str(tmp_path / "reward")
    network = config["model"]["init_args"]["network"]["init_args"]
    network |= {"backbone": str(backbone), "sampling": {"fps": 8.0, "min_pixels": 0}}
    config["data"]["init_args"] = {
        "train": str(tmp_path / "rated/train"),
        "val": str(tmp_path / "rated/validation"),
        "batch_size": 2,
        "workers": 0,
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "fit.yaml")])
    assert len(score_with(tmp_path / "reward", tmp_path / "rated/benchmark", tmp_path / "scores")) == 4


def score_with(model, videos, out):
    main(
        ["bench", "--model", str(model), "--data", str(videos), "--out", str(out), "--device", "cpu", "--workers", "0"]
    )
    return read_rewards(out / videos.name)


def test_a_round_is_not_begun_over_another(videos, tmp_path):
    begin(str(videos), str(tmp_path / "votes.db"))
    size = os.path.getsize(tmp_path / "votes.db")
    with pytest.raises(VideoAlignError, match="exists already"):
        begin(str(videos), str(tmp_path / "votes.db"))
    assert os.path.getsize(tmp_path / "votes.db") == size
