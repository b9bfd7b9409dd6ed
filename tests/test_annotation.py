"""Collecting preferences: pairs to rate, the rules, the file of votes, agreement, the server and the export."""

import contextlib
import itertools
import math
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import krippendorff
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from annotation_helpers import COLUMNS, GOOD, in_pair, person, rate
from videoalign import VideoAlignError
from videoalign.annotation.agreement import agreement, consistency, sources, wilson
from videoalign.annotation.overview import overview
from videoalign.annotation.pairing import Pair, choose, split_prompts
from videoalign.annotation.protocol import Decision, RatingProtocol, Vote, decide, flipped
from videoalign.annotation.store import Store, new_round
from videoalign.annotation.vote_file import StorageError
from videoalign.annotation.voting import RefusedVote
from videoalign.datamodules.contents import Content
from videoalign.datamodules.stores import LocalStore, StoredFile


def content(key, prompt, source):
    made = Content(key, StoredFile(LocalStore(Path()), "shard.tar"), 0, b"", {})
    made.record = {"prompt": prompt, "source": source}  # in place of that in a table of contents
    return made


def world(prompts=12, names="abcd", each=2):
    return [content(f"p{p:02d}{s}{i}", f"prompt {p}", s) for p in range(prompts) for s in names for i in range(each)]


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_are_of_one_prompt_and_two_sources_and_never_twice():
    contents = world()
    of = {c.key: c.record for c in contents}
    pairs = choose(contents, 5)
    assert len(pairs) == 60 == len({frozenset(pair.keys) for pair in pairs})
    for pair in pairs:
        a, b = (of[key] for key in pair.keys)
        assert a["prompt"] == b["prompt"] == pair.prompt and a["source"] != b["source"]
        assert pair.sources == (a["source"], b["source"])
    assert Counter(pair.prompt for pair in pairs) == {f"prompt {p}": 5 for p in range(12)}


def test_pairs_of_sources_are_in_balance_and_so_are_the_sides():
    pairs = choose(world(prompts=30), 4)
    met = Counter(frozenset(pair.sources) for pair in pairs)
    assert len(met) == 6 and max(met.values()) - min(met.values()) <= 1
    left = Counter(pair.sources[0] for pair in pairs)
    assert all(15 <= left[name] <= 45 for name in "abcd")


def test_the_seed_decides():
    contents = world()
    assert choose(contents, 3, seed=1) == choose(list(reversed(contents)), 3, seed=1) != choose(contents, 3, seed=2)


def test_pairs_of_sources_are_in_balance_in_each_split():
    pairs = choose(world(prompts=60), 1, (0.1, 0.2), seed=1)
    for split, count in {"train": 42, "validation": 6, "benchmark": 12}.items():
        met = Counter(frozenset(pair.sources) for pair in pairs if pair.split == split)
        assert set(met.values()) == {count // 6} and len(met) == 6


def test_no_prompt_is_in_two_splits():
    pairs = choose(world(prompts=20), 4, (0.1, 0.2), seed=3)
    of = {}
    for pair in pairs:
        of.setdefault(pair.split, set()).add(pair.prompt)
    assert {name: len(prompts) for name, prompts in of.items()} == {"train": 14, "validation": 2, "benchmark": 4}
    assert not any(a & b for a, b in itertools.combinations(of.values(), 2))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.2), (1.0, 0.0), (math.nan, 0.1), (0.1, math.nan)])
def test_shares_that_leave_nothing_are_refused(shares):
    with pytest.raises(VideoAlignError, match="shares"):
        split_prompts(["a", "b", "c"], shares, 0)


def test_one_source_alone_is_nothing_to_compare():
    with pytest.raises(VideoAlignError, match="two different sources"):
        choose(world(names="a"), 2)


def test_a_video_without_a_source_is_refused():
    with pytest.raises(VideoAlignError, match="names no source"):
        choose([content("a", "p", "x"), content("b", "p", "")], 1)


def test_prompts_with_few_videos_give_what_they_have():
    contents = [content("a", "short", "x"), content("b", "short", "y"), *world(prompts=1)]
    assert Counter(pair.prompt for pair in choose(contents, 9)) == {"short": 1, "prompt 0": 9}


# --- rules ----------------------------------------------------------------------------------------------------------


