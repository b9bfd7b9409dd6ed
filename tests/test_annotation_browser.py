"""The annotation page as it is served: people at the keyboard in a real browser, and a server that is killed."""

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import chrome as chrome_module
from annotation_helpers import GOOD, annotate, ballot, task_of, write_sprites
from chrome import Chrome, needs_browser
from videoalign.annotation.protocol import flipped
from videoalign.annotation.store import Store
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.verify import verify
from videoalign.datamodules.video import encode

SHOWN = "document.querySelector('#prompt').textContent.startsWith('a ')"
"""Script: whether a pair is on the screen."""
READY = f"!busy && {SHOWN} && videos.every(v => v.readyState > 1)"
"""Script: whether the page takes keys, and its videos play."""
RATED = "Number(document.querySelector('#progress').textContent.split(' ')[0])"
"""Script: number of pairs that the person has rated."""
DONE = "!document.querySelector('#done').hidden"
"""Script: whether nothing is left to rate."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("set") / "videos")


@pytest.fixture
def served(videos, tmp_path, request):
    """A server of two votes a pair, or of other rules."""
    with serving(videos, tmp_path, getattr(request, "param", "{votes: 2, repeats: 0.0}")) as found:
        yield found


@contextmanager
def serving(videos, tmp_path, text, *more):
    """A server in a process of its own: (url, file, stop, start)."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, db, running = f"http://127.0.0.1:{port}", tmp_path / "votes.db", []

    def start():
        command = [sys.executable, "-m", "videoalign", "annotate", "serve", "--videos", videos, "--db", db]
        command += ["--protocol", rules, "--port", str(port)]
        command += ["--per-prompt", "1", "--validation", "0", "--benchmark", "0", *more]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        end = time.monotonic() + 180  # imports take long on a busy machine
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

    try:
        start()
        yield url, db, stop, start
    finally:
        stop(signal.SIGKILL)


@needs_browser
def test_two_annotators_and_a_reviewer_at_the_keyboard(served, videos, tmp_path):
    url, db, _, _ = served
    store = Store(db)
    people = {"ann": "annotator", "bob": "annotator", "rev": "reviewer"}
    links = {name: f"{url}/a/{store.invite(name, role)}" for name, role in people.items()}
    with Chrome() as chrome:
        chrome.open(links["ann"])
        chrome.until(READY)
        look_around(chrome)
        for number in range(10):
            chrome.until(f"{READY} && {RATED} == {number}")
            chrome.keys(*("x" if number == 4 else "159"), "Enter")
            if number == 2:  # took the wrong one
                chrome.until(f"{READY} && {RATED} == 3")
                chrome.key("u")
                chrome.until(f"{READY} && {RATED} == 2")
                chrome.keys("3", "6", "8", "Enter")
        chrome.until(DONE)
        chrome.open(links["bob"])
        for number in range(10 - 1):  # the unsafe one is out
            chrome.until(f"{READY} && {RATED} == {number}")
            chrome.keys("2", "5", "8", "Enter")
        chrome.until(DONE)
        chrome.open(links["rev"])
        for number in range(9):
            chrome.until(f"{READY} && {RATED} == {number}")
            assert "review" in chrome.look("document.querySelector('#kind').textContent")
            chrome.keys("1", "4", "7", "Enter")
        chrome.until(DONE)
    check_what_ann_pressed(store)
    assert Counter(d.state for d in store.decisions().values()) == {"done": 9, "unsafe": 1}
    annotate("export", db=db, videos=videos, out=tmp_path / "out")
    check_export(tmp_path / "out")


def look_around(chrome):
    """Pause, step through the frames, and open the guideline."""
    chrome.key(" ")
    chrome.look("videos.forEach(v => v.currentTime = 0.5)")
    chrome.key("ArrowRight")
    chrome.until("videos.every(v => Math.abs(v.currentTime - 0.625) < 0.01 && v.paused)")
    chrome.key("h")
    assert chrome.until("document.querySelector('#guideline').open")
    chrome.key("h")
    assert chrome.look("document.querySelector('#send').disabled")


