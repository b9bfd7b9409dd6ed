"""What people see and how far they are: time watched, progress, pace, disputes, masks, images, safe tables."""

import csv
import io
import itertools
import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from annotation_helpers import GOOD, annotate, ballot, in_pair, person, rate, task_of, write_clips
from videoalign import VideoAlignError
from videoalign.annotation.beginning import begin
from videoalign.annotation.export import export
from videoalign.annotation.masking import GREY, Mask, masked, read_masks
from videoalign.annotation.overview import overview
from videoalign.annotation.pace import seconds_left
from videoalign.annotation.pairing import Pair
from videoalign.annotation.protocol import RatingProtocol
from videoalign.annotation.server import make_app
from videoalign.annotation.shown import shown_by
from videoalign.annotation.store import Store, new_round
from videoalign.annotation.voting import FastVote, Viewing
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.sample_images import image_of
from videoalign.datamodules.shards import ShardSet, ShardWriter, sha256
from videoalign.datamodules.spreadsheets import exact, original, plain
from videoalign.datamodules.verify import verify
from videoalign.datamodules.video import encode


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six prompts with a clip of half a second from each of two sources."""
    rows = [(f"p{p}{s}", None, f"prompt {p}", s) for p in range(6) for s in "xy"]
    return write_clips(tmp_path_factory.mktemp("set") / "videos", rows)


def begun(videos, tmp_path, text="{votes: 2, repeats: 0.0}", **options):
    rules = tmp_path / "rules.yaml"
    rules.write_text(text)
    given = {"validation": 0, "benchmark": 0, "protocol": str(rules)} | options
    return begin(str(videos), str(tmp_path / "votes.db"), **given)


def client_of(store, videos, **options):
    app = make_app(store, ShardSet(videos), "admin-secret", **options)
    return TestClient(app, headers={"content-type": "application/json"})


# --- votes before one full play ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("played", "lengths", "on_screen", "seen"),
    [
        ([5, 5], [5, 5], 60, 5),
        ([5, 2], [5, 4], 60, 2.5),  # half of the second one
        ([1, 3], [1, 3], 60, 3),  # the shorter one waits at its end
        ([9, 9], [5, 5], 60, 5),  # twice is not more than once
        ([5, 5], [5, 5], 2, 2),  # a page cannot have played what it had no time for
        ([5], [5, 5], 60, 0),
        ([], [5, 5], 60, 0),
        ([4], [4], 4, 4),
    ],
)
def test_what_was_watched_is_the_least_share_of_all_videos(played, lengths, on_screen, seen):
    assert Viewing(played, lengths).watched(on_screen) == pytest.approx(seen)


@pytest.fixture
def watch(monkeypatch):
    """Let time pass as a test says: a number of seconds per look at a screen's clock."""
    now = itertools.count(0, 10)
    monkeypatch.setattr("videoalign.annotation.assignment.time.monotonic", lambda: float(next(now)))


def test_fast_votes_are_marked_and_counted_by_person(videos, tmp_path, watch):
    store = begun(videos, tmp_path, per_prompt=1)
    with client_of(store, videos) as client:
        token = store.invite("ann")
        for watched in ([0.5, 0.5], [0.5, 0.1], [], [0.5, 0.46]):
            answer = client.post(f"/a/{token}/vote", json=ballot(client, token, watched=watched))
            assert answer.status_code == 200
        flagged = {"ticket": task_of(client, token)["ticket"], "choices": {}, "flags": ["broken"]}
        assert client.post(f"/a/{token}/vote", json=flagged).status_code == 200
        page = client.get("/overview/admin-secret").text
    votes = [vote for of in store.votes().values() for vote in of]
    assert [vote.is_fast for vote in sorted(votes, key=lambda v: v.created)] == [False, True, True, False, False]
    assert all(vote.full_play == pytest.approx(0.5) for vote in votes)
    (ann,) = overview(store.round())["people"]
    assert ann["fast"] == 0.5  # of the four without flags
    assert "<td>0.50</td>" in page
    assert [vote["fast"] for vote in store.round().history] == [False, True, True, False, False]


