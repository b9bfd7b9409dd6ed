"""Rounds of single videos and of rankings: answers, what they decide, agreement, the page's server, exports."""

import csv
import itertools
import json
import random
import sqlite3
import sys
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from fastapi.testclient import TestClient
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from annotation_helpers import annotate, person, task_of, write_clips
from videoalign import VideoAlignError
from videoalign.annotation.agreement import SCORE_SCALE, agreement, concordance
from videoalign.annotation.answers import ANSWERS, LETTERS, choice_of, inverse, order_of, ranked, ranks
from videoalign.annotation.beginning import begin
from videoalign.annotation.compared import in_pairs
from videoalign.annotation.export import export
from videoalign.annotation.grouping import choose_groups
from videoalign.annotation.label_studio import import_label_studio
from videoalign.annotation.overview import overview
from videoalign.annotation.pairing import Pair
from videoalign.annotation.protocol import Decision, RatingProtocol, Vote, decide
from videoalign.annotation.rehearsal import SimulatedPerson, rehearse
from videoalign.annotation.server import make_app
from videoalign.annotation.store import Store, new_round
from videoalign.annotation.voting import RefusedVote
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.ratings import single_scores
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.verify import verify

RANKING = RatingProtocol(kind="ranking", repeats=0.0)
SINGLE = RatingProtocol(kind="single", repeats=0.0)


def every_ranking(count):
    """All rankings of some videos, ties included."""
    by = itertools.product(range(count), repeat=count)
    return sorted({ranked(dict(zip(LETTERS, row))) for row in by})


# --- answers ----------------------------------------------------------------------------------------------------------


def test_there_are_as_many_rankings_as_weak_orders():
    assert [len(every_ranking(count)) for count in (2, 3, 4)] == [3, 13, 75]  # Fubini numbers
    assert all(ANSWERS["ranking"].is_one(text, 4) for text in every_ranking(4))


@pytest.mark.parametrize("text", ["", "A", "A>B", "A>B>C>D", "A>B>B", "B=A>C", "A>>C>B", "a>b>c", "A>B>C\n", "A B C"])
def test_what_is_no_ranking_of_three_is_refused(text):
    assert not ANSWERS["ranking"].is_one(text, 3)


def test_orders_of_a_screen_are_all_permutations_and_have_inverses():
    for count in (1, 2, 3, 4):
        orders = {order_of(number, count) for number in range(len([*itertools.permutations(range(count))]))}
        assert orders == {*itertools.permutations(range(count))}
        assert all(tuple(order[i] for i in inverse(order)) == tuple(range(count)) for order in orders)
    assert order_of(0, 4) == (0, 1, 2, 3)


def test_a_ranking_on_a_screen_says_the_same_of_each_pair_of_videos():
    rankings = ANSWERS["ranking"]
    for text, order in itertools.product(every_ranking(3), itertools.permutations(range(3))):
        own = rankings.turned(text, order)
        for i, j in itertools.permutations(range(3), 2):
            assert choice_of(text, LETTERS[i], LETTERS[j]) == choice_of(own, LETTERS[order[i]], LETTERS[order[j]])
        assert rankings.turned(own, inverse(order)) == text


def said(kind, *choices, flags=(), review=False, annotator="x", created=0.0):
    columns = dict(zip(("VQ", "MQ", "TA"), choices * 3 if len(choices) == 1 else choices))
    return Vote(annotator, columns, {}, flags, review, 5.0, created)


def test_of_rankings_a_majority_decides_pair_by_pair_and_a_reviewer_the_rest():
    votes = [said("r", text) for text in ("A>B>C", "A>C>B", "B=C>A")]
    assert decide(votes, RANKING).state == "review"  # of B and C, each choice has one vote
    found = decide([*votes, said("r", "C>B>A", review=True)], RANKING)
    assert found.state == "done"
    assert {name: label for name, label in found.labels.items() if name.startswith("VQ")} == {
        "VQ AB": "A", "VQ AC": "A", "VQ BC": "B",
    }  # fmt: skip