def check_what_ann_pressed(store):
    """Ann's votes are what she pressed, turned as the sides were."""
    votes = [vote for of_pair in store.votes().values() for vote in of_pair if vote.annotator == "ann"]
    assert len(votes) == 10
    pressed = [GOOD, {"VQ": "B", "MQ": "B", "TA": "same"}]
    pressed += [flipped(choices) for choices in pressed]
    assert sum(vote.flags == ("unsafe",) for vote in votes) == 1
    assert not [vote for vote in votes if not vote.flags and vote.choices not in pressed]
    (again,) = [vote for vote in votes if vote.choices.get("TA") == "same"]  # the vote after the undo
    assert again.choices["VQ"] == again.choices["MQ"]


def check_export(out):
    """An export holds all votes, and no names."""
    shards = ShardSet(out / "train", "pairs")
    assert not [*verify(shards)]
    assert shards.index.samples == 9
    for content in shards.contents():
        votes = content.record["votes"]
        assert [vote["annotator"] for vote in votes] == ["person-001", "person-002", "person-003"]
        assert set(votes[1]["choices"].values()) == {"same"}
        assert len(set(content.record["sources"].values())) == 2
    every = [json.loads(line) for line in (out / "votes.jsonl").read_text().splitlines()]
    assert len(every) == 11 + 9 + 9
    assert sum(vote["taken_back"] is not None for vote in every) == 1
    card = json.loads((out / "card.json").read_text())
    assert "ann" not in {person["name"] for person in card["people"]}
    assert card["states"] == {"done": 9, "unsafe": 1}
    assert card["exported"] == {"train": 9}
    assert "alpha" in (out / "card.md").read_text()


@needs_browser
@pytest.mark.parametrize("served", ["{votes: 1, repeats: 0.0, overall: true, scores: true}"], indirect=True)
def test_scores_and_an_overall_choice_by_keyboard_of_any_country(served):
    url, db, _, _ = served
    with Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        chrome.until(f"!busy && {SHOWN}")
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
        chrome.until(f"{RATED} == 1")
    store = Store(db)
    ((pair, (vote,)),) = store.votes().items()
    row = next(row for row in store.pairs() if row.id == pair)
    left = {"VQ": "A", "MQ": "same", "TA": "B", "Overall": "same"}
    swapped = vote.choices != left
    assert vote.choices == (flipped(left) if swapped else left)
    assert row.votes == 1
    sides = "BA" if swapped else "AB"
    assert vote.scores == {sides[0]: {"VQ": 1, "MQ": 2, "TA": 3}, sides[1]: {"VQ": 4, "MQ": 5}}


@needs_browser
def test_enter_right_after_the_guideline_sends(served):
    url, db, _, _ = served
    with Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        chrome.until(f"!busy && {SHOWN}")
        chrome.keys(*"159")
        # in one script, before a frame is drawn: until then the focus is on the button that closed the guideline
        enter = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true})"
        chrome.look(f"guideline(); guideline(); document.activeElement.dispatchEvent({enter})")
        chrome.until(f"{RATED} == 1")


@needs_browser
def test_enter_after_an_undo_sends_and_does_not_undo_once_more(served):
    url, db, _, _ = served
    with Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        for number in range(2):
            chrome.until(f"!busy && task && {RATED} == {number}")
            chrome.keys("1", "5", "9", "Enter")
        chrome.until(f"!busy && task && {RATED} == 2")
        chrome.look("document.querySelector('#undo').focus()")
        chrome.key("Enter")
        chrome.until(f"!busy && task && {RATED} == 1")
        chrome.keys("3", "6", "9", "Enter")
        chrome.until(f"!busy && task && {RATED} == 2")