def said(*choices, review=False, flags=(), annotator="x", scores=None):
    return Vote(annotator, dict(zip(COLUMNS, choices)), scores or {}, flags, review, 5.0, 0.0)


def test_three_equal_votes_decide_and_two_do_not():
    votes = [said("A", "same", "B")] * 3
    assert decide(votes, RatingProtocol()) == Decision("done", {"VQ": "A", "MQ": "same", "TA": "B"})
    assert decide(votes[:2], RatingProtocol()).state == "open"


def test_of_columns_in_which_votes_differ_the_reviewer_decides():
    votes = [said("A", "A", "A"), said("A", "B", "A"), said("A", "same", "A")]
    assert decide(votes, RatingProtocol()).state == "review"
    labels = decide([*votes, said("B", "B", "B", review=True)], RatingProtocol()).labels
    assert labels == {"VQ": "A", "MQ": "B", "TA": "A"}


def test_an_unsafe_pair_is_dropped_unless_the_reviewer_says_otherwise():
    votes = [said("A", "A", "A"), said(flags=("unsafe",)), said("A", "A", "A")]
    assert decide(votes, RatingProtocol()) == Decision("unsafe", {})
    # too few for dropping it, too few for a label
    assert decide(votes, RatingProtocol(unsafe_votes=2)).state == "review"
    twice = [said("A", "A", "A"), said(flags=("unsafe", "unsafe")), said("A", "A", "A")]
    assert decide(twice, RatingProtocol(unsafe_votes=2)).state == "review"  # one person counts once
    reviewed = decide([*votes, said("A", "B", "A", review=True)], RatingProtocol())
    assert reviewed.labels == {"VQ": "A", "MQ": "B", "TA": "A"}
    broken = [said("A", "A", "A")] * 3 + [said(flags=("broken",), review=True)]
    assert decide(broken, RatingProtocol()).state == "broken"


def test_a_flag_on_a_repetition_counts_and_its_choices_do_not():
    votes, again = [said("A", "A", "A", annotator=name) for name in "abc"], [said("B", "B", "B", annotator="a")]
    assert decide(votes, RatingProtocol(), again).labels["VQ"] == "A"
    flagged = [said(flags=("unsafe",), annotator="a")]
    assert decide(votes, RatingProtocol(), flagged) == Decision("unsafe", {})
    both = [said("A", "A", "A", flags=("unsafe",), annotator="a"), *votes[1:]]
    assert decide(both, RatingProtocol(unsafe_votes=2), flagged).state == "review"  # one person counts once
    assert decide(votes, RatingProtocol(unsafe_votes=2), flagged).state == "review"


def test_a_flag_after_the_review_counts_and_one_before_it_was_decided():
    votes = [said("A", "A", "A"), said("B", "A", "A"), said("A", "A", "A")]
    review = replace(said("same", "A", "A", review=True), created=5.0)
    for when, state in ((4.0, "done"), (6.0, "unsafe")):
        flagged = replace(said(flags=("unsafe",)), created=when)
        assert decide([*votes, review], RatingProtocol(), [flagged]).state == state


def test_a_vote_that_is_taken_back_after_the_review_opens_the_pair_again():
    votes = [said("A", "A", "A"), said("B", "A", "A"), said("A", "A", "A"), said("same", "A", "A", review=True)]
    assert decide(votes, RatingProtocol()).labels["VQ"] == "same"
    assert decide(votes[1:], RatingProtocol()).state == "open"


def test_flipping_twice_is_nothing():
    choices = {"VQ": "A", "MQ": "same", "TA": "B"}
    assert flipped(choices) == {"VQ": "B", "MQ": "same", "TA": "A"}
    assert flipped(flipped(choices)) == choices


WRONG_RULES = [
    {"votes": 0}, {"votes": True}, {"votes": 1.5}, {"overall": "no"}, {"scores": 1}, {"repeats": 1.0},
    {"training_pass": 2}, {"hold_minutes": 0},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_RULES)
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(VideoAlignError, match="protocol"):
        RatingProtocol(**wrong)


def test_unknown_rules_are_refused():
    with pytest.raises(VideoAlignError, match="protocol"):
        RatingProtocol.of({"vote": 3})


# --- agreement --------------------------------------------------------------------------------------------------------


