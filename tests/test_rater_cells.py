"""Cell (l): sets of one pool of raters at several biases, units, and the bias at which one loss overtakes another."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from shard_kit import clip
from videoalign.datamodules.ratings import single_scores
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.verify import verify
from videoalign.miniature.study.loop_size import LoopSize
from videoalign.miniature.study.paper import Paper
from videoalign.miniature.study.rater_claims import BIASES, SCORED, VOTED, ahead, claims, model_name
from videoalign.miniature.study.rater_tables import crossing, crossing_interval, crossings, rater_table
from videoalign.miniature.world.annotators import POOL, PUBLIC_BIAS
from videoalign.miniature.world.rater_sets import pool_size, rate_anew
from videoalign.miniature.world.rendered_sets import WorldSize
from videoalign.models.dimensions import DIMENSIONS

# --- sets -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Sets of three biases, of pairs with true qualities."""
    out, rng = tmp_path_factory.mktemp("raters"), np.random.default_rng(0)
    for name, count in (("train", 130), ("val", 12)):
        with ShardWriter(out / name, "pairs", per_shard=50) as writer:
            for i in range(count):
                quality = {side: rng.random(3).round(4).tolist() for side in "AB"}
                record = {"prompt": f"prompt {i % 7}", "quality": quality, "labels": {}, "scores": {}, "num_frames": 6}
                writer.write(f"{i:04d}", {"a": clip(i % 8), "b": clip(i % 8 + 8)}, record)
    for bias in (0.0, 0.9, 1.8):
        rate_anew(ShardSet(out / "train"), ShardSet(out / "val"), out / f"{bias:g}", bias, 120, 10, 3)
    return out


def records(folder):
    return {content.key: content.record for content in ShardSet(folder, "pairs").contents()}


def test_biases_differ_in_scores_alone(rated):
    for name, count in (("train", 120), ("val", 10)):
        plain, source = records(rated / "0" / name), ShardSet(rated / name)
        assert len(plain) == count
        for bias in ("0.9", "1.8"):
            other = records(rated / bias / name)
            assert not [*verify(ShardSet(rated / bias / name))]
            for key, record in plain.items():
                assert other[key]["labels"] == record["labels"] != {}
                assert [v["choices"] for v in other[key]["votes"]] == [v["choices"] for v in record["votes"]]
                assert [v["annotator"] for v in other[key]["votes"]] == [v["annotator"] for v in record["votes"]]
            assert any(other[key]["scores"] != record["scores"] for key, record in plain.items())
        for raw, copied in zip(source, ShardSet(rated / "0" / name)):
            assert all(raw.members[m] == copied.members[m] for m in ("a.mp4", "b.mp4"))
            assert copied.record()["num_frames"] == 6 and copied.record()["quality"] == raw.record()["quality"]


def test_raters_differ_the_more_the_larger_the_bias(rated):
    """Mean scores of raters, each over about sixty pairs, beyond what chance makes of raters without a bias."""

    def deviation(bias):
        given = {}
        for key, record in records(rated / bias / "train").items():
            for rater, _, scores in single_scores(record, key):
                given.setdefault(rater, []).extend(scores)
        assert len(given) == pool_size(120) == 6
        return np.std([np.mean(scores) for scores in given.values()])

    assert deviation("0") < 0.15 < deviation("0.9") < deviation("1.8")


def test_the_same_seed_gives_the_same_ratings(rated, tmp_path):
    rate_anew(ShardSet(rated / "train"), ShardSet(rated / "val"), tmp_path / "again", 0.9, 120, 10, 3)
    assert records(tmp_path / "again/train") == records(rated / "0.9/train")
    rate_anew(ShardSet(rated / "train"), ShardSet(rated / "val"), tmp_path / "other", 0.9, 120, 10, 4)
    assert records(tmp_path / "other/train") != records(rated / "0.9/train")


def test_a_pool_is_as_large_as_its_pairs_allow():
    assert pool_size(1500) == pool_size(10_000) == POOL
    assert pool_size(3) == 4 and pool_size(200) == 10


# --- units ------------------------------------------------------------------------------------------------------------


def test_all_trainings_have_equal_pairs_steps_and_networks():
    """What differs is the loss, its scores and the set of the bias; each reads the set that it needs."""
    units = {unit.name: unit for unit in Paper(Path("nowhere"), LoopSize(), 0).rater_cells()}
    trained = {name: unit.run.args for name, unit in units.items() if name.startswith("rm/")}
    assert len(trained) == len(VOTED) + len(SCORED) * len(BIASES)
    kept = {}
    for name, (_, experiments, settings, _) in trained.items():
        bias = name.rpartition("-")[2] if name.count("-") == 2 else "0"
        assert str(settings["data.init_args.train"]).endswith(f"raters/{bias}/train")
        assert f"raters/{bias}" in units[name].needs and f"raters/{bias}" in units
        assert f"bench/{name.removeprefix('rm/')}" in units
        own = ("model.init_args.loss", "data.init_args.train", "data.init_args.val", "data.init_args.scores")
        own = (*own, "trainer.logger.init_args.name")
        kept[name] = experiments, {key: str(value) for key, value in settings.items() if key not in own}
        regression = settings["model.init_args.loss"] == "reg"
        assert settings["data.init_args.scores"] == ("standardised" if "-std-" in name else "mean")
        assert regression == ("-reg-" in name or "-std-" in name)
    first = next(iter(kept.values()))
    assert all(one == first for one in kept.values())


