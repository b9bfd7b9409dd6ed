"""Annotation under wrong names, empty exports, hostile requests, files that vanish, and clocks that are set back."""

import asyncio
import base64
import csv
import json
import logging
import os
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent))
from annotation_helpers import COLUMNS, GOOD, annotate, ballot, in_pair, person, write_clips
from videoalign import VideoAlignError
from videoalign.annotation import connections
from videoalign.annotation.agreement import independent, sources, wilson
from videoalign.annotation.beginning import begin
from videoalign.annotation.export import export, plain
from videoalign.annotation.label_studio import import_label_studio
from videoalign.annotation.names import Names
from videoalign.annotation.pairing import Pair
from videoalign.annotation.protocol import RatingProtocol
from videoalign.annotation.request_guard import host_of
from videoalign.annotation.server import make_app
from videoalign.annotation.serving import serve as serve_command
from videoalign.annotation.serving import server_of
from videoalign.annotation.store import Store, new_round
from videoalign.annotation.vote_file import StorageError
from videoalign.annotation.vote_tables import HoldRow
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.shards import ShardSet, sha256


def numbered(count=6, folder="", prompt="a red circle"):
    """What `shards import-videos` makes of numbered files: keys are lines, two more than the files' numbers."""
    return [(f"{i + 2:06d}", f"{folder}{i:06d}.mp4", prompt, f"model{i}") for i in range(count)]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("numbers") / "set", numbered())


# --- names ------------------------------------------------------------------------------------------------------------


def records(*rows):
    named = {key: {"prompt": prompt, "source": source} for key, _, prompt, source in rows}
    return {key: named[key] | ({"path": path} if path else {}) for key, path, _, _ in rows}


TREE = records(
    ("000002", "modelA/000007.mp4", "p", "a"),
    ("000003", "modelB/000007.mp4", "p", "b"),
    ("000004", "modelA/a b (1).mp4", "p", "a"),
    ("000005", "modelB/b+c%20d.mp4", "p", "b"),
    ("000006", "caf\u00e9.mp4", "p", "a"),
    ("000007", "deep/modelA/000007.mp4", "p", "c"),
    ("000008", "clip.webm", "p", "d"),
    ("000009", "deadbeef-cat.mp4", "p", "e"),
    ("0-gen", None, "p", "f"),
    ("000010", "s#1?x.mp4", "p", "g"),
)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("modelA/000007.mp4", "000002"),
        ("/data/local-files/?d=modelB/000007.mp4", "000003"),
        ("/data/local-files/?d=disk/deep/modelA/000007.mp4", "000007"),
        ("http://host:8080/data/local-files/?d=disk%2FmodelB%2F000007.mp4", "000003"),
        ("s3://bucket/deep/modelA/000007.mp4", "000007"),
        ("https://cdn.example/x/modelB/000007.mp4?X-Amz-Signature=a%2Fb&x=1", "000003"),
        ("/data/upload/3/1a2b3c4d-a_b_1.mp4", "000004"),
        ("modelA/a%20b%20(1).mp4", "000004"),
        ("gs://bucket/modelA/a b (1).mp4", "000004"),
        ("https://host/modelB/b+c%2520d.mp4", "000005"),
        ("/data/local-files/?d=x/modelB/b%2Bc%2520d.mp4", "000005"),
        ("/data/local-files/?d=modelB/b+c%20d.mp4", "000005"),
        ("/data/upload/1/0123abcd-cafe\u0301.mp4", "000006"),
        ("caf%C3%A9.mp4", "000006"),
        ("clip", "000008"),
        ("1a2b3c4d-clip.webm", "000008"),
        ("/data/upload/7/99999999-deadbeef-cat.mp4", "000009"),
        ("deadbeef-cat.mp4", "000009"),
        ("0-gen", "0-gen"),
        ("s3://b/sets/0-gen.mp4", "0-gen"),
        ("/data/upload/1/1a2b3c4d-0-gen.mp4", "0-gen"),
        ("C:\\videos\\modelB\\000007.mp4", "000003"),
        ("s3://bucket/s#1?x.mp4", "000010"),
        ("/tasks/5/resolve/?fileuri=" + base64.b64encode(b"s3://b/modelB/000007.mp4").decode(), "000003"),
        ("000002.mp4", "000002"),
        ("./modelA/../modelB/000007.mp4", "000003"),
    ],
)
def test_a_name_means_the_video_with_the_longest_path_end_or_the_key(name, key):
    assert Names(TREE).find(name, "task 1", "p") == {key}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # in three folders, and a key
        ("/data/upload/1/ab12cd34-000007.mp4", "is the key .*000007.* file name of .*--names"),
        ("000007.mp4", "is the key"),
        ("modelC/000007.mp4", "is the key"),
        ("nowhere.mp4", "no video 'nowhere'"),
        ("modelC/clip.webm.mp4", "no video"),
        ("s3://bucket/other/cat.mp4", "no video"),
        ("clip.mp4", "no video 'clip'"),
        ("renders/caf\u00e9.mp4", None),
        ("renders/a b (1).mp4", "file name is that of '000004' .*--names files"),
        ("a_b_1.mp4", "no video"),
        ("x/1a2b3c4d-clip.webm", "no video"),
        ("?fileuri=!!", "no video"),
        ("/", "no video"),
        ("%00", "no video"),
    ],
)
def test_a_name_that_could_mean_another_video_is_refused(name, message):
    if message is None:  # the record's whole path is the name's end
        assert Names(TREE).find(name, "task 1", "p") == {"000006"}
        return
    with pytest.raises(VideoAlignError, match=f"task 1: .*{message}"):
        Names(TREE).find(name, "task 1", "p")


