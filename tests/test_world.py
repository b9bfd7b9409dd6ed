"""The miniature world: from one seed, without leaks between its sets, and labelled as it says."""

import hashlib
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import files
from videoalign import VideoAlignError
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.pairs import VideoPairs
from videoalign.datamodules.ratings import WORDS
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.verify import verify
from videoalign.datamodules.video import decode, encode, probe
from videoalign.miniature.world import sprites
from videoalign.miniature.world.annotators import (
    DIFFICULTY,
    PUBLIC_BIAS,
    SCORE_NOISE,
    TEAM,
    THETA,
    Rater,
    annotate,
    difficulties,
    rater_pool,
    vote,
)
from videoalign.miniature.world.measurement import measure
from videoalign.miniature.world.rendered_sets import WorldSize, ceiling, split_prompts, write_world
from videoalign.miniature.world.sprites import FPS, FRAMES, SCENES, SIZE, SOURCES, Flaws, Scene, render, shown, tracked
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.processor import RewardProcessor
from videoalign.models.template import Template

TINY = WorldSize(train=24, val=6, benchmark_videos=16, benchmark_pairs=20, captions=8, clips=12)
SETS = {"train": ("pairs", 24), "val": ("pairs", 6), "recent": ("videos", 16), "older": ("videos", 16),
        "captions": ("videos", 8), "clips": ("videos", 12)}  # fmt: skip
COLUMNS = ("VQ", "MQ", "TA", "Overall")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "world"
    for _ in write_world(out, TINY, seed=5):
        pass
    return out


def records(folder: Path) -> list[dict]:
    return [raw.record() for raw in ShardSet(folder)]


# --- the sets -------------------------------------------------------------------------------------


def test_sets(world: Path) -> None:
    assert sorted(path.name for path in world.iterdir()) == sorted([*SETS, "prompts.txt", "unseen.txt"])
    for name, (kind, samples) in SETS.items():
        shards = ShardSet(world / name, kind)
        assert shards.index.samples == samples
        assert list(verify(shards)) == []


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, world: Path) -> None:
    """This holds for several processes, too."""
    with ProcessPoolExecutor(2) as pool:
        progress = list(write_world(tmp_path / "again", TINY, seed=5, pool=pool))
    assert files(tmp_path / "again") == files(world)
    assert (tmp_path / "again" / "train" / "index.json").read_bytes() == (world / "train" / "index.json").read_bytes()
    assert progress == [(name, i + 1, n) for name, (_, n) in SETS.items() for i in range(n)]


def test_another_seed_gives_another_world(tmp_path: Path, world: Path) -> None:
    for _ in write_world(tmp_path / "other", TINY, seed=6):
        pass
    for name in SETS:
        assert (tmp_path / "other" / name / "index.json").read_bytes() != (world / name / "index.json").read_bytes()


def test_a_larger_world_begins_with_the_smaller(tmp_path: Path, world: Path) -> None:
    larger = WorldSize(train=30, val=6, benchmark_videos=16, benchmark_pairs=20, captions=8, clips=12)
    for _ in write_world(tmp_path / "larger", larger, seed=5):
        pass
    for a, b in zip(ShardSet(world / "train"), ShardSet(tmp_path / "larger" / "train")):
        assert (a.key, a.members) == (b.key, b.members)


def test_prompts_of_the_sets_are_disjoint(world: Path) -> None:
    prompts = {name: {record["prompt"] for record in records(world / name)} for name in SETS}
    names = ("train", "val", "recent", "older")
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not prompts[a] & prompts[b], (a, b)
    assert all(len(prompts[name]) > 1 for name in names)


@pytest.mark.parametrize("seed", range(5))
def test_split_of_all_prompts(seed: int) -> None:
    splits = split_prompts(seed)
    assert {name: len(contents) for name, contents in splits.items()} == {
        "recent": 12,
        "older": 12,
        "val": 8,
        "train": 64,
    }
    together = [content for contents in splits.values() for content in contents]
    assert Counter(together) == Counter(SCENES)  # each in one split
    for part in ("colour", "shape", "direction"):  # nothing in the benchmarks is new in itself
        known = {getattr(content, part) for content in splits["train"]}
        assert {getattr(c, part) for name in ("recent", "older") for c in splits[name]} <= known


def test_split_depends_on_the_seed() -> None:
    assert split_prompts(0) == split_prompts(0)
    assert len({tuple(split_prompts(seed)["recent"]) for seed in range(4)}) == 4


