"""Scores that are standardised by each rater's own mean and deviation, against brute force; the option of the data."""

import math
import statistics

import numpy as np
import pytest
import torch

from shard_kit import clip
from test_pairs import module
from videoalign import VideoAlignError
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.pairs import VideoPairs
from videoalign.datamodules.rater_scores import LEAST, RaterScales
from videoalign.datamodules.ratings import single_scores
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.models.processor import RewardProcessor
from videoalign.models.template import Template

DIMENSIONS = ("VQ", "MQ", "TA")


def vote(rater, a, b, **more):
    scores = {side: dict(zip(DIMENSIONS, row)) for side, row in zip("AB", (a, b)) if row}
    return {"annotator": rater, "choices": {}, "scores": scores, "flags": [], "review": False, **more}


def rated(votes, **more):
    return {"prompt": "a clip", "labels": {"VQ": "A"}, "votes": votes, **more}


def mean_scores(votes):
    return {side: {d: statistics.mean(v["scores"][side][d] for v in votes) for d in DIMENSIONS} for side in "AB"}


def random_records(count=40, raters=5, asked=3, seed=0):
    """Pairs of which each is scored by some of the raters, who differ in level and spread."""
    rng = np.random.default_rng(seed)
    levels, spreads = rng.normal(0, 1, raters), np.exp(rng.normal(0, 0.4, raters))
    records = []
    for _ in range(count):
        true, votes = rng.normal(0, 1, (2, 3)), []
        for who in rng.choice(raters, asked, replace=False):
            noisy = 3 + levels[who] + spreads[who] * true + rng.normal(0, 0.4, (2, 3))
            votes.append(vote(f"r{who}", *np.clip(np.rint(noisy), 1, 5).astype(int).tolist()))
        records.append(rated(votes, scores=mean_scores(votes)))
    return records


def named(records):
    return [(record, f"pair {n}") for n, record in enumerate(records)]


def brute(records, record):
    """Standardised scores (2, 3) of a record, by the definition and Python's own statistics."""
    found = [[math.nan] * 3 for _ in "AB"]
    for d, dimension in enumerate(DIMENSIONS):
        given = {}
        for one in records:
            for v in one["votes"]:
                values = [row[dimension] for row in v["scores"].values() if dimension in row]
                given.setdefault(v["annotator"], []).extend(values)
        given = {r: s for r, s in given.items() if len(s) >= LEAST and len({*s}) > 1}
        every = [(s, statistics.mean(given[r])) for r in given for s in given[r]]
        centre = statistics.mean(s for s, _ in every)
        spread = math.sqrt(statistics.fmean((s - own) ** 2 for s, own in every))
        for side, letter in enumerate("AB"):
            standard = [
                (v["scores"][letter][dimension] - statistics.mean(given[v["annotator"]]))
                / statistics.stdev(given[v["annotator"]])
                for v in record["votes"]
                if v["annotator"] in given and dimension in v["scores"].get(letter, {})
            ]
            if standard:
                found[side][d] = centre + spread * statistics.mean(standard)
    return torch.tensor(found)


def test_scores_are_standardised_by_the_definition():
    records = random_records()
    scales = RaterScales.of(named(records), "train")
    for record in records:
        assert torch.allclose(scales(record, "x"), brute(records, record), atol=1e-5)
    assert scales.left_out(named(records)) == (0, 40 * 3 * 6)


def test_the_scale_stays_that_of_the_scores():
    """Regression subtracts 3, so the mean over all scores must not move."""
    records = random_records(200)
    scales = RaterScales.of(named(records), "train")
    raw = np.array([[list(row.values()) for row in record["scores"].values()] for record in records])
    standard = torch.stack([scales(record, "x") for record in records]).numpy()
    assert standard.mean((0, 1)) == pytest.approx(raw.mean((0, 1)), abs=0.02)
    assert 0.7 < standard.std() / raw.std() < 1.3


def test_levels_and_spreads_of_raters_are_gone():
    """Every rater sees all videos and stretches and shifts the same scores: all standardised scores are equal."""
    rng = np.random.default_rng(0)
    true = rng.integers(2, 5, (30, 2, 3))
    changed = {"a": lambda s: s, "b": lambda s: s + 1, "c": lambda s: 1 + (s - 2) / 2}
    records = [rated([vote(r, *change(pair).tolist()) for r, change in changed.items()]) for pair in true]
    scales = RaterScales.of(named(records), "train")
    for record in records:
        alone = [scales({**record, "votes": [v]}, "x") for v in record["votes"]]
        assert torch.allclose(alone[0], alone[1], atol=1e-5) and torch.allclose(alone[0], alone[2], atol=1e-5)
        assert torch.allclose(scales(record, "x"), alone[0], atol=1e-5)