def test_alpha_is_the_librarys_on_the_whole_matrix():
    rng = random.Random(0)
    matrix = [[rng.choice(["A", "same", "B", None]) for _ in range(40)] for _ in range(3)]
    votes = {i: [said(row[i], "A", "A") for row in matrix if row[i]] for i in range(40)}
    place = {"B": 0, "same": 1, "A": 2, None: np.nan}
    values = np.array([[place[v] for v in row] for row in matrix], float)
    expected = krippendorff.alpha(values, level_of_measurement="ordinal")
    assert agreement(votes, "VQ")["alpha"] == pytest.approx(expected)


def test_raw_agreement_by_counting():
    votes = {0: [said("A", "A", "A"), said("A", "A", "A"), said("B", "A", "A")], 1: [said("same", "A", "A")]}
    found = agreement(votes, "VQ")
    assert found["raw"] == pytest.approx(1 / 3)
    assert found["ties"] == pytest.approx(1 / 4)
    assert found["votes"] == 4


def test_a_reviewers_votes_are_not_independent_ones():
    votes = {0: [said("A", "A", "A"), said("A", "A", "A"), said("B", "B", "B", review=True)]}
    assert agreement(votes, "VQ")["raw"] == 1.0


def test_agreement_of_nothing_is_unknown():
    assert math.isnan(agreement({}, "VQ")["alpha"])
    assert math.isnan(agreement({0: [said("A", "A", "A")]}, "VQ")["raw"])


def test_consistency_compares_a_person_with_itself():
    first = {0: [said("A", "A", "A", annotator="x"), said("B", "B", "B", annotator="y")]}
    again = {0: [said("A", "A", "B", annotator="x")]}
    assert consistency(first, again, COLUMNS) == {"x": {"share": pytest.approx(2 / 3), "choices": 3}}


def test_wilson_of_textbook_numbers():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_sources_win_and_lose_in_the_same_pairs():
    found = sources([("a", "b", {"VQ": "A"}), ("b", "a", {"VQ": "same"}), ("a", "c", {"VQ": "B"})], ("VQ",))
    assert {source: row["VQ"]["wins"] for source, row in found.items()} == {"a": 0.5, "b": 0.25, "c": 1.0}
    assert found["a"]["VQ"]["pairs"] == 3
    assert sources([("a", "a", {"VQ": "A"}), ("", "", {"VQ": "A"})], ("VQ",)) == {}  # nothing is compared


# --- the file ---------------------------------------------------------------------------------------------------------


def pairs(count):
    return [Pair(f"prompt {i}", (f"{i}a", f"{i}b"), ("x", "y"), "train") for i in range(count)]


def begun(path, pairs, references=(), **rules):
    with new_round(path, pairs, RatingProtocol(**rules), "data", references):
        pass
    return Store(path)


@pytest.fixture
def store(tmp_path):
    return begun(tmp_path / "votes.db", pairs(6), repeats=0.0)


def test_votes_are_stored_in_the_pairs_own_sides(store):
    people = [person(store, name) for name in "abc"]
    expected = {}
    for who in people:
        for _ in range(6):
            task = rate(store, who)
            expected.setdefault(task.pair_id, []).append(in_pair(store, task, GOOD))
    found = {pair: [vote.choices for vote in votes] for pair, votes in store.votes().items()}
    assert found == expected
    assert len(found) == 6
    assert any(vote != GOOD for votes in found.values() for vote in votes)  # sides do differ


def test_a_person_sees_the_same_pair_until_it_is_rated_and_never_again(store):
    who = person(store, "a")
    assert store.task(who) == store.task(who)
    seen = [rate(store, who).pair_id for _ in range(6)]
    assert len(set(seen)) == 6
    assert store.task(who) is None


def test_no_more_votes_than_wanted_are_collected(store):
    people = [person(store, f"p{i}") for i in range(5)]
    count = 0
    while any(tasks := [store.task(who) for who in people]):
        for who, task in zip(people, tasks):
            if task:
                store.vote(who, task.ticket, GOOD)
                count += 1
    assert count == 18
    assert all(len(votes) == 3 for votes in store.votes().values())


def test_a_ticket_is_good_for_one_vote(store):
    who = person(store, "a")
    task = rate(store, who)
    with pytest.raises(RefusedVote, match="not on your screen"):
        store.vote(who, task.ticket, GOOD)
    assert len(store.votes()) == 1