def brute(votes):
    """Labels by counting, None where no choice has more than half."""
    found = {}
    for a, b in itertools.combinations("ABC", 2):
        every = [choice_of(vote.choices["VQ"], a, b) for vote in votes]
        best = max(every, key=every.count)
        found[f"VQ {a}{b}"] = best if 2 * every.count(best) > len(every) else None
    return found


def test_majorities_of_rankings_by_brute_force():
    rng, states = random.Random(0), set()
    for _ in range(200):
        votes = [said("r", rng.choice(every_ranking(3))) for _ in range(3)]
        review = said("r", rng.choice(every_ranking(3)), review=True)
        expected, found = brute(votes), decide(votes, RANKING)
        states.add(found.state)
        assert found.state == ("review" if None in expected.values() else "done")
        labels = decide([*votes, review], RANKING).labels
        for name, label in expected.items():
            assert labels[name] == (label or choice_of(review.choices["VQ"], name[-2], name[-1]))
    assert states == {"done", "review"}


def test_single_videos_are_done_without_agreement_and_dropped_when_unsafe():
    votes = [said("s", score) for score in "135"]
    assert decide(votes[:2], SINGLE).state == "open"
    assert decide(votes, SINGLE) == Decision("done", {})
    assert decide([*votes[:2], said("s", flags=("unsafe",))], SINGLE).state == "unsafe"
    two = RatingProtocol(kind="single", unsafe_votes=2)
    assert decide([*votes[:2], said("s", "1", flags=("unsafe",))], two).state == "review"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "stars"},
        {"kind": ["pairs"]},
        {"ranked": 7},
        {"ranked": 1},
        {"ranked": True},
        {"dimensions": False},
        {"kind": "single", "scores": True},
        {"dimensions": 1},
    ],
)
def test_rules_of_kinds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(VideoAlignError, match="protocol"):
        RatingProtocol(**wrong)


def test_the_overall_choice_can_be_asked_alone():
    assert RatingProtocol(dimensions=False, overall=True).columns == ("Overall",)
    assert RatingProtocol(overall=True).columns == ("VQ", "MQ", "TA", "Overall")


# --- agreement --------------------------------------------------------------------------------------------------------


def test_alphas_of_scores_are_the_librarys():
    rng = np.random.default_rng(0)
    matrix = rng.integers(1, 6, (3, 40)).astype(float)
    matrix[:, :20] = matrix[0, :20]
    matrix[rng.random(matrix.shape) < 0.2] = np.nan
    votes = {i: [said("s", str(int(v))) for v in column if not np.isnan(v)] for i, column in enumerate(matrix.T)}
    found = agreement(votes, "VQ", SCORE_SCALE)
    assert found["alpha"] == pytest.approx(krippendorff.alpha(matrix, level_of_measurement="ordinal"))
    assert found["interval"] == pytest.approx(krippendorff.alpha(matrix, level_of_measurement="interval"))


def test_kendalls_tau_is_scipys_mean_over_raters():
    votes = {1: [said("r", text) for text in ("A>B>C", "A>C>B", "A=B=C")], 2: [said("r", "A>B"), said("r", "B>A")]}
    tau = stats.kendalltau([1, 2, 3], [1, 3, 2]).statistic
    assert concordance(votes, "VQ") == pytest.approx((tau - 1) / 2)  # the ranking without an order is left out
    assert np.isnan(concordance({1: [said("r", "A>B")]}, "VQ"))


# --- what is rated ----------------------------------------------------------------------------------------------------


def clips(folder, prompts=4, sources="xyz", each=1):
    rows = [(f"p{p}{s}{i}", None, f"prompt {p}", s) for p in range(prompts) for s in sources for i in range(each)]
    return write_clips(folder, rows)