def test_clips_are_what_the_record_says(world: Path) -> None:
    for name in ("train", "recent"):
        for raw in ShardSet(world / name):
            record = raw.record()
            for member, content in raw.members.items():
                if member.endswith("mp4"):
                    clip = probe(content)
                    side = member[0].upper()
                    frames, fps = record["num_frames"], record["fps"]
                    assert clip.frames == (frames[side] if name == "train" else frames) == FRAMES
                    assert clip.fps == (fps[side] if name == "train" else fps) == FPS
                    assert (clip.height, clip.width) == (SIZE, SIZE)


def test_pairs_are_of_two_sources(world: Path) -> None:
    names = {source.name for source in SOURCES}
    for record in records(world / "train") + records(world / "val"):
        assert record["sources"]["A"] != record["sources"]["B"]
        assert set(record["sources"].values()) <= names
        for row in record["scores"].values():
            assert row.keys() == {"VQ", "MQ", "TA"} and all(1 <= score <= 5 for score in row.values())
        for row in record["quality"].values():
            assert len(row) == 3
            assert all(0 <= value <= 1 for value in row)


def test_labels_follow_the_votes(world: Path) -> None:
    """Three annotators vote; where they differ on a column, a fourth decides."""
    asked = set()
    for record in records(world / "train") + records(world / "val"):
        votes = [vote["choices"] for vote in record["votes"]]
        first, agreed = votes[:3], []
        assert len(first) == 3
        assert all(len(row) == 4 and set(row.values()) <= {"A", "B", "same"} for row in votes)
        assert [vote["review"] for vote in record["votes"]] == [False, False, False, True][: len(votes)]
        for column in COLUMNS:
            column_votes = {row[column] for row in first}
            agreed.append(len(column_votes) == 1)
            assert record["labels"][column] == (first[0][column] if agreed[-1] else votes[3][column])
        assert len(votes) == (3 if all(agreed) else 4)
        asked.add(len(votes))
    assert asked == {3, 4}  # both happen


def test_benchmark_pairs(world: Path) -> None:
    for name in ("recent", "older"):
        benchmark = Benchmark(world / name)
        by_key = {raw.key: raw.record() for raw in benchmark.shards}
        assert 0 < len(benchmark.rows) <= TINY.benchmark_pairs
        met = set()
        for row in benchmark.rows:
            a, b = by_key[row["key_A"]], by_key[row["key_B"]]
            assert a["source"] != b["source"] and a["prompt"] == b["prompt"] == row["prompt"]
            assert (row["A_model"], row["B_model"]) == (a["source"], b["source"])
            assert all(row[column] in ("A", "B", "same") for column in COLUMNS)
            met.add(frozenset((row["key_A"], row["key_B"])))
        assert len(met) == len(benchmark.rows)
        recent = {source.name for source in SOURCES if source.recent}
        assert {record["source"] for record in by_key.values()} <= recent if name == "recent" else True
        assert not {record["source"] for record in by_key.values()} & recent or name == "recent"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with larger benchmarks and little else."""
    folder = tmp_path_factory.mktemp("benchmarks") / "world"
    for _ in write_world(
        folder, WorldSize(train=1, val=1, benchmark_videos=48, benchmark_pairs=72, captions=1, clips=12)
    ):
        pass
    return folder


def test_both_sides_win(benchmarks: Path) -> None:
    """A and B are exchangeable: no source always stands on one side."""
    rows = Benchmark(benchmarks / "recent").rows
    assert 0.25 < sum(row["key_A"] < row["key_B"] for row in rows) / len(rows) < 0.75


def test_captions_are_true(world: Path) -> None:
    for record in records(world / "captions"):
        assert record["prompt"] in {content.prompt for content in SCENES}
        for wrong in record.get("negatives", []):
            assert wrong != record["prompt"] and wrong in {content.prompt for content in SCENES}
        assert "".join(true for true, _ in record["details"]) == record["prompt"]
        for place, (true, wrong) in enumerate(record["details"]):
            assert true != wrong
            words = [pair[0] for pair in record["details"]]
            words[place] = wrong
            assert "".join(words) == record["negatives"][place]


def test_the_track_is_where_the_sprite_is(world: Path) -> None:
    """What the measurement finds on the pixels of a clean render is what the renderer says."""
    rng = np.random.default_rng(0)
    scenes = [scene for scene in SCENES if scene.colour in ("red", "green", "yellow")][::3]
    videos, tracks = zip(*(tracked(scene, Flaws(freeze=0.4), rng) for scene in scenes))
    found = measure(np.stack(videos)).paths.numpy() + 0.5  # pixels are counted at their middles
    assert np.abs(found - np.stack(tracks)).mean() < 0.5
    for record in records(world / "captions"):
        track = np.array(record["track"])
        assert track.shape == (FRAMES, 2) and (track > 0).all() and (track < SIZE).all()


@pytest.mark.parametrize("name", ["recent", "older"])
def test_ceiling(benchmarks: Path, name: str) -> None:
    """A judge that knows the truth is right far above chance; annotators' errors keep it from being always right."""
    best = ceiling(Benchmark(benchmarks / name))
    assert set(best) == set(COLUMNS)
    for column in COLUMNS:
        assert 0.7 < best[column]["without_ties"] <= 1
        assert best[column]["pairs"] == len(Benchmark(benchmarks / name).rows)
    assert min(row["without_ties"] for row in best.values()) < 1