def test_a_ticket_is_good_for_one_person(store):
    a, b = person(store, "a"), person(store, "b")
    task = store.task(a)
    store.task(b)
    with pytest.raises(RefusedVote):
        store.vote(b, task.ticket, GOOD)


@pytest.mark.parametrize(
    ("choices", "more"),
    [
        ({"VQ": "A"}, {}),
        ({**GOOD, "TA": "C"}, {}),
        ({**GOOD, "XX": "A"}, {}),
        (GOOD, {"flags": ["funny"]}),
        (GOOD, {"scores": {"A": {"VQ": 6}}}),
        (GOOD, {"scores": {"C": {"VQ": 3}}}),
        (GOOD, {"scores": {"A": {"VQ": True}}}),
        ([], {}),
    ],
)
def test_what_is_no_vote_is_refused_and_leaves_nothing(store, choices, more):
    who = person(store, "a")
    task = store.task(who)
    with pytest.raises(RefusedVote):
        store.vote(who, task.ticket, choices, **more)
    assert store.votes() == {}
    assert store.task(who) == task


def test_undo_takes_the_last_vote_back_and_keeps_it_on_record(store):
    who = person(store, "a")
    first, second = rate(store, who), rate(store, who)
    assert store.undo(who)
    again = store.task(who)
    assert (again.pair_id, again.left) == (second.pair_id, second.left)
    assert again.ticket != second.ticket
    assert {*store.votes()} == {first.pair_id}
    store.vote(who, again.ticket, {**GOOD, "VQ": "B"})
    assert in_pair(store, again, {**GOOD, "VQ": "B"}) == store.votes()[second.pair_id][0].choices
    with sqlite3.connect(store.path) as file:
        assert file.execute("select count(*) from votes").fetchone() == (3,)


def test_undo_of_nothing_is_nothing(store):
    assert not store.undo(person(store, "a"))


def test_a_revoked_link_opens_nothing(store):
    token = store.invite("a")
    assert store.who(token).name == "a"
    assert store.who("x" + token[1:]) is None
    store.revoke("a")
    assert store.who(token) is None
    with pytest.raises(VideoAlignError, match="no annotator"):
        store.revoke("b")


def test_a_lost_link_is_replaced_by_a_new_one_of_the_same_person(store):
    old = store.who(store.invite("a"))
    store.revoke("a")
    with pytest.raises(VideoAlignError, match="already"):
        store.invite("a", "reviewer")
    assert store.who(store.invite("a")) == old


def test_links_are_kept_as_hashes_only(store):
    token = store.invite("a")
    assert token.encode() not in b"".join(path.read_bytes() for path in store.path.parent.glob("votes.db*"))


def test_reviewers_see_what_is_disputed(store):
    people = [person(store, name) for name in "abc"]
    for who in people:
        for _ in range(6):
            task = store.task(who)
            choices = {**GOOD, "VQ": "B" if who.name == "c" and task.pair_id <= 2 else "A"}
            store.vote(who, task.ticket, in_pair(store, task, choices))
    reviewer = person(store, "r", "reviewer")
    seen = []
    while task := store.task(reviewer):
        assert task.kind == "review"
        seen.append(task.pair_id)
        store.vote(reviewer, task.ticket, in_pair(store, task, {**GOOD, "VQ": "same"}))
    assert seen == [1, 2]
    decisions = store.decisions()
    assert all(d.state == "done" for d in decisions.values())
    assert [decisions[i].labels["VQ"] for i in (1, 2, 3)] == ["same", "same", "A"]


def test_work_begins_when_the_training_round_is_passed(tmp_path):
    references = [(pair, {"VQ": "A", "MQ": "A", "TA": "A"}) for pair in pairs(2)]
    store = begun(tmp_path / "t.db", pairs(3), references, training_pass=0.7, repeats=0.0)
    who = person(store, "a")
    for wrong in (True, False):
        for _ in range(2):
            task = store.task(who)
            assert task.kind == "training"
            choices = in_pair(store, task, dict.fromkeys(COLUMNS, "B" if wrong else "A"))
            reference = store.vote(who, task.ticket, choices)
            assert (reference == choices) is not wrong
    assert store.task(who).kind == "work"
    assert not store.undo(who)  # the answers were shown: they stay
    assert store.votes() == {}  # training counts for nothing else
    assert len(store.decisions()) == 3