def test_fast_votes_are_refused_where_that_is_asked_and_the_same_vote_is_good_later(videos, tmp_path, watch):
    store = begun(videos, tmp_path, per_prompt=1)
    with client_of(store, videos, refuse_fast=True) as client:
        token = store.invite("ann")
        sent = ballot(client, token, watched=[0.5, 0.1])
        answer = client.post(f"/a/{token}/vote", json=sent)
        assert answer.status_code == 425
        assert "watch the videos to their end" in answer.json()["error"]
        assert store.votes() == {}
        assert client.post(f"/a/{token}/vote", json=sent | {"watched": [0.5, 0.5]}).status_code == 200
        assert client.post(f"/a/{token}/undo", json={}).json() == {"undone": True}
        # what was seen before the undo was seen
        assert client.post(f"/a/{token}/vote", json=ballot(client, token)).status_code == 200
        sent = ballot(client, token)
        assert client.post(f"/a/{token}/vote", json=sent).status_code == 425
        assert client.post(f"/a/{token}/vote", json=sent | {"choices": {}, "flags": ["unsafe"]}).status_code == 200
    assert sum(map(len, store.votes().values())) == 2


@pytest.mark.parametrize("watched", [[-1.0], ["x"], [1.0] * 7, "5", [None]])
def test_forged_times_are_no_votes(videos, tmp_path, watched):
    store = begun(videos, tmp_path, per_prompt=1)
    with client_of(store, videos) as client:
        token = store.invite("ann")
        assert client.post(f"/a/{token}/vote", json=ballot(client, token, watched=watched)).status_code == 422
    assert store.votes() == {}


def test_nobody_who_imports_votes_is_called_fast(videos, tmp_path):
    store = begun(videos, tmp_path, per_prompt=1)
    store.invite("ann")
    store.bring_in({1: [("ann", GOOD, [], 0.0)]})
    assert overview(store.round())["people"][0]["fast"] is None
    who = person(store, "bob")
    with pytest.raises(FastVote):
        store.vote(who, store.task(who).ticket, GOOD, viewing=Viewing([0, 0], [9, 9], required=True))


def test_an_export_says_which_votes_were_fast(videos, tmp_path, watch):
    store = begun(videos, tmp_path, "{votes: 1, repeats: 0.0}", per_prompt=1)
    with client_of(store, videos) as client:
        token = store.invite("ann")
        for watched in ([0.5, 0.5], []):
            client.post(f"/a/{token}/vote", json=ballot(client, token, watched=watched))
    export(store, ShardSet(videos), tmp_path / "out")
    with open(tmp_path / "out/decided.csv", encoding="utf-8-sig") as file:
        assert [row["fast_votes"] for row in csv.DictReader(file)] == ["0", "1"]
    records = [content.record["votes"][0] for content in ShardSet(tmp_path / "out/train").contents()]
    assert [(vote["fast"], vote["watched"]) for vote in records] == [(False, 0.5), (True, 0.0)]
    every = [json.loads(line) for line in (tmp_path / "out/votes.jsonl").read_text().splitlines()]
    assert [vote["fast"] for vote in every] == [False, True]
    assert "person-001 50%" in (tmp_path / "out/card.md").read_text()


# --- progress ---------------------------------------------------------------------------------------------------------


def round_of(tmp_path, count, references=(), **rules):
    pairs = [Pair(f"prompt {i}", (f"{i}a", f"{i}b"), ("x", "y"), "train") for i in range(count)]
    with new_round(tmp_path / "v.db", pairs, RatingProtocol(**rules), "data", references):
        pass
    return Store(tmp_path / "v.db")


def counted(store, who):
    found = store.progress(who)
    return found["done"], found["total"]


def test_progress_goes_up_by_one_with_each_vote_and_hidden_repetitions_are_in_it(tmp_path):
    store = round_of(tmp_path, 40, repeats=0.1, repeat_after=5)
    who, seen = person(store, "ann"), []
    while task := store.task(who):
        seen.append(counted(store, who))
        store.vote(who, task.ticket, GOOD)
    done, total = counted(store, who)
    assert done == total == len(seen) > 40
    assert seen == [(number, total) for number in range(total)]


def test_progress_never_falls_when_others_rate_what_was_left(tmp_path):
    store = round_of(tmp_path, 12, votes=2, repeats=0.0)
    ann, *others = (person(store, name) for name in "abc")
    shares, totals = [], []
    for number in range(12):
        for who in (ann, *others) if number < 6 else others:
            if store.task(who):
                rate(store, who)
            done, total = counted(store, ann)
            shares.append(done / total)
            totals.append(total)
    assert shares == sorted(shares)
    assert totals == sorted(totals, reverse=True) and totals[0] == 12 > totals[-1]