def test_groups_are_of_one_prompt_disjoint_and_of_different_sources_first(tmp_path):
    contents = [*ShardSet(clips(tmp_path / "set", sources="xy", each=3)).contents()]
    groups = choose_groups(contents, 4)
    keys = [key for group in groups for key in group.keys]
    assert len(keys) == len({*keys}) == 24  # 4 prompts of 6 videos: groups of 4 and of 2
    assert sorted(map(len, (group.keys for group in groups))) == [2] * 4 + [4] * 4
    assert all({*group.sources} == {"x", "y"} for group in groups)
    assert choose_groups(contents[::-1], 4) == groups != choose_groups(contents, 4, seed=1)
    assert [len(group.keys) for group in choose_groups(contents, 1)] == [1] * 24
    assert len(choose_groups(contents, 4, 1)) == 4
    with pytest.raises(VideoAlignError, match="nothing to rank"):
        choose_groups([c for c in contents if c.key.endswith("x0")], 4)


def begun(tmp_path, rules, rows=(("a", "b", "c"),), references=()):
    groups = [Pair(f"prompt {n}", keys, tuple(f"of {k}" for k in keys), "train") for n, keys in enumerate(rows)]
    with new_round(tmp_path / "v.db", groups, rules, "data", references):
        pass
    return Store(tmp_path / "v.db")


def test_rankings_are_stored_in_the_rows_own_letters(tmp_path):
    rows = [tuple(f"{n}{letter}" for letter in "abcd") for n in range(12)]
    store = begun(tmp_path, RANKING, rows)
    who, orders = person(store, "ann"), set()
    while task := store.task(who):
        wanted = sorted(task.keys)  # the alphabet of keys is the true order
        screen = {LETTERS[i]: wanted.index(key) for i, key in enumerate(task.keys)}
        orders.add(tuple(screen.values()))
        store.vote(who, task.ticket, dict.fromkeys(RANKING.columns, ranked(screen)))
    votes = store.votes()
    assert len(votes) == 12 and len(orders) > 6  # screens differ
    assert {vote.choices["TA"] for of in votes.values() for vote in of} == {"A>B>C>D"}
    screens = {vote["screen"] for vote in store.round().history}
    assert len(screens) == len(orders)


@pytest.mark.parametrize("text", ["A>B", "A>B>C>D", "same", "3", "B=A>C"])
def test_a_vote_that_is_no_ranking_of_these_videos_is_refused(tmp_path, text):
    store = begun(tmp_path, RANKING)
    who = person(store, "ann")
    with pytest.raises(RefusedVote, match="an order of all videos"):
        store.vote(who, store.task(who).ticket, dict.fromkeys(RANKING.columns, text))
    assert store.votes() == {}


@pytest.mark.parametrize("kind", ["single", "ranking"])
def test_undo_repetitions_and_flags_work_in_every_kind(tmp_path, kind):
    rules = RatingProtocol(kind=kind, votes=1, repeats=0.3, repeat_after=2)
    rows = [tuple(f"{n}{x}" for x in ("abc" if kind == "ranking" else "a")) for n in range(12)]
    store = begun(tmp_path, rules, rows)
    who, seen, again = person(store, "ann"), {}, {}
    answer = dict.fromkeys(rules.columns, "A>B>C" if kind == "ranking" else "4")
    while task := store.task(who):
        if len(seen) == 3 and not again and task.pair_id not in seen:
            store.vote(who, task.ticket, answer)
            assert store.undo(who)
            back = store.task(who)
            assert (back.pair_id, back.keys) == (task.pair_id, task.keys)
            task = back
        (again if task.pair_id in seen else seen)[task.pair_id] = task.keys
        flags = ["unsafe"] if len(seen) == 7 and task.pair_id not in again else []
        store.vote(who, task.ticket, {} if flags else answer, flags=flags)
    assert len(seen) == 12 and len(again) >= 2
    if kind == "ranking":
        assert all(seen[pair] != keys for pair, keys in again.items())  # in another order
    assert sorted({d.state for d in store.decisions().values()}) == ["done", "unsafe"]
    found = overview(store.round())
    assert 0 <= found["people"][0]["consistency"]["share"] <= 1
    if kind == "single":
        assert found["people"][0]["consistency"]["share"] == 1.0