def test_some_pairs_come_again_with_the_sides_exchanged(tmp_path):
    store = begun(tmp_path / "t.db", pairs(60), repeats=0.1, repeat_after=5)
    who, seen, again = person(store, "a"), {}, {}
    while task := store.task(who):
        (again if task.pair_id in seen else seen)[task.pair_id] = task.left
        store.vote(who, task.ticket, in_pair(store, task, GOOD))
    assert len(seen) == 60 and 4 <= len(again) <= 7
    assert all(seen[pair] != left for pair, left in again.items())
    assert consistency(store.votes(), store.votes(1), COLUMNS)["a"]["share"] == 1.0


def test_an_unsafe_pair_is_dropped_where_the_flag_came_on_a_repetition(tmp_path):
    store = begun(tmp_path / "t.db", pairs(8), votes=1, repeats=0.3, repeat_after=1)
    who, seen = person(store, "a"), set()
    while (task := store.task(who)).pair_id not in seen:
        seen.add(task.pair_id)
        store.vote(who, task.ticket, GOOD)
    assert store.decisions()[task.pair_id].state == "done"
    store.vote(who, task.ticket, {}, flags=["unsafe"])
    assert store.decisions()[task.pair_id].state == "unsafe"
    assert {row.id: row.state for row in store.pairs()}[task.pair_id] == "unsafe"
    assert store.undo(who)
    assert store.decisions()[task.pair_id].state == "done"


def test_what_a_reviewer_has_decided_no_annotator_takes_back(tmp_path):
    store = begun(tmp_path / "t.db", pairs(1), repeats=0.0)
    people = [person(store, name) for name in "abc"]
    for who, choice in zip(people, "AAB"):
        task = store.task(who)
        store.vote(who, task.ticket, in_pair(store, task, dict.fromkeys(COLUMNS, choice)))
    assert store.undo(people[2])  # not reviewed yet
    task = store.task(people[2])
    store.vote(people[2], task.ticket, in_pair(store, task, dict.fromkeys(COLUMNS, "B")))
    reviewer = person(store, "r", "reviewer")
    rate(store, reviewer, dict.fromkeys(COLUMNS, "same"))
    with pytest.raises(RefusedVote, match="a reviewer has decided"):
        store.undo(people[2])
    assert store.decisions()[1].labels == dict.fromkeys(COLUMNS, "same")
    assert store.undo(reviewer)
    assert store.undo(people[2])


def test_the_overview_leaves_flagged_votes_out_of_agreement_and_counts_training(tmp_path):
    references = [(pair, dict.fromkeys(COLUMNS, "A")) for pair in pairs(2)]
    store = begun(tmp_path / "t.db", pairs(1), references, repeats=0.0, unsafe_votes=3, training_pass=1.0)
    a, b = person(store, "a"), person(store, "b")
    for who, rounds in ((a, "BA"), (b, "A")):
        for choice in rounds:
            for _ in range(2):
                task = store.task(who)
                store.vote(who, task.ticket, in_pair(store, task, dict.fromkeys(COLUMNS, choice)))
    rate(store, a, GOOD, flags=["unsafe"])
    rate(store, b, GOOD)
    found = {row["name"]: row for row in overview(store.round())["people"]}
    assert {name: row["training"] for name, row in found.items()} == {"a": 2, "b": 1}
    assert found["a"]["agrees"] is None
    assert found["a"]["ties"] is None
    assert found["b"]["ties"] == pytest.approx(1 / 3)


def test_a_pair_that_was_left_on_a_screen_goes_to_somebody_else(tmp_path, monkeypatch):
    store = begun(tmp_path / "t.db", pairs(1), votes=1, hold_minutes=1)
    a, b = person(store, "a"), person(store, "b")
    task = store.task(a)
    assert store.task(b) is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 90)
    other = store.task(b)
    assert other.pair_id == task.pair_id
    store.vote(b, other.ticket, GOOD)
    with pytest.raises(RefusedVote):
        store.vote(a, task.ticket, GOOD)


def test_priorities_decide_the_order(store):
    store.prioritise([6, 3])
    who = person(store, "a")
    assert [rate(store, who).pair_id for _ in range(6)] == [6, 3, 1, 2, 4, 5]
    store.prioritise([2, 1])
    other = person(store, "b")
    assert [rate(store, other).pair_id for _ in range(6)] == [2, 1, 6, 3, 4, 5]