@pytest.fixture
def uneven(tmp_path):
    """One pair of one second and three."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "uneven", "videos") as writer:
        for source, seconds in (("short", 1), ("long", 3)):
            frames = rng.integers(0, 255, (8 * seconds, 32, 32, 3), dtype=np.uint8)
            record = {"prompt": "a dot", "source": source, "fps": 8, "num_frames": len(frames)}
            writer.write(source, {"": encode(frames, 8)}, record)
    return tmp_path / "uneven"


@needs_browser
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
        assert (first, second) == pytest.approx((1.0, 1.9))
        chrome.key(" ")
        chrome.until(f"{times}[1] > 2")
        chrome.key(" ")
        first, second = chrome.look(times)
        assert first == pytest.approx(1.0)
        assert second > 2
        chrome.key(" ")
        chrome.until("videos.every(v => v.ended)")
        chrome.key(" ")  # from the beginning
        chrome.until("videos.every(v => v.currentTime < 1 && !v.paused)")


@needs_browser
def test_the_page_fits_a_phone(served):
    url, db, _, _ = served
    with Chrome(390, 844) as chrome:
        chrome("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        chrome.open(f"{url}/a/{Store(db).invite('phone')}")
        chrome.until(SHOWN)
        assert chrome.look("document.documentElement.scrollWidth <= innerWidth")
        assert chrome.look("videos[1].getBoundingClientRect().top >= videos[0].getBoundingClientRect().bottom")
        assert chrome.look("videos.every(v => v.getBoundingClientRect().width > 0.9 * innerWidth)")
        tap(chrome, "videos[1]")
        size = "(v => [v.left, v.top, v.width, v.height])(videos[1].getBoundingClientRect())"
        assert chrome.look(f"{size}.join() === [0, 0, innerWidth, innerHeight].join()")
        tap(chrome, "videos[1]")
        assert chrome.look("!document.querySelector('.enlarged')")
        tap(chrome, "document.querySelector('#help')")
        chrome.until("document.querySelector('#guideline').open")
        dialog = "document.querySelector('#guideline')"
        assert chrome.look(f"{dialog}.scrollHeight > {dialog}.clientHeight && {dialog}.scrollTop === 0")
        heading, top = (
            "document.querySelector('#guideline h1').getBoundingClientRect()",
            f"{dialog}.getBoundingClientRect()",
        )
        assert chrome.look(f"{heading}.top >= {top}.top && {heading}.bottom <= innerHeight")
        chrome.key("h")
        buttons = "[...document.querySelectorAll('button')].filter(b => b.offsetParent)"
        assert chrome.look(f"Math.min(...{buttons}.map(b => b.getBoundingClientRect().height))") >= 40


def tap(chrome, element):
    """Press the middle of an element with a mouse."""
    x, y = middle(chrome, element)
    mouse(chrome, "mousePressed", x, y)
    mouse(chrome, "mouseReleased", x, y)


def middle(chrome, element):
    chrome.look(f"{element}.scrollIntoView({{block: 'center'}})")
    return chrome.look(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")


def mouse(chrome, kind, x, y):
    chrome("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


@pytest.fixture
def three(tmp_path):
    """Two prompts with three videos of one second each."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "three", "videos") as writer:
        for prompt, source in itertools.product(range(2), "xyz"):
            frames = rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
            record = {"prompt": f"a {prompt}", "source": source, "fps": 8, "num_frames": 8}
            writer.write(f"{source}{prompt}", {"": encode(frames, 8)}, record)
    return tmp_path / "three"