def test_training_rounds_are_counted_by_themselves(tmp_path):
    references = [(Pair("t", (f"{i}t", f"{i}u"), ("x", "y"), "train"), GOOD) for i in range(2)]
    store = round_of(tmp_path, 3, references, repeats=0.0)
    who, seen = person(store, "ann"), []
    for choices in ({"VQ": "B", "MQ": "A", "TA": "A"}, GOOD):
        for _ in range(2):
            found = store.progress(who)
            seen.append((found["kind"], found["round"], found["done"], found["total"]))
            rate(store, who, in_pair(store, store.task(who), choices))
    assert seen == [("training", 1, 0, 2), ("training", 1, 1, 2), ("training", 2, 0, 2), ("training", 2, 1, 2)]
    found = store.progress(who)
    assert (found["kind"], found["done"], found["total"]) == ("work", 0, 3)


def test_reviewers_are_told_of_disputes(tmp_path):
    store = round_of(tmp_path, 3, votes=1, unsafe_votes=2, repeats=0.0)
    ann, rev = person(store, "ann"), person(store, "rev", "reviewer")
    for _ in range(2):
        rate(store, ann, {}, flags=["unsafe"])
    assert counted(store, rev) == (0, 2)
    rate(store, rev)
    assert counted(store, rev) == (1, 2)
    assert store.progress(rev)["kind"] == "review"


# --- pace -------------------------------------------------------------------------------------------------------------


def votes_at(who, *times, **more):
    return [
        {"annotator": who, "created": float(t), "occasion": 0, "review": False, "watched": 5.0} | more for t in times
    ]


def test_the_time_left_is_at_the_pace_of_those_who_vote_now():
    steady = votes_at(1, *range(0, 1000, 20))
    assert seconds_left(steady, 30, 1000) == pytest.approx(600)
    # a night between two votes, and a minute of hurry, change nothing
    paused = votes_at(1, *range(-90_000, -89_800, 20), *range(800, 1000, 20), 981, 982)
    assert seconds_left(paused, 30, 1000) == pytest.approx(600)
    assert seconds_left([*steady, *votes_at(2, *range(0, 1000, 20))], 30, 1000) == pytest.approx(300)
    gone = votes_at(2, *range(-9000, -8000, 1))
    assert seconds_left([*gone, *steady], 30, 1000) == pytest.approx(600)


def test_where_nobody_votes_there_is_no_estimate():
    steady = votes_at(1, *range(0, 1000, 20))
    assert seconds_left(steady, 30, 2000) is None
    assert seconds_left([], 30, 0) is None
    assert seconds_left(steady[:2], 30, 40) is None  # two votes are no pace
    assert seconds_left(votes_at(1, *range(0, 1000, 20), review=True), 30, 1000) is None
    assert seconds_left(votes_at(1, *range(0, 1000, 20), watched=None), 30, 1000) is None  # an import
    assert seconds_left([], 0, 0) == 0


def test_the_overview_shows_progress_and_opens_disputes(videos, tmp_path):
    store = begun(videos, tmp_path, per_prompt=1)
    with client_of(store, videos) as client:
        page = client.get("/overview/admin-secret").text
        assert "12 votes are missing; nobody votes now" in page
        assert '<progress class="wide" max="1" value="0.0"' in page
        for name, choices in (("ann", GOOD), ("bob", {**GOOD, "VQ": "B"})):
            who = person(store, name)
            while task := store.task(who):
                store.vote(who, task.ticket, in_pair(store, task, choices if task.pair_id < 3 else GOOD))
        page = client.get("/overview/admin-secret").text
        assert "67 % of the pairs are finished, 0 votes are missing." in page
        assert 'href="/overview/admin-secret/pair/1"' in page
        opened = client.get("/overview/admin-secret/pair/1").text
        row = next(row for row in store.pairs() if row.id == 1)
        for said in ("waits for a reviewer", "ann", "bob", row.source_a, row.key_b, row.prompt):
            assert said in opened
        assert "refresh" not in opened  # a page that is watched does not begin anew
        media = {content.key: content.read("mp4") for content in ShardSet(videos).contents()}
        assert client.get(f"/overview/admin-secret/video/{row.key_a}").content == media[row.key_a]
        for path in ("pair/99", "pair/x", "video/none", "video/..%2findex.json", "image/p0x"):
            assert client.get(f"/overview/admin-secret/{path}").status_code in (404, 422)
        for path in ("pair/1", f"video/{row.key_a}"):
            assert client.get(f"/overview/guess/{path}").status_code == 404