def test_training_in_scores_forgives_a_difference_of_one(tmp_path):
    reference = [(Pair("p", ("t",), ("s",), "train"), {"VQ": "4", "MQ": "4", "TA": "4"})]
    store = begun(tmp_path, SINGLE, [("a",)], reference)
    who = person(store, "ann")
    told = store.vote(who, store.task(who).ticket, {"VQ": "1", "MQ": "2", "TA": "5"})
    assert told == reference[0][1]
    assert store.task(who).kind == "training"
    store.vote(who, store.task(who).ticket, {"VQ": "3", "MQ": "5", "TA": "4"})
    assert store.task(who).kind == "work"


def test_training_in_rankings_counts_pairs_and_tells_the_order_of_the_screen(tmp_path):
    reference = [(Pair("p", ("a", "b", "c"), ("s",) * 3, "train"), {"VQ": "A>B>C"})]
    rules = RatingProtocol(kind="ranking", training_pass=0.6, repeats=0.0)
    store = begun(tmp_path, rules, [("d", "e")], reference)
    who = person(store, "ann")
    task = store.task(who)
    told = store.vote(who, task.ticket, dict.fromkeys(rules.columns, "A=B=C"))
    assert [task.keys[LETTERS.index(letter)] for letter in told["VQ"].split(">")] == ["a", "b", "c"]
    task = store.task(who)
    assert task.kind == "training"
    screen = {LETTERS[task.keys.index(key)]: rank for key, rank in (("a", 0), ("c", 1), ("b", 2))}  # 2 of 3 right
    store.vote(who, task.ticket, dict.fromkeys(rules.columns, ranked(screen)))
    assert store.task(who).kind == "work"


def test_a_file_of_the_earlier_version_is_read_and_goes_on(tmp_path):
    store = begun(tmp_path, RatingProtocol(votes=1, repeats=0.0), [("a", "b"), ("c", "d")])
    who = person(store, "ann")
    store.vote(who, store.task(who).ticket, dict.fromkeys(("VQ", "MQ", "TA"), "A"))
    before = store.votes()
    store.close()
    with sqlite3.connect(store.path) as file:  # as release 1 wrote it
        for table, column in (("pairs", "further"), ("votes", "watched"), ("votes", "full_play"), ("holds", "watched")):
            file.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        file.execute("UPDATE meta SET value = '1' WHERE name = 'version'")
        file.execute("DELETE FROM meta WHERE name = 'shown'")
        old = json.loads(file.execute("SELECT value FROM meta WHERE name = 'protocol'").fetchone()[0])
        old = {name: value for name, value in old.items() if name not in ("kind", "ranked", "dimensions")}
        file.execute("UPDATE meta SET value = ? WHERE name = 'protocol'", (json.dumps(old),))
    file.close()
    again = Store(tmp_path / "v.db")
    assert again.votes() == before
    assert again.fact("shown") is None
    again.vote(who, again.task(who).ticket, dict.fromkeys(("VQ", "MQ", "TA"), "B"))
    assert {d.state for d in Store(tmp_path / "v.db").decisions().values()} == {"done"}


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("set") / "videos", prompts=5, sources="xyzw")