def test_one_file_name_in_two_folders_is_refused_unless_the_prompt_tells_them_apart():
    known = records(("x", "a/1.mp4", "cat", "a"), ("y", "b/1.mp4", "cat", "b"), ("z", "c/1.mp4", "dog", "b"))
    with pytest.raises(VideoAlignError, match=r"fits 2 videos, among them 'x' .* and 'y'"):
        Names(known).find("/data/upload/1/ab12cd34-1.mp4", "task 1", "cat")
    assert Names(known).find("/data/upload/1/ab12cd34-1.mp4", "task 1", "dog") == {"z"}


def test_names_of_two_kinds_are_refused():
    """Files 000006 and 000007 were left out of the set, so their names are nothing but keys of other videos."""
    known = records(*numbered(6))
    names = Names(known)
    assert names.find("000000.mp4", "task 1", None) == {"000002"}
    with pytest.raises(VideoAlignError, match=r"task 1: '000000.mp4' is a path .* task 2: '000007.mp4' is a key"):
        names.find("000007.mp4", "task 2", None)
    mixed = Names(known | records(("0-gen", None, "p", "f")))  # a video without a path has no name but its key
    assert mixed.find("000000.mp4", "task 1", None) == {"000002"}
    assert mixed.find("0-gen.mp4", "task 2", None) == {"0-gen"}


@pytest.mark.parametrize(("by", "key"), [("paths", "000004"), ("keys", "000002"), ("files", "000004")])
def test_one_may_say_what_names_are(by, key):
    assert Names(records(*numbered()), by).find("/data/upload/1/ab12cd34-000002.mp4", "task 1", None) == {key}
    with pytest.raises(VideoAlignError, match="--names x"):
        Names({}, "x")


def test_file_names_alone_are_taken_where_asked():
    known = records(("x", "a/1.mp4", "cat", "a"), ("y", "b/2.mp4", "cat", "b"), ("z", "c/2.mp4", "cat", "b"))
    assert Names(known, "files").find("https://host/flat/1.mp4", "task 1", None) == {"x"}
    with pytest.raises(VideoAlignError, match="fits 2 videos"):
        Names(known, "files").find("https://host/flat/2.mp4", "task 1", None)


# --- exports of Label Studio ------------------------------------------------------------------------------------------


def said(who, choice="A", **more):
    chosen = [{"from_name": c, "to_name": "a", "type": "choices", "value": {"choices": [choice]}} for c in COLUMNS]
    return {"completed_by": who, "lead_time": 9.0, "result": chosen, **more}


def task(number, a, b, annotations, **more):
    data = {"prompt": "a red circle", "video_a": a, "video_b": b}
    return {"id": number, "data": data, "annotations": annotations, **more}


def bring(tmp_path, videos, tasks, **options):
    path = tmp_path / "export.json"
    path.write_text(tasks if isinstance(tasks, str) else json.dumps(tasks))
    options = {"shares": (0.0, 0.0), **options}
    return import_label_studio(path, ShardSet(videos), tmp_path / "votes.db", **options), Store(tmp_path / "votes.db")


KEYS = ("000002", "000003")


@pytest.mark.parametrize(("names", "sources"), [("paths", ("model2", "model5")), ("keys", ("model0", "model3"))])
def test_votes_on_numbered_files_go_to_nobody_until_one_says_what_the_numbers_are(
    numbers, tmp_path, names, sources, capsys
):
    path, db = tmp_path / "e.json", tmp_path / "votes.db"
    a, b = ("/data/upload/1/ab12cd34-000002.mp4", "/data/upload/1/ab12cd34-000005.mp4")
    path.write_text(json.dumps([task(1, a, b, [said(i) for i in (1, 2, 3)])]))
    options = {"videos": numbers, "db": db, "validation": 0, "benchmark": 0}
    with pytest.raises(SystemExit):
        annotate("import-label-studio", path, **options)
    assert f"task 1: '{a}' is the key of" in capsys.readouterr().err
    assert not db.exists()
    annotate("import-label-studio", path, **options, names=names)
    (row,) = Store(db).pairs()
    assert (row.source_a, row.source_b) == sources
    assert Store(db).decisions()[row.id].labels["VQ"] == "A"