# --- masks ------------------------------------------------------------------------------------------------------------


def frames_of(video):
    with av.open(io.BytesIO(video)) as container:
        return [(f.pts * f.time_base, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


def moving(count=6, size=(48, 64)):
    rng = np.random.default_rng(0)
    return np.repeat(rng.integers(0, 255, (count, *(s // 8 for s in size), 3), dtype=np.uint8), 8, 1).repeat(8, 2)


@pytest.mark.parametrize("box", [(16, 8, 24, 16), (0.25, 1 / 6, 0.375, 1 / 3)])
def test_a_box_is_burned_in_and_all_else_stays(box):
    before = encode(moving(), 8)
    after = masked(before, [Mask("x", box)], "clip")
    old, new = frames_of(before), frames_of(after)
    assert [time for time, _ in old] == [time for time, _ in new]
    for (_, a), (_, b) in zip(old, new):
        inside = b[10:22, 18:38].astype(int)
        assert np.abs(inside - GREY).max() < 12
        outside = np.ones(a.shape[:2], bool)
        outside[4:28, 12:44] = False
        assert np.abs(a[outside].astype(int) - b[outside]).mean() < 6


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("x", "must be like SOURCE=x,y,w,h"),
        ("=1,2,3,4", "must be like SOURCE=x,y,w,h"),
        ("x=1,2,3", "four numbers"),
        ("x=1,2,3,a", "four numbers"),
        ("x=0,0,0,5", "w and h more than 0"),
        ("x=-1,0,5,5", "x and y must be at least 0"),
        ("x=0.5,0,20,20", "whole pixels"),
        ("x=nan,0,1,1", "x and y must be at least 0"),
        ("z=0,0,4,4", "no video of that source; the set has x, y"),
        ("x=900,0,4,4", "lies outside of the picture, which is 32x32"),
    ],
)
def test_boxes_that_make_no_sense_are_refused_and_leave_nothing(videos, tmp_path, word, message):
    with pytest.raises(VideoAlignError, match=message):
        begun(videos, tmp_path, mask=[word])
    assert [path.name for path in tmp_path.iterdir()] == ["rules.yaml"]


def test_boxes_come_from_a_table_too(tmp_path):
    (tmp_path / "boxes.csv").write_text("source,x,y,w,h\na=b,0,0,8,8\n*,0.5,0,0.5,0.1\n")
    assert read_masks(["c=1,2,3,4"], str(tmp_path / "boxes.csv")) == [
        Mask("c", (1, 2, 3, 4)), Mask("a=b", (0, 0, 8, 8)), Mask("*", (0.5, 0, 0.5, 0.1)),
    ]  # fmt: skip
    (tmp_path / "boxes.csv").write_text("source,x,y,w,h\na,0,0,8,?\n")
    with pytest.raises(VideoAlignError, match="line 2: a box is four numbers"):
        read_masks([], str(tmp_path / "boxes.csv"))


def bright(folder):
    """A set of two sources of white clips."""
    with ShardWriter(folder, "videos") as writer:
        for prompt, source in itertools.product(range(3), "xy"):
            record = {"prompt": f"prompt {prompt}", "source": source, "fps": 8.0, "num_frames": 4}
            writer.write(f"p{prompt}{source}", {"": encode(np.full((4, 32, 32, 3), 250, np.uint8), 8)}, record)
    return folder


def corner(video):
    return frames_of(video)[0][1][2:6, 2:6].mean()


def test_people_see_masked_videos_alone_and_the_export_says_where(tmp_path):
    videos = bright(tmp_path / "set")
    store = begun(videos, tmp_path, "{votes: 1, repeats: 0.0}", per_prompt=1, mask=["x=0,0,8,8"])
    with client_of(store, videos) as client:
        token = store.invite("ann")
        while task := task_of(client, token):
            shown = store.task(store.who(token))
            for place, key in zip(("left", "right"), shown.keys):
                video = client.get(f"/a/{token}/video/{task['ticket']}/{place}").content
                assert corner(video) == pytest.approx(GREY if key.endswith("x") else 250, abs=6)
            client.post(f"/a/{token}/vote", json=ballot(client, token))
        seen = client.get("/overview/admin-secret/video/p0x").content
        assert corner(seen) == pytest.approx(GREY, abs=6)
    card = export(store, ShardSet(videos), tmp_path / "out")
    assert card["masks"] == [{"source": "x", "box": [0.0, 0.0, 8.0, 8.0]}]
    assert "| x | 0.0, 0.0, 8.0, 8.0 | pixels |" in (tmp_path / "out/card.md").read_text()
    train = ShardSet(tmp_path / "out/train", "pairs")
    assert train.table("masks.csv") == [
        {"source": "x", "x": "0.0", "y": "0.0", "w": "8.0", "h": "8.0", "unit": "pixel"}
    ]
    assert "masks.csv" in train.index.tables and not [*verify(train)]
    for content in train.contents():
        for side, member in (("A", "a.mp4"), ("B", "b.mp4")):
            is_masked = content.record["sources"][side] == "x"
            assert corner(content.read(member)) == pytest.approx(GREY if is_masked else 250, abs=6)


def test_a_star_masks_all_sources_alike(tmp_path):
    videos = bright(tmp_path / "set")
    store = begun(videos, tmp_path, mask=["*=0,0,0.25,0.25"])
    shown = shown_by(store, ShardSet(videos))
    assert {round(corner(content.read("mp4"))) // 10 for content in shown.contents.values()} == {GREY // 10}


def test_a_round_without_its_masked_videos_is_refused(tmp_path):
    videos = bright(tmp_path / "set")
    store = begun(videos, tmp_path, mask=["x=0,0,8,8"])
    record = tmp_path / "votes.db.shown/shown.json"
    record.write_text(record.read_text().replace("8.0", "7.0"))
    with pytest.raises(VideoAlignError, match="is missing, or is not that of"):
        make_app(store, ShardSet(videos), "x")
    (tmp_path / "votes.db.shown").rename(tmp_path / "elsewhere")
    with pytest.raises(VideoAlignError, match="keep both together"):
        export(store, ShardSet(videos), tmp_path / "out")


# --- images -----------------------------------------------------------------------------------------------------------


def write_image(path, colour, kind="PNG"):
    Image.new("RGB", (20, 10), colour).save(path, kind)
    return path


def test_images_are_shown_beside_the_prompt_and_exported(videos, tmp_path):
    pictures = [write_image(tmp_path / f"{p}.img", (40 * p, 0, 0), "PNG" if p % 2 else "JPEG") for p in range(6)]
    lines = "".join(f"prompt {p},{path.name}\n" for p, path in enumerate(pictures))
    (tmp_path / "images.csv").write_text("prompt,image\n" + lines)
    rules = "{votes: 1, repeats: 0.0}"
    store = begun(videos, tmp_path, rules, per_prompt=1, benchmark=0.3, images=str(tmp_path / "images.csv"))
    for path in pictures:
        path.unlink()  # the round has its own copies
    with client_of(store, videos) as client:
        token, other = store.invite("ann"), store.invite("bob")
        seen = {}
        while task := task_of(client, token):
            assert task["image"] is True
            answer = client.get(f"/a/{token}/image/{task['ticket']}")
            number = int(task["prompt"].split()[1])
            assert answer.headers["content-type"] == ("image/png" if number % 2 else "image/jpeg")
            red = Image.open(io.BytesIO(answer.content)).getpixel((0, 0))[0]
            assert abs(red - 40 * number) < 4
            assert "img" not in answer.headers.get("content-disposition", "")
            assert client.get(f"/a/{other}/image/{task['ticket']}").status_code == 404
            assert client.get(f"/a/{token}/image/forged").status_code == 404
            seen[task["prompt"]] = answer.content
            client.post(f"/a/{token}/vote", json=ballot(client, token))
        assert len(seen) == 6
        assert client.get("/overview/admin-secret/image/p0x").content == seen["prompt 0"]
        assert 'id="image"' in client.get("/overview/admin-secret/pair/1").text
    card = export(store, ShardSet(videos), tmp_path / "out")
    assert card["images"] == 6
    rows = Benchmark(tmp_path / "out/benchmark").rows
    records = [content.record for content in ShardSet(tmp_path / "out/train").contents()]
    for row in (*rows, *(record | {"image": record["image"]["file"]} for record in records)):
        assert (tmp_path / "out/images" / row["image"]).read_bytes() == seen[row["prompt"]]
    for content in ShardSet(tmp_path / "out/train").contents():
        assert image_of(content).content == seen[content.record["prompt"]]
        assert image_of(content).sha256 == content.record["image"]["sha256"]
    with open(tmp_path / "out/decided.csv", encoding="utf-8-sig") as file:
        assert all((tmp_path / "out/images" / row["image"]).is_file() for row in csv.DictReader(file))


def test_pairs_are_of_one_image(videos, tmp_path):
    for name, colour in (("r", "red"), ("g", "green")):
        write_image(tmp_path / f"{name}.png", colour)
    rows = [(f"{s}{i}", None, "a prompt", s) for s in "xy" for i in range(2)]
    other = write_clips(tmp_path / "set", rows)
    (tmp_path / "i.csv").write_text("key,image\nx0,r.png\ny0,r.png\nx1,g.png\ny1,g.png\n")
    store = begun(other, tmp_path, per_prompt=9, images=str(tmp_path / "i.csv"))
    assert sorted(tuple(sorted(row.keys)) for row in store.pairs()) == [("x0", "y0"), ("x1", "y1")]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("prompt,picture\nprompt 0,a.png\n", "lacks the columns image"),
        ("image\na.png\n", "one of the columns key and prompt"),
        ("key,prompt,image\np0x,prompt 0,a.png\n", "one of the columns key and prompt"),
        ("prompt,image\nprompt 9,a.png\n", "line 2: the set has no video with the prompt 'prompt 9'"),
        ("prompt,image\nprompt 0,none.png\n", "line 2: .*none.png cannot be read as an image"),
        ("prompt,image\nprompt 0,text.png\n", "line 2: .*text.png cannot be read as an image"),
        ("prompt,image\nprompt 0,a.bmp\n", "a.bmp is a BMP; images are PNG, JPEG, WEBP"),
        ("prompt,image\nprompt 0,a.png\n", "no image for 10 of the 12 videos, first 'p1x'"),
        ("prompt,image\nprompt 0,a.png\nprompt 0,b.png\n", "line 3: prompt 'prompt 0' has another image"),
    ],
)
def test_tables_of_images_that_leave_something_open_are_refused(videos, tmp_path, table, message):
    write_image(tmp_path / "a.png", "red")
    write_image(tmp_path / "b.png", "blue")
    write_image(tmp_path / "a.bmp", "red", "BMP")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "i.csv").write_text(table)
    with pytest.raises(VideoAlignError, match=message):
        begun(videos, tmp_path, images=str(tmp_path / "i.csv"))
    assert not (tmp_path / "votes.db").exists() and not (tmp_path / "votes.db.shown").exists()


# --- spreadsheets -----------------------------------------------------------------------------------------------------

TEXTS = ["=1", "'=1", "''=1", "'quoted", "", "'", "-x", " +1", "@", "a=b", "'a", "\t=1", "' =1", "＝cmd"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_from_a_cell(text):
    assert original(plain(text)) == original(exact(text)) == text
    assert not plain(text).startswith(("=", "+", "-", "@", "\t"))


def test_a_safe_export_is_read_back_as_it_was(tmp_path):
    prompt = '=HYPERLINK("http://x")'
    rows = [("-a", None, prompt, "@x"), ("-b", None, prompt, "'=y")]
    videos = write_clips(tmp_path / "set", rows)
    with new_round(
        tmp_path / "v.db",
        [Pair(prompt, ("-a", "-b"), ("@x", "'=y"), "benchmark")],
        RatingProtocol(votes=1),
        sha256(videos / "index.json"),
    ) as half:
        half.invite("x")
        half.bring_in({1: [("x", GOOD, [], 1.0)]})
    for name, options in (("plain", []), ("safe", ["--spreadsheet-safe"])):
        annotate("export", *options, db=tmp_path / "v.db", videos=videos, out=tmp_path / name)
        (row,) = Benchmark(tmp_path / name / "benchmark").rows
        assert (row["key_A"], row["prompt"], row["A_model"], row["B_model"]) == ("-a", prompt, "@x", "'=y")
        assert not [*verify(ShardSet(tmp_path / name / "benchmark"))]
    safe = (tmp_path / "safe/benchmark/pairs.csv").read_text()
    with open(tmp_path / "safe/benchmark/pairs.csv", newline="") as file:
        (cells,) = csv.DictReader(file)
    assert (cells["key_A"], cells["A_model"], cells["B_model"]) == ("'-a", "'@x", "''=y")
    assert cells["prompt"] == f"'{prompt}" and safe != (tmp_path / "plain/benchmark/pairs.csv").read_text()