@pytest.mark.parametrize("pairs", [20, 3])
def test_a_tiny_benchmark_can_be_scored(tmp_path: Path, backbone: Path, sampling: FrameSampling, pairs: int) -> None:
    """Nothing is dropped, as `videoalign bench` demands."""
    size = WorldSize(train=1, val=1, benchmark_videos=8, benchmark_pairs=pairs, captions=1, clips=12)
    for _ in write_world(tmp_path / "world", size):
        pass
    module = VideoPairs(
        benchmarks={"recent": str(tmp_path / "world" / "recent")}, batch_size=4, workers=0, max_dropped=0.0
    )
    processor = RewardProcessor(backbone, Template.load("plain"), sampling)
    module.trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        lightning_module=SimpleNamespace(processor=processor),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    module.setup("validate")
    (loader,) = module.val_dataloader()
    numbers = [number for batch in loader for number in batch["numbers"][batch["valid"]].tolist()]
    assert len(numbers) == 8
    assert sorted(n for n in numbers if n >= 0) == list(range(len(module.benchmarks["recent"].keys)))


def test_nothing_stays_of_an_interrupted_world(tmp_path: Path) -> None:
    work = write_world(tmp_path / "world", TINY)
    for _ in range(30):
        next(work)
    work.close()
    assert not list(tmp_path.iterdir())
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "mine").write_text("mine")
    with pytest.raises(VideoAlignError, match="exists already"):
        next(write_world(tmp_path / "world", TINY))
    assert files(tmp_path) == {"world/mine": b"mine"}


# --- sprites --------------------------------------------------------------------------------------


def test_contents() -> None:
    assert len(SCENES) == len(set(SCENES)) == 96 == len({content.prompt for content in SCENES})
    assert Scene("red", "circle", "to the right").prompt == "a red circle moves to the right"


def test_no_flaws_no_loss_of_quality() -> None:
    assert np.array_equal(Flaws().quality, np.ones(3))
    assert np.array_equal(Flaws(fade=0, stain=0, freeze=0, jump=0, wrong=(False, False, False)).quality, np.ones(3))


@pytest.mark.parametrize(("name", "dimension"), [("fade", 0), ("stain", 0), ("freeze", 1), ("jump", 1)])
def test_each_flaw_costs_its_own_dimension(name: str, dimension: int) -> None:
    qualities = np.array([Flaws(**{name: strength}).quality for strength in (0.0, 0.3, 0.7, 1.0)])
    assert np.allclose(qualities[:, dimension], [1.0, 0.7, 0.3, 0.0])
    assert np.array_equal(np.delete(qualities, dimension, 1), np.ones((4, 2)))


def test_wrong_attributes_cost_text_alignment() -> None:
    for i, weight in enumerate(sprites.TA_WEIGHTS):
        wrong = tuple(j == i for j in range(3))
        assert np.allclose(Flaws(wrong=wrong).quality, [1, 1, 1 - weight])
    assert np.allclose(Flaws(wrong=(True, True, True)).quality, [1, 1, 0])


def test_wrong_attributes_are_others() -> None:
    content, rng = SCENES[0], np.random.default_rng(0)
    for wrong in ((True, False, False), (False, True, False), (False, False, True), (True, True, True), (False,) * 3):
        for _ in range(10):
            other = shown(content, wrong, rng)
            assert tuple(getattr(other, p) != getattr(content, p) for p in ("colour", "shape", "direction")) == wrong
            assert other in SCENES