def test_one_file_under_two_prompts_needs_the_prompt(tmp_path):
    cats = [("k1", "a.mp4", "cat", "x"), ("k2", "b.mp4", "cat", "y")]
    dogs = [("k3", "a.mp4", "dog", "x"), ("k4", "b.mp4", "dog", "y"), ("k5", "c.mp4", "dog", "z")]
    videos = write_clips(tmp_path / "set", cats + dogs)
    tasks = [task(1, "a.mp4", "b.mp4", [said(1)])]
    del tasks[0]["data"]["prompt"]
    with pytest.raises(VideoAlignError, match=r"task 1: .* under several prompts, such as 'cat' and 'dog'"):
        bring(tmp_path, videos, tasks)
    tasks[0]["data"]["prompt"] = " dog\n"
    only = task(2, "a.mp4", "c.mp4", [said(1)])  # c has one prompt, so that one was shown
    del only["data"]["prompt"]
    _, store = bring(tmp_path, videos, [*tasks, only])
    assert [(row.key_a, row.key_b) for row in store.pairs()] == [("k3", "k4"), ("k3", "k5")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(annotations=[]), "none of its 1 tasks has an annotation, so there is no vote"),
        (lambda t: t.pop("annotations"), "none of its 1 tasks has an annotation"),
        (lambda t: t.update(annotations=[], predictions=[{"result": []}]), "1 have predictions, which are a model's"),
        (lambda t: t.update(annotations=[], drafts=[{"result": []}]), "1 have drafts"),
        (lambda t: (t.pop("annotations"), t.update(total_annotations=3)), "list of tasks: export"),
        (
            lambda t: t.update(annotations=[said(1, was_cancelled=True), said(2, was_cancelled=True)]),
            "all 2 annotations .* skipped or cancelled",
        ),
        (lambda t: t.update(annotations=[said(1, result=[])]), "task 1: an annotation lacks a choice in VQ, MQ, TA"),
        (
            lambda t: t.update(annotations=[said(1, result=[{"from_name": "quality", "value": {"choices": ["A"]}}])]),
            "what it has is called quality",
        ),
        (
            lambda t: (t.pop("annotations"), t.update(completions=[{**said(1), "was_cancelled": True}])),
            "all 1 annotations",
        ),
        (
            lambda t: (t.pop("annotations"), t.update(completions=[{"id": 1, "result": said(1)["result"]}])),
            "does not say who made it",
        ),
        (lambda t: (t.update(t.pop("data")), t.pop("annotations"), t.update(VQ="A", annotator=1)), "JSON-MIN"),
        (lambda t: t["annotations"][0].update(lead_time=-3), "lead_time is -3"),
        (lambda t: t["annotations"][0].update(created_at="yesterday"), "task 1 is not as Label Studio writes"),
        (lambda t: t["annotations"][0].update(completed_by="\ud800"), "task 1 is not as Label Studio writes"),
        (
            lambda t: t["annotations"][0]["result"].append({"from_name": "VQ", "value": {"choices": ["B"]}}),
            "VQ is A and B in one annotation",
        ),
        (lambda t: t["data"].update(prompt=5), "data.prompt is 5"),
        (lambda t: t["data"].update(prompt="a blue square"), "not two of the prompt 'a blue"),
        (lambda t: t.update(annotations=5), "task 1 is not as Label Studio writes"),
        (lambda t: t.update(annotations={"a": 1}), "task 1 is not as"),
    ],
)
def test_an_export_without_votes_says_which_kind_it_is(tmp_path_factory, tmp_path, change, message):
    videos = _plain(tmp_path_factory)
    one = task(1, *KEYS, [said(1)])
    change(one)
    with pytest.raises(VideoAlignError, match=message):
        bring(tmp_path, videos, [one])
    assert not (tmp_path / "votes.db").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '[{"id": NaN}]', "{}", "[]", "[1]", "id,prompt\n1,x\n", "", '[{"id": ' + "9" * 5000 + "}]"]
)
def test_what_is_no_export_is_refused(tmp_path_factory, tmp_path, text):
    with pytest.raises(VideoAlignError, match="is no JSON export of Label Studio"):
        bring(tmp_path, _plain(tmp_path_factory), text)