@pytest.fixture(params=["single", "ranking"])
def served(request, videos, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text(f"{{kind: {request.param}, votes: 1, repeats: 0.0, overall: true, ranked: 3}}")
    store = begin(str(videos), str(tmp_path / "votes.db"), validation=0.2, benchmark=0.2, protocol=str(rules))
    app = make_app(store, ShardSet(videos), "admin-secret")
    with TestClient(app, headers={"content-type": "application/json"}) as client:
        yield request.param, store, client


def test_the_page_of_each_kind_shows_its_videos_and_takes_its_votes(served):
    kind, store, client = served
    token = store.invite("a")
    page = client.get(f"/a/{token}").text
    assert page.count("<video") == (3 if kind == "ranking" else 1)
    assert ("rank.js" in page) is (kind == "ranking")
    task = task_of(client, token)
    assert task["videos"] == (3 if kind == "ranking" else 1)
    for place, status in (("left", 200), ("third", 200 if kind == "ranking" else 404), ("fourth", 404)):
        assert client.get(f"/a/{token}/video/{task['ticket']}/{place}").status_code == status
    good, bad = ("B>A=C", "A>B") if kind == "ranking" else ("5", "6")
    for text, status in ((bad, 409), (good, 200)):
        choices = dict.fromkeys(store.protocol.columns, text)
        answer = client.post(f"/a/{token}/vote", json={"ticket": task["ticket"], "choices": choices})
        assert answer.status_code == status
    assert client.get("/overview/admin-secret").status_code == 200
    assert client.get("/overview/admin-secret/pair/1").status_code == 200


# --- simulated people and exports -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six prompts, four sources of known quality."""
    path, rng = tmp_path_factory.mktemp("world") / "videos", np.random.default_rng(0)
    source = ShardSet(clips(path.parent / "clips", prompts=6, sources="wxyz"))
    with ShardWriter(path, "videos") as writer:
        for content in source.contents():
            quality = 0.2 + 0.2 * "wxyz".index(content.record["source"]) + rng.normal(0, 0.05, 3)
            writer.write(content.key, {"": content.read("mp4")}, content.record | {"quality": quality.tolist()})
    return path


def rehearsed(world, tmp_path, text, **options):
    rules = tmp_path / "rules.yaml"
    rules.write_text(text)
    store = begin(str(world), str(tmp_path / "votes.db"), validation=0.2, benchmark=0.2, protocol=str(rules))
    return store, rehearse(store, ShardSet(world), **options)


def test_rankings_become_pairs_that_agree_with_the_truth(world, tmp_path):
    store, found = rehearsed(world, tmp_path, "{kind: ranking, repeats: 0.0}")
    assert found["done"] == 6
    card = export(store, ShardSet(world), tmp_path / "out")
    assert sum(card["exported"].values()) == 6 * 6  # all pairs of four videos
    assert not [*verify(ShardSet(tmp_path / "out/train"))]
    benchmark = Benchmark(tmp_path / "out/benchmark")
    assert len(benchmark.rows) == 6
    right, wrong = 0, 0
    for split in ("train", "validation"):
        for content in ShardSet(tmp_path / "out" / split).contents():
            sources = content.record["sources"]
            assert len(content.record["votes"]) in (3, 4)
            for label in content.record["labels"].values():
                if label != "same":
                    better = "A" if sources["A"] > sources["B"] else "B"
                    right, wrong = right + (label == better), wrong + (label != better)
    assert right > 9 * wrong
    with open(tmp_path / "out/rankings.csv", encoding="utf-8-sig") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 6 * 3 * 4
    means = {s: np.mean([float(row["mean_rank"]) for row in rows if row["source"] == s]) for s in "wxyz"}
    assert means["z"] < means["y"] < means["x"] < means["w"]
    found = overview(store.round())["agreement"]["VQ"]
    assert found["tau"] > 0.5 and found["alpha"] > 0.5
    pairs = in_pairs(store.round())
    assert agreement(pairs.votes, "VQ")["votes"] == found["votes"] == 6 * 6 * 3


def test_scores_become_a_table_and_pairs_where_they_are_asked_for(world, tmp_path):
    store, found = rehearsed(world, tmp_path, "{kind: single, repeats: 0.0}")
    assert found == {"votes": 72, "done": 24}
    card = export(store, ShardSet(world), tmp_path / "out")
    assert sum(card["exported"].values()) == 24
    with open(tmp_path / "out/scores.csv", encoding="utf-8-sig") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    by_key = {row.key_a: store.votes()[row.id] for row in store.pairs()}
    for key, row in rows.items():
        given = [int(vote.choices["MQ"]) for vote in by_key[key]]
        assert float(row["MQ"]) == pytest.approx(np.mean(given), abs=1e-4)
        assert float(row["MQ_sd"]) == pytest.approx(np.std(given, ddof=1), abs=1e-4)
        assert row["raters"] == "3"
    train = ShardSet(tmp_path / "out/train", "videos")
    assert {row["key"] for row in train.table("scores.csv")} == {content.key for content in train.contents()}
    assert not [*verify(train)]
    card = export(store, ShardSet(world), tmp_path / "pairs", margin=0.5)
    assert sum(card["exported"].values()) == 6 * 6
    for content in ShardSet(tmp_path / "pairs/train", "pairs").contents():
        for column, label in content.record["labels"].items():
            a, b = (float(rows[key][column]) for key in content.record["keys"].values())
            assert label == ("same" if abs(a - b) <= 0.5 + 1e-6 else "A" if a > b else "B")
            assert content.record["scores"]["A"][column] == pytest.approx(a, abs=1e-3)
        single = single_scores(content.record, content.key)
        assert len({rater for rater, _, _ in single}) == 3 and [side for _, side, _ in single] == [0, 0, 0, 1, 1, 1]
        for side, letter in enumerate("AB"):
            mean = np.mean([scores for _, of, scores in single if of == side], 0)
            assert mean == pytest.approx([*content.record["scores"][letter].values()], abs=1e-3)
    with pytest.raises(VideoAlignError, match="--pairs-margin"):
        export(store, ShardSet(world), tmp_path / "no", margin=-1.0)


def test_simulated_people_rate_pairs_too_and_pass_a_training_round(world, tmp_path):
    keys = sorted(content.key for content in ShardSet(world).contents())
    (tmp_path / "r.csv").write_text(f"key_A,key_B,VQ,MQ,TA\n{keys[0]},{keys[3]},B,B,B\n")
    rules = tmp_path / "rules.yaml"
    rules.write_text("{scores: true, overall: true, repeats: 0.1, repeat_after: 3}")
    annotate(
        "begin", videos=world, db=tmp_path / "v.db", protocol=rules, references=tmp_path / "r.csv", benchmark=0,
        validation=0,
    )  # fmt: skip
    annotate("rehearse", videos=world, db=tmp_path / "v.db", people=4)
    store = Store(tmp_path / "v.db")
    states = {decision.state for decision in store.decisions().values()}
    assert states == {"done"}
    found = overview(store.round())
    assert found["agreement"]["Overall"]["alpha"] > 0.3
    assert all(person["training"] >= 1 for person in found["people"] if person["role"] == "annotator")
    with pytest.raises(VideoAlignError, match="--people 2"):
        rehearse(store, ShardSet(world), people=2)


def test_only_the_miniature_world_can_be_rehearsed(videos, tmp_path):
    store = begin(str(videos), str(tmp_path / "votes.db"), validation=0, benchmark=0)
    with pytest.raises(VideoAlignError, match="has no quality"):
        rehearse(store, ShardSet(videos))


def test_simulated_rankings_of_two_are_bradley_terry_with_ties():
    rng = np.random.default_rng(0)
    simulated = SimulatedPerson({"a": np.full(3, 0.6), "b": np.full(3, 0.5)}, rng, error=0.0)

    class Shown:
        keys = ("a", "b")

    every = [simulated.answer(Shown, RANKING)[0]["VQ"] for _ in range(20_000)]
    margin = 9.0 * 0.1
    expected = {"A>B": 1 / (1 + 5 * np.exp(-margin)), "B>A": 1 / (1 + 5 * np.exp(margin))}
    for text, chance in expected.items():
        assert every.count(text) / len(every) == pytest.approx(chance, abs=0.015)
    assert {*every} == {"A>B", "B>A", "A=B"}
    assert ranks("A=B") == {"A": 1, "B": 1}


def test_label_studio_holds_pairs_alone(videos, tmp_path):
    (tmp_path / "export.json").write_text('[{"data": {}}]')
    with pytest.raises(VideoAlignError, match="holds ratings of pairs"):
        import_label_studio(tmp_path / "export.json", ShardSet(videos), tmp_path / "v.db", protocol=SINGLE)


@pytest.mark.parametrize("kind", ["single", "ranking"])
def test_uncertain_pairs_cannot_come_first_where_there_are_none(videos, tmp_path, kind):
    (tmp_path / "rules.yaml").write_text(f"kind: {kind}")
    with pytest.raises(VideoAlignError, match="--select uncertain chooses pairs"):
        begin(
            str(videos), str(tmp_path / "v.db"), protocol=str(tmp_path / "rules.yaml"), select="uncertain", model=["m"]
        )
    assert not (tmp_path / "v.db").exists()