@needs_browser
def test_a_ranking_by_keys_taps_and_dragging_is_sent_once_the_videos_were_seen(three, tmp_path):
    rules = "{kind: ranking, votes: 1, repeats: 0.0}"
    with serving(three, tmp_path, rules, "--refuse-fast") as (url, db, _, _), Chrome() as chrome:
        chrome.open(f"{url}/a/{Store(db).invite('a')}")
        chrome.until(f"!busy && {SHOWN}")
        chrome.keys("2", "1", "t", "3")  # by keys
        assert chrome.look("state.choices.VQ") == "B>A=C"
        chip = "[...document.querySelectorAll('[data-column=MQ] .chip')].find(c => c.dataset.letter === '{}')"
        for letter in "CAB":  # by taps; on a slow machine, the page may still move under the first one
            placed, tries = f"!!{chip.format(letter)}.closest('.rank')", 0
            while not chrome.look(placed) and (tries := tries + 1) < 30:
                tap(chrome, chip.format(letter))
                for _ in range(60):  # a tap that is late must not be taken for a lost one: a second would undo it
                    if chrome.look(placed):
                        break
                    time.sleep(0.1)
        assert chrome.look("state.choices.MQ") == "C>A>B"
        for letter, rank in (("B", 0), ("A", 2), ("C", 2)):  # by dragging
            field = "document.querySelector('[data-column=TA]')"
            x, y = middle(chrome, f"[...{field}.querySelectorAll('.chip')].find(c => c.dataset.letter === '{letter}')")
            mouse(chrome, "mousePressed", x, y)
            there = f"{field}.querySelectorAll('.rank')[{rank}].getBoundingClientRect()"
            x, y = chrome.look(f"[{there}.x + {there}.width - 8, {there}.y + {there}.height / 2]")
            mouse(chrome, "mouseMoved", x - 20, y)
            mouse(chrome, "mouseMoved", x, y)
            mouse(chrome, "mouseReleased", x, y)
        assert chrome.look("state.choices.TA") == "B>A=C"
        chrome.look("whole = played; played = () => 0.5")  # however slow this machine is, nobody has seen it all
        chrome.key("Enter")
        chrome.until("document.querySelector('#message').textContent.includes('watch the videos')")
        assert not Store(db).votes()
        chrome.look("played = whole")
        chrome.until("videos.every(v => played(v) > 0.95)")
        chrome.key("Enter")
        chrome.until(f"!busy && {RATED} == 1")
        assert chrome.look("Object.keys(state.choices).length === 0")
        ((vote,),) = Store(db).votes().values()
        said = dict(zip(("VQ", "MQ", "TA"), ("B>A=C", "C>A>B", "B>A=C")))
        (history,) = Store(db).round().history
        letters = dict(zip("ABC", history["screen"]))
        for column, text in said.items():
            tiers = [sorted(letters[letter] for letter in tier.split("=")) for tier in text.split(">")]
            assert [sorted(tier.split("=")) for tier in vote.choices[column].split(">")] == tiers
        assert not vote.is_fast
        chrome.keys("1", "2", "Backspace", "3", "2")
        assert chrome.look("state.choices.VQ") == "A>C>B"


def test_a_killed_server_loses_no_acknowledged_vote(served):
    url, db, stop, start = served
    token = Store(db).invite("a")
    acknowledged = 0
    for number in range(6):
        with httpx.Client(base_url=url) as client:
            answer = client.post(f"/a/{token}/vote", json=ballot(client, token))
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
        with httpx.Client(base_url=url, timeout=60) as client:
            while task := task_of(client, token):
                client.get(f"/a/{token}/video/{task['ticket']}/left")
                answer = client.post(f"/a/{token}/vote", json={"ticket": task["ticket"], "choices": GOOD})
                (acknowledged if answer.status_code == 200 else errors).append((name, answer.status_code))

    threads = [threading.Thread(target=at_work, args=item) for item in tokens.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = store.votes()
    assert not errors
    assert len(acknowledged) == 20 == sum(map(len, votes.values()))
    assert all(len({vote.annotator for vote in of_pair}) == 2 == len(of_pair) for of_pair in votes.values())


def test_a_missing_browser_fails_where_one_is_required(monkeypatch):
    """A skip in continuous integration would hide that nobody has tried the page."""
    monkeypatch.setattr(chrome_module, "BROWSER", None)
    with pytest.raises(pytest.fail.Exception, match="VIDEOALIGN_REQUIRE_BROWSER is set, but there is none"):
        Chrome()