_SETS = {}


def _plain(factory):
    """Six videos whose keys are their only names."""
    if "plain" not in _SETS:
        _SETS["plain"] = write_clips(
            factory.mktemp("plain") / "set", [(key, None, p, s) for key, _, p, s in numbered()]
        )
    return _SETS["plain"]


def test_completions_of_label_studio_before_1_0_are_votes(tmp_path_factory, tmp_path):
    old = task(1, *KEYS, None, completions=[said(i, created_at=1600000000 + i) for i in (1, 2, 3)])
    del old["annotations"]
    found, store = bring(tmp_path, _plain(tmp_path_factory), [old])
    assert found == {"pairs": 1, "votes": 3, "people": 3}
    assert store.decisions()[1].labels == dict.fromkeys(COLUMNS, "A")


def test_a_task_that_occurs_twice_counts_once(tmp_path_factory, tmp_path):
    people = [said(i, id=10 + i, created_at=f"2024-01-0{i}T10:00:00Z") for i in (1, 2, 3)]
    without = [{k: v for k, v in one.items() if k not in ("id", "created_at")} for one in people]
    tasks = [task(1, *KEYS, people), task(1, *KEYS, people), task(9, *KEYS, without)]
    found, store = bring(tmp_path, _plain(tmp_path_factory), tasks)
    assert found == {"pairs": 1, "votes": 3, "people": 3, "repeated": 6}
    round_ = store.round()
    assert not round_.again
    assert [vote["taken_back"] for vote in round_.history] == [None] * 3


def test_what_a_person_said_again_later_takes_the_place_of_the_first(tmp_path_factory, tmp_path):
    first = said(1, "A", id=1, created_at="2024-01-01T10:00:00Z")
    second = said(1, "B", id=2, created_at="2024-03-01T10:00:00+00:00")
    same = said(2, "A", id=3, created_at="2024-01-01T10:00:00Z"), said(2, "A", id=4, created_at="2024-02-01T10:00:00Z")
    found, store = bring(tmp_path, _plain(tmp_path_factory), [task(1, *KEYS, [second, *same]), task(2, *KEYS, [first])])
    assert found == {"pairs": 1, "votes": 4, "people": 2}
    assert {vote.annotator: vote.choices["VQ"] for vote in store.votes()[1]} == {"1": "B", "2": "A"}
    assert Counter(vote["taken_back"] is None for vote in store.round().history) == {True: 2, False: 2}


def test_an_account_is_one_person_however_tasks_name_it(tmp_path_factory, tmp_path):
    first, second = {"id": 7, "email": "ann@lab"}, {"id": 7.0, "email": " Ann@LAB"}
    tasks = [task(1, *KEYS, [said(first)]), task(2, "000004", "000005", [said(7), said(8), said(8.0), said(" 8")])]
    tasks.append(task(3, "000006", "000007", [said(second), said("ANN@lab"), said(7.0), said("7")]))
    _, store = bring(tmp_path, _plain(tmp_path_factory), tasks, reviewers=["Ann@Lab "])
    assert sorted(person["name"] for person in store.round().people) == ["8", "ann@lab"]
    assert [person["name"] for person in store.round().people if person["role"] == "reviewer"] == ["ann@lab"]


def test_skipped_annotations_and_copies_are_told(tmp_path_factory, tmp_path, capsys):
    path = tmp_path / "e.json"
    path.write_text(json.dumps([task(1, *KEYS, [said(1), said(1), said(2, was_cancelled=True)])]))
    options = {"videos": _plain(tmp_path_factory), "db": tmp_path / "v.db", "validation": 0, "benchmark": 0}
    annotate("import-label-studio", path, **options)
    out = capsys.readouterr().out
    assert "1 pairs, 1 votes of 1 people" in out
    assert "1 annotations that were skipped" in out
    assert "1 copies" in out


# --- references and votes of another set ------------------------------------------------------------------------------