def test_what_others_began_is_finished_first(store):
    a, b = person(store, "a"), person(store, "b")
    store.prioritise([4, 5])
    assert [rate(store, a).pair_id for _ in range(2)] == [4, 5]
    store.prioritise([1, 5])
    assert [rate(store, b).pair_id for _ in range(3)] == [5, 4, 1]


def test_what_stands_beside_a_pair_is_what_its_votes_decide(tmp_path):
    references = [(pairs(1)[0], dict.fromkeys(COLUMNS, "A"))]
    store = begun(tmp_path / "t.db", pairs(8), references, repeats=0.1, repeat_after=2, training_pass=0.0)
    rng = random.Random(5)
    people = [person(store, f"p{i}") for i in range(4)] + [person(store, "r", "reviewer")]
    seen = set()
    for _ in range(150):
        who = rng.choice(people)
        if rng.random() < 0.15:
            with contextlib.suppress(RefusedVote):  # a reviewer has decided
                store.undo(who)
        elif task := store.task(who):
            flags = ["unsafe"] if rng.random() < 0.05 else []
            store.vote(who, task.ticket, {column: rng.choice("AB") for column in COLUMNS}, flags=flags)
        votes, decisions = store.votes(), store.decisions()
        for row in store.pairs()[1:]:
            assert row.votes == sum(not vote.review for vote in votes.get(row.id, []))
            assert row.state == decisions[row.id].state
            seen.add(row.state)
        found = store.progress(who)
        assert found["open"] == sum(d.state == "open" for d in decisions.values())
        assert found["review"] == sum(d.state == "review" for d in decisions.values())
        assert found["pairs"] == 8
    assert seen == {"open", "review", "done", "unsafe"}
    assert store.pairs()[0].state == "training"


def test_the_log_of_a_removed_file_does_not_come_back(store):
    """SQLite would play it into the new file."""
    with sqlite3.connect(store.path) as file:
        file.execute("select 1 from pairs").fetchall()
        person(store, "a")
        store.path.unlink()  # as `rm` does while the server runs
        with pytest.raises(VideoAlignError, match=r"votes\.db-\w+ is left of a file .* removed"):
            begun(store.path, pairs(2))
    assert not store.path.exists()


def test_a_file_may_have_any_name(tmp_path):
    path = tmp_path / "votes?mode=memory %20#1.db"
    store = begun(path, pairs(2))
    rate(store, person(store, "a"))
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(("-wal", "-shm"))] == [path.name]
    assert len(Store(path).votes()) == 1


def test_of_two_that_begin_at_once_the_second_is_refused(tmp_path):
    with (
        pytest.raises(VideoAlignError, match="exists already"),
        new_round(tmp_path / "t.db", pairs(3), RatingProtocol(), "slow"),
    ):
        begun(tmp_path / "t.db", pairs(2))
    assert len(Store(tmp_path / "t.db").pairs()) == 2


def test_what_was_dropped_does_not_come_again(tmp_path):
    store = begun(tmp_path / "t.db", pairs(30), repeats=0.5, repeat_after=1)
    a, b = person(store, "a"), person(store, "b")
    first = rate(store, a)
    task = rate(store, b, choices={}, flags=["unsafe"])
    assert task.pair_id == first.pair_id
    seen = []
    while task := store.task(a):
        seen.append(task.pair_id)
        store.vote(a, task.ticket, GOOD)
    assert len(seen) > 40
    assert first.pair_id not in seen


def test_a_moment_of_the_round_fits_together(store):
    who = person(store, "a")
    for _ in range(3):
        rate(store, who)
    found = store.round()
    rate(store, who)
    assert sum(map(len, found.votes.values())) == len(found.history) == 3
    assert len(found.pairs) == len(found.decisions) == 6
    assert [p["name"] for p in found.people] == ["a"]
    assert found.protocol == store.protocol


def test_a_round_that_fails_to_begin_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), new_round(tmp_path / "t.db", pairs(3), RatingProtocol(), "data") as store:
        store.invite("a")
        raise KeyError
    assert not (tmp_path / "t.db").exists()
    with pytest.raises(VideoAlignError, match="no such file"):
        Store(tmp_path / "t.db")
    assert len(begun(tmp_path / "t.db", pairs(2)).pairs()) == 2
    assert [path.name for path in tmp_path.iterdir() if "t.db" not in path.name or "partial" in path.name] == []