def centre(video: np.ndarray) -> np.ndarray:
    """Positions x and y of the sprite in a flawless red clip, (T, 2)."""
    weight = np.clip(video[..., 0].astype(float) - 110, 0, None)
    y, x = np.mgrid[: video.shape[1], : video.shape[2]]
    return np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], -1) / weight.sum((1, 2))[:, None]


@pytest.mark.parametrize(
    ("direction", "step"),
    [("to the right", (1, 0)), ("to the left", (-1, 0)), ("upwards", (0, -1)), ("downwards", (0, 1))],
)
@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_sprites_move_as_they_should(direction: str, step: tuple[int, int], shape: str) -> None:
    video = render(Scene("red", shape, direction), Flaws(), np.random.default_rng(0))
    assert video.shape == (FRAMES, SIZE, SIZE, 3) and video.dtype == np.uint8
    steps = np.diff(centre(video), axis=0)
    assert np.allclose(steps.sum(0) / np.abs(steps.sum(0)).max(), step, atol=0.05)
    assert (steps @ step > 1).all()


def test_flaws_are_visible() -> None:
    def clip(**flaws: float) -> np.ndarray:
        return render(Scene("red", "circle", "to the right"), Flaws(**flaws), np.random.default_rng(0)).astype(float)

    fine = clip()
    assert np.array_equal(fine, clip())
    assert np.ptp(clip(fade=1.0)[..., 0]) < np.ptp(fine[..., 0]) / 2
    assert (np.abs(clip(stain=1.0) - fine) > 30).mean() > 0.05
    frozen = clip(freeze=1.0)
    assert np.abs(np.diff(frozen[3:], axis=0)).max() == 0 < np.abs(np.diff(fine[3:], axis=0)).max()
    across = np.abs(np.diff(centre(clip(jump=1.0)), axis=0))[:, 1]
    assert across.max() > 3
    assert np.abs(np.diff(centre(fine), axis=0))[:, 1].max() < 0.5


def test_newer_sources_are_better() -> None:
    def quality(recent: bool) -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.mean([s.sample(rng).quality for s in SOURCES if s.recent == recent for _ in range(100)], 0)

    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert (quality(True) > quality(False) + 0.1).all()


# --- annotators -----------------------------------------------------------------------------------


def test_votes_have_the_probabilities_of_bradley_terry_with_ties() -> None:
    rng = np.random.default_rng(0)
    for margin in (-2.0, 0.0, 1.0):
        votes = vote(np.full(20000, margin), rng)
        a, b = 1 / (1 + THETA * np.exp(-margin)), 1 / (1 + THETA * np.exp(margin))
        assert [np.mean(votes == v) for v in (1, 0, -1)] == pytest.approx([a, 1 - a - b, b], abs=0.015)


def test_annotators_prefer_the_better_video() -> None:
    rng = np.random.default_rng(0)
    ratings = [annotate(np.ones(3), np.zeros(3), rng) for _ in range(50)]
    assert np.mean([[word == "A" for word in rating["labels"]] for rating in ratings]) > 0.95
    assert np.mean([np.subtract(*rating["scores"]) for rating in ratings]) > 2.5
    ratings = [annotate(np.full(3, 0.5), np.full(3, 0.5), rng) for _ in range(200)]
    counts = Counter(word for rating in ratings for word in rating["labels"])
    assert counts["same"] > counts["A"]
    assert 0.7 < counts["A"] / counts["B"] < 1.4


def test_biased_raters_vote_as_others_do_and_score_by_their_own_scale() -> None:
    """Votes and labels are the same, whoever votes: what a rater perceives does not depend on the scale."""
    qualities = np.random.default_rng(1).random((400, 2, 3))

    def ratings(raters: list[Rater]) -> list[dict]:
        rng = np.random.default_rng(2)
        return [annotate(a, b, rng, raters) for a, b in qualities]

    plain = ratings(list(TEAM))
    biased = ratings([Rater("low", -1.0), Rater("narrow", 0.0, 0.5), Rater("own", 0.0), Rater("last")])
    for one, other in zip(plain, biased):
        assert one["labels"] == other["labels"]
        assert [v["choices"] for v in one["votes"]] == [v["choices"] for v in other["votes"]]
    assert [v["annotator"] for v in biased[0]["votes"]][:3] == ["low", "narrow", "own"]

    def scores(found: list[dict], rater: int) -> np.ndarray:
        return np.array([[*row.values()] for one in found for row in one["votes"][rater]["scores"].values()])

    assert scores(plain, 2).tolist() == scores(biased, 2).tolist()
    assert scores(plain, 0).mean() - scores(biased, 0).mean() == pytest.approx(0.85, abs=0.1)  # less at the lower end
    assert scores(biased, 1).std() < 0.75 * scores(plain, 1).std()