def begin_with(videos, tmp_path, **options):
    """A round without held-out prompts."""
    return begin(str(videos), str(tmp_path / "votes.db"), validation=0, benchmark=0, **options)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("key_A,key_B,VQ,MQ,TA,VQ\n000002,000003,A,A,A,B\n", "has the column VQ more than once"),
        ("key_A,key_B,key_A,VQ\n000002,000003,000004,A\n", "has the column key_A more than once"),
        ("key_A,key_B,VQ\n000002,000002,A\n", "line 2: key_A and key_B are the same video"),
        ("key_A,key_B,VQ\n000002,000003,A\n000003,000002,A\n", "line 3: repeats the pair of line 2"),
        ("key_A,key_B,VQ\n2,3,A\n", "no video '2' in the set; spreadsheets take the zeros"),
        (
            "key_A,key_B,VQ,prompt\n000002,000003,A,a blue square\n",
            "line 2: prompt is 'a blue square', but .* the keys are those of another set",
        ),
        ("key_A,key_B,VQ,A_model,B_model\n000002,000003,A,model0,model9\n", "line 2: B_model is 'model9'"),
        ("key_A,key_B,VQ,path_A\n000002,000003,A,000002.mp4\n", "line 2: path_A is '000002.mp4'"),
        ("key_A,key_B,VQ,MQ\n000002,000003,A\n", "line 2: it has not as many fields"),
        ("key_A,key_B,VQ\n000002,000003,A,B\n", "line 2: it has not as many fields"),
    ],
)
def test_references_that_name_other_videos_or_columns_twice_are_refused(numbers, tmp_path, table, message):
    (tmp_path / "r.csv").write_text(table)
    with pytest.raises(VideoAlignError, match=message):
        begin_with(numbers, tmp_path, references=str(tmp_path / "r.csv"))
    assert not (tmp_path / "votes.db").exists()


def test_references_in_the_form_of_pairs_csv_are_read(numbers, tmp_path):
    table = "key_A,key_B,prompt,A_model,B_model,VQ,,\n000002,000003,a red circle,model0,model1,A,,\n"
    (tmp_path / "r.csv").write_text(table)
    store = begin_with(numbers, tmp_path, references=str(tmp_path / "r.csv"))
    assert [row.key_b for row in store.pairs() if row.reference] == ["000003"]


def test_votes_are_used_with_no_other_set_even_one_with_the_same_keys(numbers, tmp_path, capsys):
    other = write_clips(tmp_path / "other", numbered(prompt="a blue square"))
    begin_with(numbers, tmp_path)
    for command, options in (("serve", {"port": 1}), ("export", {"out": tmp_path / "out"})):
        with pytest.raises(SystemExit):
            annotate(command, videos=other, db=tmp_path / "votes.db", **options)
        assert "is not the set that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- intervals of sources ---------------------------------------------------------------------------------------------


def test_a_sources_interval_holds_the_truth_also_where_pairs_share_prompts():
    """Ten pairs of each prompt, which has a chance of its own: taken for independent, they hold it in 3 of 4 cases."""
    rng, held, plainly = np.random.default_rng(0), [], []
    for _ in range(400):
        chances = np.repeat(rng.beta(1.5, 1.5, 30), 10)
        labels = [("a", "b", {"VQ": "A" if won else "B"}) for won in rng.random(300) < chances]
        for found, prompts in ((held, [str(i // 10) for i in range(300)]), (plainly, None)):
            low, high = sources(labels, ("VQ",), prompts)["a"]["VQ"]["interval"]
            found.append(low <= 0.5 <= high)
    assert 0.92 < np.mean(held) < 0.98
    assert np.mean(plainly) < 0.85


def test_pairs_that_say_the_same_are_worth_their_prompts():
    assert independent({"p": [1.0] * 10}) == 1
    assert independent({"p": [1.0, 0.0], "q": [0.0, 1.0]}) == 4
    assert independent({"p": [1.0] * 10, "q": [1.0]}) == 2
    assert independent({str(i): [float(i % 2)] for i in range(30)}) == pytest.approx(29)
    assert sources([("a", "b", {"VQ": "A"})] * 50, ("VQ",), ["p"] * 50)["a"]["VQ"]["interval"] == wilson(1, 1)


# --- spreadsheets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1dcmd", '=HYPERLINK("http://x")']
)
def test_texts_that_spreadsheets_would_run_are_neutral_in_the_table_for_people_alone(tmp_path, text):
    assert plain(text) == f"'{text}"
    assert plain(f"a{text}") == f"a{text}"
    assert plain("'quoted") == "'quoted"
    prompt, sources = f"{text} a cat", (f"{text}1", f"{text}2")
    videos = write_clips(tmp_path / "set", [("a", None, prompt, sources[0]), ("b", None, prompt, sources[1])])
    pair, digest = Pair(prompt, ("a", "b"), sources, "benchmark"), sha256(videos / "index.json")
    with new_round(tmp_path / "v.db", [pair], RatingProtocol(votes=1), digest) as half:
        half.invite("x")
        half.bring_in({1: [("x", dict.fromkeys(COLUMNS, "A"), [], 1.0)]})
    export(Store(tmp_path / "v.db"), ShardSet(videos), tmp_path / "out")
    with open(tmp_path / "out/decided.csv", newline="", encoding="utf-8-sig") as file:
        (row,) = csv.DictReader(file)
    assert (row["prompt"], row["source_A"], row["source_B"]) == tuple(f"'{one}" for one in (prompt, *sources))
    assert row["VQ"] == "A"
    (kept,) = Benchmark(tmp_path / "out/benchmark").rows  # what programs read
    assert (kept["prompt"], kept["A_model"]) == (prompt, sources[0])
    assert {content.record["prompt"] for content in ShardSet(tmp_path / "out/benchmark").contents()} == {prompt}


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def round_(numbers, tmp_path):
    """A round, and a client of its server that is called localhost."""
    (tmp_path / "rules.yaml").write_text("repeats: 0.0")
    store = begin(str(numbers), str(tmp_path / "votes.db"), 9, 0, 0, protocol=str(tmp_path / "rules.yaml"))
    app = make_app(store, ShardSet(numbers), "admin-secret", hosts={"localhost", "127.0.0.1", "[::1]", "rate.example"})
    with TestClient(app, "http://localhost:8000", headers={"content-type": "application/json"}) as client:
        yield store, client


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        (["localhost"], "localhost"),
        (["LOCALHOST:8000"], "localhost"),
        (["localhost."], "localhost"),
        (["[::1]:80"], "[::1]"),
        (["[::1]"], "[::1]"),
        (["127.0.0.1:1"], "127.0.0.1"),
        (["a@localhost"], ""),
        (["localhost:80:80"], ""),
        (["localhost/x"], ""),
        ([], ""),
        (["a", "a"], ""),
        ([""], ""),
        (["[::1"], ""),
        (["localhost evil"], ""),
        (["localhost:x"], ""),
    ],
)
def test_the_host_header_is_read_as_a_name_or_not_at_all(headers, name):
    assert host_of(headers) == name


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil.example:8000", "user@localhost", "", "127.0.0.1.nip.io", "[::2]"],
)
def test_a_host_that_the_server_was_not_told_is_served_nothing(round_, host):
    store, client = round_
    token = store.invite("a")
    before = store.task(store.who(token)).ticket
    for path in ("", "/", "/task", f"/video/{before}/left"):
        answer = client.get(f"/a/{token}{path}", headers={"host": host})
        assert answer.status_code == 400 and "--allow-host" in answer.text and "location" not in answer.headers
    for path in ("/static/rate.js", "/overview/admin-secret", "/nothing"):
        assert client.get(path, headers={"host": host}).status_code == 400
    sent = {"ticket": before, "choices": GOOD}
    assert client.post(f"/a/{token}/vote", json=sent, headers={"host": host}).status_code == 400
    assert store.votes() == {}
    assert client.post(f"/a/{token}/vote", json=sent, headers={"host": "rate.example"}).status_code == 200