def test_raters_without_a_scale_are_left_out():
    """Too few scores, no spread, an unknown name: the others' scores count as if nobody else was there."""
    records = random_records()
    few = [vote("few", (1, 1, 1), (5, 5, 5)) for _ in range((LEAST - 1) // 2)]
    flat = [vote("flat", (4, 4, 4), (4, 4, 4)) for _ in records]
    for record, extra in zip(records, few):
        record["votes"].append(extra)
    for record, extra in zip(records, flat):
        record["votes"].append(extra)
    scales = RaterScales.of(named(records), "train")
    plain = random_records()
    assert torch.equal(
        torch.stack([scales(record, "x") for record in records]),
        torch.stack([RaterScales.of(named(plain), "train")(record, "x") for record in plain]),
    )
    assert scales.left_out(named(records)) == (6 * (len(few) + len(flat)), 40 * 3 * 6 + 6 * (len(few) + len(flat)))
    stranger = rated([vote("stranger", (1, 2, 3), (4, 5, 1))])
    assert scales(stranger, "x").isnan().all() and scales.left_out(named([stranger])) == (6, 6)


def test_reviews_and_flags_do_not_count():
    votes = [vote("a", (1, 2, 3), None), vote("b", (5, 5, 5), (5, 5, 5), review=True), vote("c", (5, 5, 5), None)]
    votes[2]["flags"] = ["unsafe"]
    assert single_scores(rated(votes), "x") == [("a", 0, [1.0, 2.0, 3.0])]


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ([["A", "same"]], "list of objects"),
        ({"a": 1}, "list of objects"),
        ([vote("", (1, 1, 1), None)], "must name its annotator"),
        ([vote(7, (1, 1, 1), None)], "must name its annotator"),
        ([vote("a", (1, 9, 1), None)], "score 9 is not a number from 1 to 5"),
        ([{**vote("a", None, None), "scores": {"A": 3}}], "object of A and B"),
    ],
)
def test_unsound_votes_are_refused(votes, message):
    with pytest.raises(ShardError, match=rf"pair 7: .*{message}"):
        single_scores(rated(votes), "pair 7")


def test_sets_without_single_scores_are_refused():
    with pytest.raises(VideoAlignError, match=r"train has none; set data\.scores: mean"):
        RaterScales.of(named([rated([])]), "train")
    with pytest.raises(VideoAlignError, match=f"no rater of train gave {LEAST} scores that differ"):
        RaterScales.of(named([rated([vote("a", (1, 2, 3), (3, 4, 5))])]), "train")
    means = rated([], scores={"A": {"VQ": 3}, "B": {"VQ": 4}})
    with pytest.raises(VideoAlignError, match="pair 1: it has scores but no votes"):
        RaterScales.of([*named(random_records()[:1]), (means, "pair 1")], "train")


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A training and a held-out set."""
    out = tmp_path_factory.mktemp("rated")
    for name, count, seed in (("train", 24, 1), ("val", 4, 2)):
        with ShardWriter(out / name, "pairs", per_shard=10) as writer:
            for i, record in enumerate(random_records(count, seed=seed)):
                writer.write(f"{i:03d}", {"a": clip(i % 8), "b": clip(i % 8 + 8)}, record)
    return out


@pytest.fixture(scope="module")
def processor(backbone, sampling):
    return RewardProcessor(backbone, Template.load("plain"), sampling)


def by_key(loader):
    return {key: batch["scores"][:, i] for batch in loader for i, key in enumerate(batch["keys"])}


def records_of(folder):
    return {content.key: content.record for content in ShardSet(folder).contents()}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_standardised_scores(workers, folders, processor):
    options = {"train": str(folders / "train"), "val": str(folders / "val"), "swap": False, "workers": workers}
    data = module(processor, scores="standardised", **options)
    train, held_out = records_of(folders / "train"), records_of(folders / "val")
    for loader, records in ((data.train_dataloader(), train), (data.val_dataloader()[0], held_out)):
        found = by_key(loader)
        assert found.keys() == records.keys()
        for key, scores in found.items():
            assert torch.allclose(scores, brute([*train.values()], records[key]), atol=1e-5, equal_nan=True)
    raw = by_key(module(processor, **options).val_dataloader()[0])
    assert all(raw[key][0, 0] == pytest.approx(held_out[key]["scores"]["A"]["VQ"]) for key in raw)


def test_scales_are_those_of_the_pairs_that_are_trained_on(folders, processor):
    """Also with a share of them; what the rest of the raters' scores would say has no part in it."""
    data = module(processor, train=str(folders / "train"), scores="standardised", train_share=0.5, swap=False)
    found, every = by_key(data.train_dataloader()), records_of(folders / "train")
    used = [every[key] for key in found]
    assert len(found) == 12
    assert all(torch.allclose(found[k], brute(used, every[k]), atol=1e-5, equal_nan=True) for k in found)


def test_scores_that_are_left_out_are_told(folders, processor, tmp_path):
    with ShardWriter(tmp_path / "val", "pairs") as writer:
        stranger = rated([vote("stranger", (1, 2, 3), (4, 5, 1)), *random_records(1)[0]["votes"]])
        writer.write("0", {"a": clip(0), "b": clip(1)}, stranger)
    data = module(processor, train=str(folders / "train"), val=str(tmp_path / "val"), scores="standardised")
    with pytest.warns(UserWarning, match=r"leaves 6 of 24 scores of .*val out"):
        data.val_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scores": "median", "train": "x"}, "data.scores is mean or"), ({"scores": "standardised"}, "name that set too")],
)
def test_impossible_scores_are_refused(options, message):
    with pytest.raises(VideoAlignError, match=message):
        VideoPairs(**options)