def test_a_round_begins_once_and_names_are_unique(store):
    with pytest.raises(VideoAlignError, match="already"):
        begun(store.path, pairs(1))
    store.invite("a")
    with pytest.raises(VideoAlignError, match="already"):
        store.invite("a")
    with pytest.raises(VideoAlignError, match="role"):
        store.invite("b", "boss")


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    with pytest.raises(VideoAlignError, match="no such file"):
        Store(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 100)
    with pytest.raises(VideoAlignError, match=r"text\.db"):
        Store(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "other.db").execute("create table x (y)").connection.close()
    with pytest.raises(VideoAlignError, match=r"other\.db is no file of annotations"):
        Store(tmp_path / "other.db")
    sqlite3.connect(tmp_path / "meta.db").execute("create table meta (name, value)").connection.close()
    with pytest.raises(VideoAlignError, match=r"meta\.db is no file of annotations"):
        Store(tmp_path / "meta.db")


def test_a_locked_file_says_so(store, monkeypatch):
    who = person(store, "a")
    task = store.task(who)
    holder = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("videoalign.annotation.vote_file.BUSY_MS", 100)
    try:
        fresh = Store(store.path)  # reading waits for nobody
        assert fresh.task(who) == task
        assert fresh.votes() == {}
        with pytest.raises(StorageError, match="locked: another program"):
            fresh.vote(who, task.ticket, GOOD)
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    store.vote(who, task.ticket, GOOD)
    assert len(store.votes()) == 1


def test_a_full_disk_stores_nothing_and_loses_nothing(store):
    who = person(store, "a")
    rate(store, who)
    task = store.task(who)
    with store.file.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.rollback()
    with pytest.raises(StorageError, match="full"):
        fill(store, pages)
    assert len(store.votes()) == 1
    assert store.task(who) == task
    store.vote(who, task.ticket, GOOD)
    assert len(store.votes()) == 2


def fill(store, pages):
    """Votes with long texts into a file that may not grow."""
    from sqlalchemy import event

    def small(connection, _):
        connection.execute(f"PRAGMA max_page_count={pages}")

    store.file.engine.dispose()
    event.listen(store.file.engine, "connect", small)
    try:
        for i in range(2000):
            store.invite("x" * 1000 + str(i))
    finally:
        event.remove(store.file.engine, "connect", small)
        store.file.engine.dispose()


def test_many_at_once_lose_nothing_and_do_nothing_twice(tmp_path):
    store = begun(tmp_path / "t.db", pairs(20), repeats=0.0)
    people = [person(store, f"p{i}") for i in range(10)]
    acknowledged, lock = [], threading.Lock()

    def at_work(who):
        mine = Store(store.path)
        while task := mine.task(who):
            mine.vote(who, task.ticket, GOOD)
            with lock:
                acknowledged.append((who.name, task.pair_id))

    threads = [threading.Thread(target=at_work, args=(who,)) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = [(vote.annotator, pair) for pair, votes in store.votes().items() for vote in votes]
    assert len(acknowledged) == 60
    assert sorted(stored) == sorted(acknowledged)
    assert all(len(votes) == 3 for votes in store.votes().values())


def test_progress_counts(store):
    who = person(store, "a")
    rate(store, who)
    rate(store, who, choices={}, flags=["unsafe"])
    found = store.progress(who)
    assert found == {
        "kind": "work", "done": 2, "total": 6, "mine": 2, "last_hour": 2, "pairs": 6, "open": 5, "review": 0,
    }  # fmt: skip


def test_registering_the_commands_imports_nothing_heavy():
    """`--help` names all commands, and must not wait for libraries that a command needs only when it runs."""
    script = """
import argparse, sys
from videoalign.annotation.commands import register
register(argparse.ArgumentParser().add_subparsers())
print(*{"torch", "numpy", "sqlalchemy", "fastapi", "uvicorn", "krippendorff"} & sys.modules.keys())
import videoalign.annotation.serving, videoalign.annotation.label_studio
print(*{"transformers", "peft", "diffusers", "lightning"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", ""]