def test_a_slash_too_many_is_served_and_redirects_nowhere(round_):
    store, client = round_
    token = store.invite("a")
    for path in (f"/a/{token}/", "/overview/admin-secret/"):
        answer = client.get(path, follow_redirects=False)
        assert answer.status_code == 200 and "location" not in answer.headers
    for path in (f"/a/{token}/task/", "/static", f"/a/{token}/vote/", "/a", "/a/"):
        answer = client.get(path, follow_redirects=False)
        assert answer.status_code in (404, 405) and "location" not in answer.headers


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"ticket": "%s", "choices": %s, "scores": {"A": {"VQ": NaN}}}', 422),
        ('{"ticket": "%s", "choices": %s, "scores": {"A": {"VQ": Infinity}}}', 422),
        ('{"ticket": "%s", "choices": %s, "scores": {"A": {"VQ": 1e999}}}', 422),
        ('{"ticket": "%s", "choices": %s, "more": NaN}', 422),
        ('{"ticket": "%s", "choices": {"VQ": NaN}}', 422),
        ('{"ticket": "\\ud800", "choices": %s}', 4),
        ('{"ticket": "%s", "choices": {"\\udfff": "A"}}', 4),
        ('{"ticket": "%s", "choices": {"VQ": "\\ud800", "MQ": "A", "TA": "A"}}', 4),
        ('{"ticket": "%s", "choices": %s, "flags": ["\\ud800"]}', 4),
        ('{"ticket": "%s", "choices": %s, "scores": {"A": {"VQ": ' + "9" * 4000 + "}}}", 4),
        ('{"ticket": "%s", "choices": %s, "scores": {"A": {"VQ": ' + "9" * 5000 + "}}}", 4),
        ('{"ticket": "%s", "choices": {"VQ": ' + "[" * 500 + "]" * 500 + "}}", 422),
        ("[" * 16_000, 4),
        ('{"a":' * 3000, 4),
        ("", 4),
        ("null", 4),
        ("[]", 4),
        ('{"ticket": "%s", "ticket": 5}', 422),
        ('"%s"', 422),
        ("NaN", 422),
        ("\ufeff{}", 4),
        ('{"ticket": "%s", "choices": "\\u0000"}', 422),
        (b"\xff\xfe{\x00}\x00", 4),
        ('{"ticket": "' + "x" * 20_000 + '"}', 413),
    ],
)
def test_a_vote_that_is_none_is_refused_in_a_sentence_without_a_traceback(round_, body, status, caplog):
    store, client = round_
    token = store.invite("a")
    if isinstance(body, str):
        body = (
            body.replace("%s", ballot(client, token)["ticket"], 1)
            .replace("%s", json.dumps(GOOD))
            .encode("utf-8", "surrogatepass")
        )
    answer = client.post(f"/a/{token}/vote", content=body)  # raises where the server would log a traceback
    assert answer.status_code == status or (status == 4 and 400 <= answer.status_code < 500)
    assert len(answer.json()["error"]) > 10
    assert store.votes() == {}
    assert "Traceback" not in caplog.text