def test_the_votes_of_before_are_the_votes_of_now() -> None:
    """Raters without a bias draw what annotators drew before raters had names: results of a seed do not move."""
    rng = np.random.default_rng(3)
    found = [annotate(*rng.random((2, 3)), rng) for _ in range(300)]
    plain = [[r["labels"], [[*v["choices"].values()] for v in r["votes"]], r["scores"]] for r in found]
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    assert digest == "07d831c99274c009ef3adb583f8bf985bff6ac220c7020f6aa4461980b1f610a"
    assert rng.random() == 0.4827272550593176


def test_a_pool_has_the_bias_that_is_asked_for() -> None:
    pools = [rater_pool(bias, np.random.default_rng(4), 4000) for bias in (0.0, 0.45, 0.9)]
    assert {(r.level, r.spread) for r in pools[0]} == {(0.0, 1.0)}
    assert np.std([r.level for r in pools[1]]) == pytest.approx(0.45, rel=0.05)
    assert np.std(np.log([r.spread for r in pools[1]])) == pytest.approx(0.15, rel=0.05)
    assert [r.level for r in pools[2]] == pytest.approx([2 * r.level for r in pools[1]])
    assert len({r.name for r in pools[0]}) == 4000


def test_simulated_raters_are_like_those_of_public_sets() -> None:
    """The estimates of PUBLIC_BIAS and of the slopes, made on simulated scores of every rater for every video."""
    rng = np.random.default_rng(5)
    raters, true = rater_pool(PUBLIC_BIAS, rng, 60), rng.uniform(0.15, 0.85, 400)
    scores = np.stack([np.clip(np.rint(r.points(true) + rng.normal(0, SCORE_NOISE, 400)), 1, 5) for r in raters], 1)
    level = scores.mean(0).std(ddof=1)  # of 400 videos: no sampling error to speak of
    slopes = [np.polyfit(np.delete(scores, i, 1).mean(1), scores[:, i], 1)[0] for i in range(60)]
    assert level == pytest.approx(0.45, abs=0.1)
    assert np.std(slopes) == pytest.approx(0.15, abs=0.05)


def test_hard_prompts_are_perceived_with_more_noise() -> None:
    found = difficulties([f"prompt {i % 500}" for i in range(1000)], np.random.default_rng(6))
    assert len(found) == 500 and np.std(np.log([*found.values()])) == pytest.approx(DIFFICULTY, rel=0.15)

    def wrong(difficulty: float) -> float:
        rng = np.random.default_rng(7)
        rated = [annotate(np.full(3, 0.6), np.full(3, 0.4), rng, difficulty=difficulty) for _ in range(400)]
        return np.mean([[word == "B" for word in one["labels"]] for one in rated])

    assert wrong(4.0) > wrong(1.0) + 0.03


def test_scores_are_means_of_three(world: Path) -> None:
    for record in records(world / "train"):
        given = [vote["scores"] for vote in record["votes"][:3]]
        assert record["scores"]["B"]["MQ"] == pytest.approx(np.mean([s["B"]["MQ"] for s in given]), abs=1e-3)
        for row in record["scores"].values():
            assert all(abs(score * 3 - round(score * 3)) < 0.01 for score in row.values())


def test_words_cover_votes() -> None:
    assert set(WORDS) == {1, 0, -1} and set(WORDS.values()) == {"A", "same", "B"}


def test_decoded_clips_look_like_the_rendered_ones() -> None:
    """Compression keeps what the flaws are about."""
    rng = np.random.default_rng(0)
    for flaws in (Flaws(), Flaws(fade=0.8), Flaws(stain=0.5), Flaws(jump=0.7)):
        rendered = render(SCENES[0], flaws, rng)
        sampling = FrameSampling(fps=8.0, min_pixels=0)
        video = decode(encode(rendered, FPS), sampling, 16).permute(0, 2, 3, 1).numpy()
        assert video.shape == (8, SIZE, SIZE, 3)
        # colours are stored at half the resolution, so edges of the sprite differ; brightness must not
        grey = (video.astype(float) - rendered[sampling.indices(FRAMES, FPS)]).mean(-1)
        assert np.abs(grey).mean() < 4