def test_a_small_world_is_trained_on_for_few_steps():
    size = LoopSize(world=WorldSize(train=6), reward=4)
    unit = next(u for u in Paper(Path("nowhere"), size, 0).rater_cells() if u.name == "rm/raters-bt")
    settings = unit.run.args[2]
    assert settings["trainer.max_steps"] == 4 and settings["data.init_args.batch_size"] == 6


# --- claims and the crossing ------------------------------------------------------------------------------------------


def found(lines):
    """Findings of a seed with the accuracies (loss by bias) of this cell."""
    models = {
        model_name(loss, bias): {"recent": {d: {"without_ties": value} for d in DIMENSIONS}}
        for loss, values in lines.items()
        for bias, value in zip(BIASES, values)
    }
    return {"reward models": models}


def test_claims_read_the_difference_at_their_bias():
    one = found({"bt": [0.7] * 4, "btt": [0.72] * 4, "reg": [0.8, 0.75, 0.7, 0.6], "std": [0.8, 0.79, 0.78, 0.77]})
    rows = {row.text: row for row in claims()}
    assert len(rows) == 2 * 4 + 3 + 4
    values = {text: round(row.of(one), 6) for text, row in rows.items()}
    assert values["BT orders better than regression under raters' bias, rater bias 1.8"] == 0.1
    assert values["BTT orders better than regression under raters' bias, rater bias 0.45 (as in public sets)"] == -0.03
    assert values["standardising scores by rater improves regression, rater bias 0.9"] == 0.08
    deciding = [row for row in rows.values() if row.primary]
    assert len(deciding) == len({row.finding for row in rows.values()}) == 4
    assert all("0.45 (as in public sets)" in row.text for row in deciding)
    assert [bool(row.paper) for row in deciding] == [True, True, False, False]
    with pytest.raises(KeyError):
        ahead("bt", "reg", 0.0)({"reward models": {}})


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ((-1.0, 1.0, 1.0, 1.0), 0.5),
        ((-1.0, -1.0, 3.0, 1.0), 1.25),
        ((1.0, -1.0, -1.0, 1.0), 3.0),  # ahead for good only from here on
        ((0.0, 1.0, 1.0, 1.0), 0.0),
        ((-1.0, 0.0, 1.0, 1.0), 1.0),
        ((1.0, 1.0, 1.0, 1.0), -math.inf),
        ((1.0, 1.0, 1.0, 0.0), math.inf),
        ((-1.0, -1.0, -1.0, -1.0), math.inf),
    ],
)
def test_crossing(line, place):
    assert crossing(line, (0.0, 1.0, 2.0, 4.0)) == place


def test_crossing_is_where_the_broken_line_changes_its_sign():
    rng = np.random.default_rng(0)
    fine = np.linspace(BIASES[0], BIASES[-1], 20_001)
    for _ in range(200):
        line = rng.normal(size=4)
        above = np.interp(fine, BIASES, line) > 0
        place = crossing(line.tolist())
        if above.all():
            assert place == -math.inf
        elif not above[-1]:
            assert place == math.inf
        else:
            assert place == pytest.approx(fine[np.flatnonzero(~above)[-1]], abs=2e-4)


def test_the_interval_is_that_of_all_resamples():
    """Three seeds have 27 resamples: the ends lie within the smallest and largest crossing of all, the mean between."""
    lines = np.array([[-0.1, -0.05, 0.02, 0.1], [-0.12, -0.02, 0.03, 0.1], [-0.09, -0.06, -0.01, 0.1]])
    every = [crossing(lines[[*drawn]].mean(0).tolist()) for drawn in itertools.product(range(3), repeat=3)]
    place, low, high = crossing_interval(lines)
    assert place == pytest.approx(crossing(lines.mean(0).tolist()))
    assert min(every) <= low < place < high <= max(every)


def test_the_interval_holds_the_truth():
    """Of simulated studies of five seeds whose mean line crosses at a known place, most intervals hold it."""
    rng, mean = np.random.default_rng(1), np.array([-0.06, -0.04, 0.0, 0.08])
    held = 0
    for _ in range(150):
        _, low, high = crossing_interval(mean + rng.normal(0, 0.02, (5, 4)))
        held += low <= BIASES[2] <= high
    assert 0.88 <= held / 150 <= 1.0


def test_curves_that_do_not_cross_say_so():
    away = {"bt": [0.7] * 4, "btt": [0.9] * 4, "reg": [0.8, 0.8, 0.8, 0.75], "std": [0.8] * 4}
    lines = [*crossings({0: found(away), 1: found(away)})]
    assert len(lines) == 4
    assert (
        "BT against regression: not ahead within the range, up to a bias of 1.8 (95 % interval beyond 1.8" in lines[0]
    )
    assert "BTT against regression: ahead at every bias, also without any (95 % interval below 0" in lines[1]
    assert not any("interval" in line for line in crossings({0: found(away)}))


def test_the_table_states_the_bias_and_where_it_stands_among_public_sets():
    curves = [
        {"bt": [0.7] * 4, "btt": [0.7] * 4, "reg": [0.76 + s, 0.74, 0.7, 0.62], "std": [0.75] * 4} for s in (0, 0.01)
    ]
    text = rater_table({seed: found(one) for seed, one in enumerate(curves)})
    assert "| 0.45 (public sets) | 0.700" in text
    assert "BT against regression: ahead from a bias of 0.90 on, 2.0 times that of public sets" in text
    assert len(text.splitlines()) == 2 + 4 + 1 + 1 + 1 + 4 and not text.endswith("\n")
    part = found({"bt": [0.7] * 4, "reg": [0.76]})  # a seed of which little is done
    assert "-" in rater_table({0: part}) and not [*crossings({0: part})]
    assert PUBLIC_BIAS in BIASES