def swept(path):
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def replaced(path):
    copy = path.with_name("copy.db")
    with sqlite3.connect(path) as file, sqlite3.connect(copy) as other:
        file.backup(other)
    os.replace(copy, path)


@pytest.mark.parametrize(
    "happens",
    [
        lambda path: path.unlink(),
        swept,
        replaced,
        lambda path: path.rename(path.with_name("away.db")),
        lambda path: path.with_name(path.name + "-wal").unlink(),
        lambda path: (swept(path), path.touch()),
    ],
)
def test_a_vote_into_a_file_that_nobody_finds_again_is_not_acknowledged(round_, happens):
    store, client = round_
    token = store.invite("a")
    sent = ballot(client, token)
    happens(store.path)
    names = sorted(path.name for path in store.path.parent.iterdir())
    answer = client.post(f"/a/{token}/vote", json=sent)
    assert answer.status_code == 503
    assert "was deleted or replaced while it was in use" in answer.json()["error"]
    assert str(store.path) not in answer.text
    with pytest.raises(StorageError):
        store.invite("b")
    assert names == sorted(path.name for path in store.path.parent.iterdir())  # and no new file was made in its place


def test_a_file_that_is_put_back_goes_on(round_):
    store, client = round_
    token = store.invite("a")
    sent = ballot(client, token)
    away = store.path.with_name("away.db")
    store.path.rename(away)
    assert client.get(f"/a/{token}/task").status_code == 503
    away.rename(store.path)
    assert client.post(f"/a/{token}/vote", json=sent).status_code == 200
    assert len(Store(store.path).votes()) == 1


def test_a_clock_that_is_set_back_makes_no_time_negative_and_no_order_wrong(round_, monkeypatch):
    store, _ = round_
    a, b = (person(store, name) for name in "ab")
    now, steady = time.time(), time.monotonic()
    at = SimpleNamespace(wall=now, steady=steady)
    monkeypatch.setattr(time, "time", lambda: at.wall)
    monkeypatch.setattr(time, "monotonic", lambda: at.steady)
    tickets = [store.task(a).ticket, store.task(b).ticket]
    at.wall, at.steady = now - 86_400, steady + 7  # a day back, seven seconds later
    store.vote(a, tickets[0], GOOD)
    again = Store(store.path)  # a server that began later knows the wall's clock only
    again.vote(b, tickets[1], GOOD)
    first, second = again.round().history
    assert (first["seconds"], second["seconds"]) == (7, 0)
    assert second["created"] > first["created"]
    shown = again.task(a)
    at.wall -= 86_400
    again.task(b)
    at.wall += 60 * again.protocol.hold_minutes + 1  # held from the setting on, not for a day more
    assert again.shown(a) == shown
    assert again.task(person(again, "c"))
    assert again.shown(a) is None


def test_a_flag_after_a_review_counts_also_when_the_clock_was_set_back(round_, monkeypatch):
    store, _ = round_
    people = [person(store, name) for name in "abcd"]
    reviewer = person(store, "r", "reviewer")
    for who, choice in zip(people[:3], "ABA"):
        shown = store.task(who)
        store.vote(who, shown.ticket, in_pair(store, shown, dict.fromkeys(COLUMNS, choice)))
    row = store.pairs()[0]
    assert row.state == "review"
    store.vote(reviewer, store.task(reviewer).ticket, dict.fromkeys(COLUMNS, "same"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    repetition = {"annotator_id": people[0].id, "pair_id": row.id, "occasion": 1, "order": 0, "ticket": "t"}
    store.file.write(lambda session: session.query(HoldRow).delete())
    store.file.write(lambda session: session.add(HoldRow(**repetition, since=now)))
    store.vote(people[0], "t", {}, flags=["unsafe"])
    assert store.decisions()[row.id].state == "unsafe"


@pytest.fixture
def running(numbers, tmp_path, monkeypatch):
    """What `annotate serve` starts, in a thread: (port, store)."""
    kept = {}
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda app, host, port: kept.update(app=app))
    monkeypatch.setattr(connections, "READ_SECONDS", 0.6)
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.6)
    serve_command(str(numbers), str(tmp_path / "votes.db"), validation=0, benchmark=0, per_prompt=9)
    server = server_of(kept["app"])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield listening.getsockname()[1], Store(tmp_path / "votes.db")
        server.should_exit = True
        thread.join()


def connect(port):
    found = socket.create_connection(("127.0.0.1", port))
    found.settimeout(5)
    return found


POST = "POST /a/{} /vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{{"


@pytest.mark.parametrize(
    "sent", ["", "GET / HT", "GET /a/{}/task HTTP/1.1\r\nHost: 127.0.0.1\r\n", POST.replace(" /vote", "/vote")]
)
def test_a_request_that_does_not_come_to_its_end_is_closed(running, sent, caplog):
    port, store = running
    text = sent.format(store.invite("a")).encode()
    with connect(port) as one, caplog.at_level(logging.INFO):
        one.sendall(text)
        start = time.monotonic()
        while time.monotonic() - start < 4:  # and goes on dripping
            time.sleep(0.1)
            try:
                one.sendall(b"a")
                one.setblocking(False)
                if one.recv(10) == b"":
                    break
            except BlockingIOError:
                continue
            except OSError:
                break
            finally:
                one.settimeout(5)
        assert 0.3 < time.monotonic() - start < 3
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
    assert store.votes() == {}


def test_the_second_request_of_a_connection_is_waited_for_no_longer_than_the_first(running):
    port, store = running
    whole = f"GET /a/{store.invite('a')}/task HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode()
    with connect(port) as one:
        for _ in range(2):
            one.sendall(whole)
            answer = b""
            while not answer.endswith(b"}"):  # headers and body may come apart
                answer += one.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.4)
        one.sendall(whole[:20])
        start = time.monotonic()
        assert one.recv(10) == b"" and 0.3 < time.monotonic() - start < 3


def test_headers_without_end_are_refused(running):
    port, _ = running
    with connect(port) as one:
        try:
            one.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000)
            answer = one.recv(1000)
        except ConnectionError:
            return
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_the_served_application_knows_its_names(running):
    port, store = running
    token = store.invite("a")
    url = f"http://127.0.0.1:{port}/a/{token}"
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 400


class Stuck:
    """A transport whose other end takes nothing."""

    def __init__(self):
        self.aborted = 0

    def abort(self):
        self.aborted += 1


def test_an_answer_that_nobody_reads_is_given_up(monkeypatch):
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.05)

    async def wait(resumes):
        one = connections.Impatient.__new__(connections.Impatient)
        one.transport, one.loop = Stuck(), asyncio.get_running_loop()
        one.flow = SimpleNamespace(pause_writing=int, resume_writing=int)
        one.pause_writing()
        if resumes:
            one.resume_writing()
        await asyncio.sleep(0.15)
        return one.transport.aborted

    assert asyncio.run(wait(False)) == 1
    assert asyncio.run(wait(True)) == 0


LOCAL = {"127.0.0.1", "localhost", "[::1]"}


@pytest.mark.parametrize(
    ("host", "allow_host", "more", "noted"),
    [
        ("0.0.0.0", [], set(), True),
        ("0.0.0.0", ["Rate.example", "10.0.0.7:8000"], {"rate.example", "10.0.0.7"}, False),
        ("::1", [], set(), False),
        ("box.lan", [], {"box.lan"}, False),
    ],
)
def test_the_server_answers_to_what_it_was_told(numbers, tmp_path, monkeypatch, capsys, host, allow_host, more, noted):
    seen = []
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda *given: None)
    monkeypatch.setattr("videoalign.annotation.server.make_app", lambda *given: seen.append(given[4]))
    options = {"videos": numbers, "db": tmp_path / "votes.db", "validation": 0, "benchmark": 0, "host": host}
    annotate("serve", **options, **({"allow_host": allow_host} if allow_host else {}))
    assert seen == [LOCAL | more]
    assert ("with --allow-host" in capsys.readouterr().err) is noted


@pytest.mark.parametrize("name", ["http://rate.example", "rate.example/path", "a b", "::1"])
def test_what_is_no_name_of_a_host_is_refused(numbers, tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        annotate("serve", videos=numbers, db=tmp_path / "votes.db", allow_host=name)
    assert f"--allow-host {name} is no name of a host" in capsys.readouterr().err
    assert not (tmp_path / "votes.db").exists()
