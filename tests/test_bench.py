"""Benchmarks: their metrics and published numbers, resumable scoring of videos, and `videoalign bench`."""

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import lightning  # noqa: F401  its logger keeps the stderr of the moment: the session's, not one test's
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from videoalign import VideoAlignError
from videoalign.callbacks.reward_rows import read_rewards
from videoalign.cli import main
from videoalign.commands.benchmarking import fingerprint, report
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.shards import ShardError, ShardSet, ShardWriter
from videoalign.datamodules.stream import in_turn
from videoalign.datamodules.video import decode, encode
from videoalign.datamodules.video_list import Listed, VideoList, by_length, videos_of
from videoalign.models import VideoReward
from videoalign.models.benchmark_protocols import PROTOCOLS, accuracy_four_way, official_accuracy_with_ties
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.preference import accuracy_with_ties
from videoalign.models.processor import RewardProcessor, processor_of
from videoalign.models.published import VIDEOREWARD
from videoalign.models.video_reward import Statistics

DIMENSIONS, COLUMNS = ("VQ", "MQ", "TA"), ("VQ", "MQ", "TA", "Overall")
VALUES = {"A": 1, "B": -1, "same": 0}
VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "same", "bothbad_vote": "same"}
STD = (0.5, 2.0, 0.25)
BATCH = 2


# --- the official metric ----------------------------------------------------------------------------------------


def walk(labels: list, margins: list) -> float:
    """The official script's walk, word for word of the docstring: each pair that was passed is called a tie."""
    n, best, passed = len(labels), -1, set()
    for number in sorted(range(n), key=lambda i: abs(margins[i])):
        passed.add(number)
        best = max(best, sum(labels[i] == 0 if i in passed else labels[i] * margins[i] > 0 for i in range(n)))
    return best / n


def exact(labels: list, margins: list, least: float = -1.0) -> float:
    """The best over thresholds from ``least`` on that make a difference; -1 calls no pair a tie."""
    candidates = [e for e in (-1.0, *map(abs, margins)) if e >= least]
    return max(
        sum(y == 0 if abs(m) <= e else y * m > 0 for y, m in zip(labels, margins)) / len(labels) for e in candidates
    )


def random_pairs(seed: int, kind: str) -> tuple[list, list]:
    rng = np.random.default_rng(seed)
    n, tie = int(rng.integers(1, 14)), rng.choice([0.0, 0.3, 0.7])
    labels = rng.choice([-1, 0, 1], n, p=[(1 - tie) / 2, tie, (1 - tie) / 2])
    margins = {
        "repeated": rng.integers(-3, 4, n).astype(float),
        "continuous": rng.normal(size=n),
        "right": labels * rng.integers(1, 3, n) * 1.0,
        "zeros": np.zeros(n),
    }[kind]
    return labels.tolist(), margins.tolist()


@pytest.mark.parametrize("kind", ["repeated", "continuous", "right", "zeros"])
def test_official_metric_is_the_walk(kind):
    for seed in range(150):
        labels, margins = random_pairs(seed, kind)
        got = official_accuracy_with_ties(torch.tensor(labels), torch.tensor(margins, dtype=torch.double))
        assert got == pytest.approx(walk(labels, margins), abs=1e-12)
        assert got >= exact(labels, margins, least=0.0) - 1e-12  # every threshold of its own is among the steps
        assert got >= np.mean(np.array(labels) == 0) - 1e-12  # its last step is the always-tie floor


@pytest.mark.parametrize(
    ("labels", "margins", "official", "best"),
    [
        ([1], [0.5], 0.0, 1.0),  # "no tie at all" is no candidate: lower
        ([1, -1, 0], [0.5, -0.6, 9.0], 1 / 3, 2 / 3),
        ([0, 1], [1.0, 1.0], 1.0, 0.5),  # a threshold inside the run of equal margins: higher
        ([1, 0], [1.0, 1.0], 0.5, 0.5),  # the same pairs in another order
        ([0, -1, 1], [0.0, 0.0, 2.0], 2 / 3, 2 / 3),  # zero margins: the decided one is wrong whatever it is called
    ],
)
def test_official_metric_differs_from_the_exact_one_either_way(labels, margins, official, best):
    assert official_accuracy_with_ties(labels, margins) == pytest.approx(official)
    assert accuracy_with_ties(labels, margins) == pytest.approx(best)


def test_ties_first_inflate_the_official_metric_and_not_the_exact_one():
    rng = np.random.default_rng(0)
    labels, margins = rng.choice([-1, 0, 1], 300), rng.integers(-2, 3, 300).astype(float)
    first = np.argsort(np.abs(labels), kind="stable")
    assert official_accuracy_with_ties(labels[first], margins[first]) > accuracy_with_ties(labels, margins) + 0.05
    assert (
        official_accuracy_with_ties(labels[first[::-1]], margins[first[::-1]])
        < accuracy_with_ties(labels, margins) + 0.01
    )


def test_without_repeated_margins_the_two_metrics_differ_by_one_pair_at_most():
    lower = 0
    for seed in range(300):
        labels, margins = random_pairs(seed, "continuous")
        pairs = len(labels) * (accuracy_with_ties(labels, margins) - official_accuracy_with_ties(labels, margins))
        assert round(pairs, 9) in (0, 1)
        lower += pairs > 0.5
    assert 0 < lower < 300


def test_official_metric_of_nothing_is_undefined():
    assert math.isnan(official_accuracy_with_ties([], []))


# --- four-way scoring -------------------------------------------------------------------------------------------


def four_way(votes: list, margins: list, levels: list) -> float:
    """Accuracy by the definition, over every pair of thresholds."""
    best = 0
    for epsilon, level in itertools.product((-1.0, *map(abs, margins)), (*levels, math.inf)):
        answers = (
            ("tievote" if high >= level else "bothbad_vote")
            if abs(m) <= epsilon
            else "leftvote"
            if m > 0
            else "rightvote"
            if m < 0
            else None
            for m, high in zip(margins, levels)
        )
        best = max(best, sum(answer == vote for answer, vote in zip(answers, votes)))
    return best / len(votes)


def random_votes(seed: int, kind: str) -> tuple[list, list, list]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    votes = rng.choice(list(VOTES), n, p=rng.dirichlet([1.0] * 4)).tolist()
    if kind == "continuous":
        return votes, rng.normal(size=n).tolist(), rng.normal(size=n).tolist()
    return votes, rng.integers(-2, 3, n).tolist(), rng.integers(-1, 3, n).tolist()


@pytest.mark.parametrize("kind", ["repeated", "continuous"])
def test_four_way_accuracy_is_the_best_of_both_thresholds(kind):
    for seed in range(150):
        votes, margins, levels = random_votes(seed, kind)
        got = accuracy_four_way(votes, torch.tensor(margins, dtype=torch.double), torch.tensor(levels))
        assert got == pytest.approx(four_way(votes, margins, levels), abs=1e-12)
        assert got == accuracy_four_way(votes, margins, [level + 1024 for level in levels])  # the scale's zero is free
        assert got >= max(votes.count("tievote"), votes.count("bothbad_vote")) / len(votes)  # one answer for all


def test_four_way_accuracy_of_a_perfect_scorer_is_one():
    votes = [*VOTES] * 5
    margins = [{"leftvote": 2.0, "rightvote": -2.0}.get(vote, 0.1 * (-1) ** i) for i, vote in enumerate(votes)]
    levels = [{"tievote": 1.5, "bothbad_vote": -1.5}.get(vote, 0.0) for vote in votes]
    assert accuracy_four_way(votes, margins, levels) == 1.0
    assert accuracy_four_way(votes, margins, [-level for level in levels]) < 1.0
    assert math.isnan(accuracy_four_way([], [], []))


# --- protocols --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("benchmark", "column", "method", "cell"),
    [
        ("videogen-rewardbench", "Overall", VIDEOREWARD, (73.59, 61.26)),
        ("videogen-rewardbench", "VQ", "VisionReward", (59.03, 47.43)),
        ("videogen-rewardbench", "MQ", "VideoScore", (51.09, 59.05)),
        ("videogen-rewardbench", "TA", "LiFT", (55.43, 33.79)),
        ("videogen-rewardbench", "TA", "random", (50.40, 37.25)),
        ("genai-bench", "Overall", VIDEOREWARD, (72.89, 49.41)),
        ("genai-bench", "Overall", "VisionReward", (72.41, 51.56)),
    ],
)
def test_published_numbers_are_without_and_with_ties(benchmark, column, method, cell):
    assert PROTOCOLS[benchmark].published[column][method] == cell


@pytest.mark.parametrize(
    ("benchmark", "columns", "pixels", "overall"),
    [("videogen-rewardbench", set(COLUMNS), 448 * 448, "sum"), ("genai-bench", {"Overall"}, 256 * 256, "TA")],
)
def test_protocols_are_whole(benchmark, columns, pixels, overall):
    protocol = PROTOCOLS[benchmark]
    assert set(protocol.columns) == set(protocol.published) == columns and protocol.overall == overall
    assert (protocol.sampling.fps, protocol.sampling.max_pixels) == (2.0, pixels)
    methods = {VIDEOREWARD, "VisionReward", "LiFT", "VideoScore", "random"}
    for column, rows in protocol.published.items():
        assert set(rows) == methods, column
        assert all(0 < with_ties < 100 and 0 < without < 100 for without, with_ties in rows.values())
        assert rows["random"][0] == pytest.approx(50, abs=0.6)
        assert max(rows, key=lambda method: rows[method][0]) == VIDEOREWARD  # without ties; the paper's claim


def test_command_line_knows_the_protocols(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--benchmark", "none", "--model", "m", "--data", "d"])
    message = capsys.readouterr().err
    assert len(PROTOCOLS) == 2 and all(name in message for name in PROTOCOLS)


# --- sets and models --------------------------------------------------------------------------------------------


def clip(seed: int, frames: int, height: int = 32, width: int = 32, fps: int = 8) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    return encode(noise, fps)


@dataclass
class Sample:
    """A video of a set."""

    key: str
    content: bytes
    record: dict


def samples(frames: tuple[int, ...], height: int = 32, width: int = 32, fps: int = 8) -> list[Sample]:
    return [
        Sample(
            f"{i:06d}",
            clip(i, count, height, width + 16 * (i % 2), fps),
            {
                "prompt": f"a red circle number {i}",
                "num_frames": count,
                "fps": float(fps),
                "height": height,
                "width": width + 16 * (i % 2),
            },
        )
        for i, count in enumerate(frames)
    ]


def write(folder: Path, videos: list[Sample], rows: list[dict] | None = None) -> Path:
    with ShardWriter(folder, "videos", per_shard=4) as writer:
        for video in videos:
            writer.write(video.key, {"": video.content}, video.record)
        if rows:
            writer.write_table("pairs.csv", rows)
    return folder


def rated(count: int, seed: int = 0, **fixed: str) -> list[dict]:
    """Every pair of the first ``count`` videos, with labels of every kind."""
    rng = np.random.default_rng(seed)
    rows = []
    for a, b in itertools.combinations(range(count), 2):
        vote = str(rng.choice(list(VOTES)))
        words = {c: str(rng.choice(["A", "B", "same", "invalid", ""], p=[0.3, 0.3, 0.2, 0.1, 0.1])) for c in DIMENSIONS}
        rows.append(
            {
                "key_A": f"{a:06d}",
                "key_B": f"{b:06d}",
                "prompt": f"p {a} {b}",
                "A_model": f"maker-{a % 3}",
                "B_model": f"maker-{b % 4}",
                **words,
                "Overall": VOTES[vote],
                "vote_type": vote,
                **fixed,
            }
        )
    return rows


RATED, SEED = 7, 1


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, backbone: Path, sampling: FrameSampling) -> Path:
    """A reward model, and a set of eight videos in two shards, seven of them rated. Read only."""
    folder = tmp_path_factory.mktemp("kit")
    torch.manual_seed(0)
    network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    network.statistics = Statistics([1.0, 2.0, 3.0], list(STD))
    network.save_pretrained(folder / "model")
    write(folder / "world", samples((5, 9, 12, 7, 16, 10, 14, 8)), rated(RATED, SEED))
    return folder


@pytest.fixture
def processor(kit: Path) -> RewardProcessor:
    return processor_of(kit / "model")


def run(*args: object) -> int:
    """Call a command; the exit status."""
    try:
        main([str(a) for a in args])
    except SystemExit as done:
        return done.code or 0
    return 0


def bench(kit: Path, out: Path, *options: object, data: Path | str = "world", model: str = "model") -> int:
    return run(
        "bench",
        "--model",
        kit / model,
        "--data",
        kit / data,
        "--out",
        out,
        "--device",
        "cpu",
        "--workers",
        0,
        "--batch-size",
        BATCH,
        *options,
    )


def strict(text: str) -> dict:
    """JSON without the NaN that Python would let pass."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass
class Run:
    """What a run of the command left."""

    out: Path
    text: str
    name: str = "world"

    @property
    def result(self) -> dict:
        return strict((self.out / f"{self.name}.json").read_text())

    @property
    def rewards(self) -> dict[str, list[float]]:
        return read_rewards(self.out / self.name)


@pytest.fixture(scope="module")
def finished(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A finished run with the given options, each made once and the one without options at once. Read only."""
    runs: dict[tuple, Run] = {}

    def get(*options: object) -> Run:
        if options not in runs:
            out, text = tmp_path_factory.mktemp("out"), io.StringIO()
            with contextlib.redirect_stdout(text):
                assert bench(kit, out, *options) == 0
            runs[options] = Run(out, text.getvalue())
        return runs[options]

    get()
    return get


VGRB, GENAI = ("--benchmark", "videogen-rewardbench"), ("--benchmark", "genai-bench")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """Grids of the videos of every forward pass: (patches in time, height, width)."""
    seen, forward = [], VideoReward.forward

    def spied(self: VideoReward, **inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs["video_grid_thw"].tolist())
        return forward(self, **inputs)

    monkeypatch.setattr(VideoReward, "forward", spied)
    return seen


def lines(folder: Path) -> list[str]:
    """Lines of all ranks, sorted."""
    return sorted(line for path in folder.glob("rewards.*.jsonl") for line in path.read_text().splitlines())


# --- videos of a set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media", ["mp4", "frames"])
def test_every_video_is_found_with_its_bytes(media, kit, processor, tmp_path):
    folder = kit / "world"
    if media == "frames":
        folder = tmp_path / "frames"
        assert (
            run("shards", "encode-frames", kit / "world", "--out", folder, "--model", kit / "model", "--workers", 1)
            == 0
        )
    found, source = videos_of(ShardSet(folder), processor), {raw.key: raw for raw in ShardSet(kit / "world")}
    assert found.keys() == source.keys() and len(found) == 8
    for key, raw in source.items():
        video = found[key]
        assert (video.name, video.prompt) == (key, raw.record()["prompt"])
        want = decode(raw.members["mp4"], processor.sampling, processor.factor)
        torch.testing.assert_close(video.frames(processor), want, rtol=0, atol=0)
        assert video.length == want.shape[0] * want.shape[2] * want.shape[3]  # pixels, as the record tells


@pytest.mark.parametrize(
    "change",
    [{"height": None}, {"fps": None}, {"num_frames": "many"}, {"num_frames": 1}, {"width": 32 * 201}],
    ids=str,
)
def test_where_the_record_does_not_tell_the_length_is_the_size_in_bytes(change, processor, tmp_path):
    videos = [replace(v, record={**v.record, **change}) for v in samples((5, 9))]
    found = videos_of(ShardSet(write(tmp_path / "set", videos)), processor)
    assert [found[v.key].length for v in videos] == [len(v.content) for v in videos]


def rewrite(folder: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Change the members of the first shard, and let the index agree about its size."""
    path = folder / "000000.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))


def without_contents(folder: Path) -> None:
    """As a set of an earlier release, whose shards are walked through."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard.pop("contents")
    (folder / "index.json").write_text(json.dumps(index))


def overwrite_header(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "000000.tar"
        with tarfile.open(path) as tar:
            place = min(member.offset for member in tar if member.name.startswith(key))
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x" * 512)

    return change


NOT_THE_INDEX = r"000000\.tar.*(index says|has members|occurs twice|do not stand together).*shards verify"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (overwrite_header("000000"), r"000000\.tar cannot be read"),
        (overwrite_header("000002"), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: m[:-2]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [x for x in m if x[0] != "000001.json"]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [x for x in m if x[0] != "000001.mp4"]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [(n.replace("000001.j", "000009.j"), c) for n, c in m]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [(n.replace("000001.", "000000."), c) for n, c in m]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [(n.replace("000001.", "000005."), c) for n, c in m]), "'000005' occurs twice"),
        (lambda f: rewrite(f, lambda m: [(n, b"{" if n == "000001.json" else c) for n, c in m]), "'000001'.*not valid"),
        (
            lambda f: rewrite(f, lambda m: [(n, b"{}" if n == "000001.json" else c) for n, c in m]),
            "'000001'.*no prompt",
        ),
    ],
    ids=[
        "first header",
        "later header",
        "sample lost",
        "record lost",
        "video lost",
        "record of another key",
        "key twice",
        "key in two shards",
        "record no JSON",
        "no prompt",
    ],
)
def test_damaged_shards_are_refused(damage, words, kit, processor, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(kit / "world", folder)
    damage(folder)
    without_contents(folder)
    with pytest.raises(ShardError, match=words):
        videos_of(ShardSet(folder), processor)


def test_a_flipped_bit_of_a_video_is_noticed(kit, processor, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(kit / "world", folder)
    span = ShardSet(folder).contents()[1].spans["mp4"]
    with open(folder / "000000.tar", "r+b") as file:
        file.seek(span.start + span.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    found = videos_of(ShardSet(folder), processor)
    for number, video in enumerate(found.values()):
        if number == 1:
            with pytest.raises(ShardError, match=r"000000\.tar, key '000001', mp4: its bytes are not those"):
                video.frames(processor)
        else:
            video.frames(processor)


# --- batches of videos ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 12, 50])
def test_batches_hold_every_number_once(size):
    lengths = np.random.default_rng(size).integers(1, 5, 12)
    videos = [Listed(f"v{i:02d}", "p", "x", length=float(n)) for i, n in enumerate(lengths)]
    for batches in (in_turn(12, size), by_length(videos, size)):
        assert sorted(number for batch in batches for number in batch) == list(range(12))
        assert [len(batch) for batch in batches] == [size] * (12 // size) + [12 % size] * (12 % size > 0)
    assert list(itertools.chain(*in_turn(12, size))) == list(range(12))
    order = [number for batch in by_length(videos, size) for number in batch]
    assert [lengths[number] for number in order] == sorted(lengths, reverse=True)


def test_batches_by_length_do_not_depend_on_the_order_of_the_list():
    videos = [Listed(f"v{i}", "p", "x", length=float(i // 3)) for i in range(10)]
    want = [[videos[number].name for number in batch] for batch in by_length(videos, 3)]
    for seed in range(5):
        moved = [videos[i] for i in np.random.default_rng(seed).permutation(10)]
        assert [[moved[number].name for number in batch] for batch in by_length(moved, 3)] == want
    assert by_length([], 3) == []


def loaded(data: VideoList, processor: RewardProcessor, rank: int = 0, world: int = 1) -> list[dict]:
    """Batches of one rank."""
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        lightning_module=SimpleNamespace(processor=processor),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return list(data.predict_dataloader())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_videos_whatever_is_done(world, kit, processor):
    found = list(videos_of(ShardSet(kit / "world"), processor).values())
    batches = by_length(found, 3)
    whole = [[b["numbers"] for b in loaded(VideoList(found, batches, 0), processor, r, world)] for r in range(world)]
    assert sorted(number for share in whole for batch in share for number in batch) == list(range(8))
    for done in ({batches[0][0]}, set(batches[0]), {0, 3, 5, 7}, set(range(8))):
        for rank, share in enumerate(whole):
            left = [b["numbers"] for b in loaded(VideoList(found, batches, 0, done), processor, rank, world)]
            assert [batch for batch in left if batch] == [
                rest for batch in share if (rest := [n for n in batch if n not in done])
            ]


def test_unreadable_videos_and_prompts_are_left_out_by_name(kit, processor, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(clip(0, 5)[:200])
    (tmp_path / "good.mp4").write_bytes(clip(0, 5))
    good, cut = str(tmp_path / "good.mp4"), str(tmp_path / "cut.mp4")
    videos = [
        Listed("cut", "p", cut),
        Listed("good", "p", good),
        Listed("long", "red " * 5000, good),
        Listed("gone", "p", cut),
    ]
    mixed, lost = loaded(VideoList(videos, [[0, 1, 2], [3]], 0), processor)
    assert mixed["numbers"] == [1] and len(mixed["inputs"]["video_grid_thw"]) == 1
    assert [number for number, _ in mixed["dropped"]] == [0, 2]
    assert "cut" in mixed["dropped"][0][1] and "prompt 'red red" in mixed["dropped"][1][1]
    assert "inputs" not in lost and lost["dropped"][0][0] == 3


# --- joining rewards --------------------------------------------------------------------------------------------


def table(kit: Path) -> tuple[Benchmark, torch.Tensor]:
    found = Benchmark(kit / "world")
    return found, torch.arange(RATED * 3.0).reshape(RATED, 3) ** 2


def test_margins_are_reward_a_minus_reward_b(kit):
    found, rewards = table(kit)
    margins, whole = found.margins(rewards)
    by_key = dict(zip(found.keys, rewards))
    want = [by_key[row["key_A"]] - by_key[row["key_B"]] for row in found.rows]
    torch.testing.assert_close(margins, torch.stack(want), rtol=0, atol=0)
    assert whole.all() and len(margins) == RATED * (RATED - 1) // 2


def test_pairs_of_videos_without_rewards_are_marked(kit):
    found, rewards = table(kit)
    rewards[2] = math.nan
    _, whole = found.margins(rewards)
    assert whole.tolist() == [found.keys[2] not in (row["key_A"], row["key_B"]) for row in found.rows]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_rewards_that_are_not_finite_have_no_margins(value, kit):
    found, rewards = table(kit)
    rewards[3, 1] = value
    with pytest.raises(VideoAlignError, match=rf"mine: the rewards of 1 videos are not finite.*{found.keys[3]}"):
        found.margins(rewards, "mine")


# --- rewards on disk --------------------------------------------------------------------------------------------

LINE = '{"key": "a", "VQ": 1.5, "MQ": -2, "TA": 0.25}\n'


def test_rewards_of_all_ranks_are_read_up_to_the_last_whole_line(tmp_path):
    (tmp_path / "rewards.0.jsonl").write_text(LINE + LINE.replace('"a"', '"b"')[:-1])  # whole, but for its end
    (tmp_path / "rewards.1.jsonl").write_text(LINE.replace('"a"', '"c"') + '{"key": "d", "VQ": 1.')
    (tmp_path / "rewards.2.jsonl").write_text("")
    assert read_rewards(tmp_path) == {"a": [1.5, -2.0, 0.25], "c": [1.5, -2.0, 0.25]}
    assert read_rewards(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "line",
    [
        LINE[:20] + "\n",
        LINE.replace("TA", "ta"),
        LINE.replace("-2", "null"),
        LINE.replace("-2", '"x"'),
        "[1, 2]\n",
        "\n",
        LINE.replace('"key": "a", ', ""),
        "\x00\x00\x00\n",
    ],
    ids=["cut", "no TA", "null", "word", "list", "empty", "no key", "zeros"],
)
def test_a_damaged_whole_line_is_refused(line, tmp_path):
    (tmp_path / "rewards.0.jsonl").write_text(LINE + line + LINE)
    with pytest.raises(VideoAlignError, match=r"rewards\.0\.jsonl holds a line that is no reward"):
        read_rewards(tmp_path)


def test_a_line_that_was_cut_is_overwritten(kit, finished, forwards, tmp_path):
    shutil.copytree(finished().out / "world", tmp_path / "world")
    file = tmp_path / "world" / "rewards.0.jsonl"
    file.write_bytes(file.read_bytes()[:-25])
    assert bench(kit, tmp_path) == 0
    assert len(forwards) == 1 and len(forwards[0]) == 1
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == list(finished().rewards)
    for key, rewards in Run(tmp_path, "").rewards.items():
        assert rewards == pytest.approx(finished().rewards[key], abs=1e-5)


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_weights(kit: Path, tmp: Path) -> list:
    network = VideoReward.from_pretrained(kit / "model")
    with torch.no_grad():
        network.head.weight[1] += 0.5
    network.save_pretrained(tmp / "changed")
    return ["--model", tmp / "changed"]


def other_record(change: Callable[[dict], object]) -> Callable[[Path, Path], list]:
    def prepare(kit: Path, tmp: Path) -> list:
        shutil.copytree(kit / "model", tmp / "changed")
        change_json(tmp / "changed" / "reward.json", lambda record: (record.pop("sha256"), change(record)))
        return ["--model", tmp / "changed"]

    return prepare


def other_template(kit: Path, tmp: Path) -> list:
    shutil.copytree(kit / "model", tmp / "changed")
    text = tmp / "changed" / "template.txt"
    text.write_text("Judge: " + text.read_text())
    return ["--model", tmp / "changed"]


def other_data(kit: Path, tmp: Path) -> list:
    videos = samples((5, 9, 12, 7, 16, 10, 14, 8))
    videos[0].content = clip(99, 5)
    return ["--data", write(tmp / "data" / "world", videos, rated(RATED, SEED))]


CHANGES = {
    "weights": other_weights,
    "sampling": other_record(lambda record: record["sampling"].update(fps=4.0)),
    "positions": other_record(lambda record: record["settings"].update(positions="1d")),
    "template": other_template,
    "dtype": lambda kit, tmp: ["--dtype", "bfloat16"],
    "data": other_data,
}


@pytest.mark.parametrize(
    ("what", "whole"),
    [*((what, False) for what in CHANGES), *(pytest.param(what, True) for what in ("weights", "sampling", "data"))],
    ids=lambda value: {True: "all scored", False: "some left"}.get(value, value),
)
def test_rewards_of_something_else_are_refused(what, whole, kit, finished, tmp_path, capsys):
    """Whether or not videos are left to score: reusing them would report one model's rewards as another's."""
    out = tmp_path / "out"
    shutil.copytree(finished().out / "world", out / "world")
    file = out / "world" / "rewards.0.jsonl"
    if not whole:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:BATCH]))
    before = file.read_bytes()
    options = [str(o) for o in CHANGES[what](kit, tmp_path)]
    given = {"--model": str(kit / "model"), "--data": str(kit / "world")} | dict(zip(options[::2], options[1::2]))
    capsys.readouterr()
    assert (
        run(
            "bench",
            *itertools.chain(*given.items()),
            "--out",
            out,
            "--device",
            "cpu",
            "--workers",
            0,
            "--batch-size",
            BATCH,
        )
        == 2
    )
    captured = capsys.readouterr()
    differ = {"dtype": "dtype, weights"}.get(what, what)  # bfloat16 weights are other weights, too
    assert f"holds rewards of another run ({differ} differ)" in captured.err and "Name another --out" in captured.err
    assert file.read_bytes() == before and not captured.out and not (out / "world.json").exists()


@pytest.mark.parametrize("place", [0, pytest.param(-1)])
def test_any_changed_weight_changes_the_fingerprint(place, kit):
    network = VideoReward.from_pretrained(kit / "model")
    assert fingerprint(network) == fingerprint(VideoReward.from_pretrained(kit / "model"))
    before, largest = fingerprint(network), max(network.parameters(), key=torch.numel)
    with torch.no_grad():
        largest.view(-1)[place] += 1.0
    assert fingerprint(network) != before


# --- interrupted and repeated scoring ---------------------------------------------------------------------------


@pytest.fixture
def keep_signals() -> Iterator[None]:
    """Lightning ignores further Ctrl+C once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def stopping(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let the forward pass number ``after`` fail."""
    forward, calls = VideoReward.forward, itertools.count()

    def failing(self: VideoReward, **inputs: torch.Tensor) -> torch.Tensor:
        if next(calls) >= after:
            raise error
        return forward(self, **inputs)

    monkeypatch.setattr(VideoReward, "forward", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl+C", "error"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_interrupted_scoring_goes_on_where_it_stopped(
    after, error, kit, finished, forwards, keep_signals, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stopping(patch, after, error)
        with contextlib.suppress(RuntimeError):
            assert bench(kit, tmp_path) != 0
    assert not (tmp_path / "world.json").exists() and len(lines(tmp_path / "world")) == after * BATCH
    already = set(read_rewards(tmp_path / "world"))
    forwards.clear()
    assert bench(kit, tmp_path) == 0
    assert sum(map(len, forwards)) == RATED - after * BATCH and len(forwards) == math.ceil(RATED / BATCH) - after
    again = Run(tmp_path, "")
    assert already <= again.rewards.keys() and lines(tmp_path / "world") == lines(finished().out / "world")
    assert again.result == finished().result


def test_ctrl_c_while_scoring_ends_with_the_status_of_ctrl_c(kit, keep_signals, tmp_path, monkeypatch):
    stopping(monkeypatch, 1, KeyboardInterrupt())
    assert bench(kit, tmp_path) == 130


def test_a_finished_run_is_not_scored_again(kit, finished, forwards, tmp_path):
    shutil.copytree(finished().out / "world", tmp_path / "world")
    assert bench(kit, tmp_path) == 0
    assert not forwards and Run(tmp_path, "").result == finished().result


def test_every_rated_video_is_scored_once(kit, forwards, tmp_path):
    assert bench(kit, tmp_path) == 0
    assert [len(batch) for batch in forwards] == [2, 2, 2, 1]
    tokens = [math.prod(grid) for batch in forwards for grid in batch]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) > 3
    keys = [json.loads(line)["key"] for line in lines(tmp_path / "world")]
    assert keys == [f"{i:06d}" for i in range(RATED)]  # the eighth occurs in no pair


@pytest.mark.parametrize(
    "options", [("--batch-size", 1), ("--batch-size", 50), ("--workers", 2)], ids=lambda o: f"{o[0]} {o[1]}"
)
def test_batches_and_workers_do_not_change_the_rewards(options, kit, finished, tmp_path):
    assert bench(kit, tmp_path, *options) == 0
    rewards = Run(tmp_path, "").rewards
    assert rewards.keys() == finished().rewards.keys()
    for key, row in rewards.items():
        assert row == pytest.approx(finished().rewards[key], abs=1e-5)


def test_decoded_frames_give_the_rewards_of_their_videos(kit, finished, tmp_path):
    frames = tmp_path / "world"
    assert run("shards", "encode-frames", kit / "world", "--out", frames, "--model", kit / "model", "--workers", 1) == 0
    assert bench(kit, tmp_path / "out", data=frames) == 0
    assert Run(tmp_path / "out", "").rewards == finished().rewards


def test_decoded_frames_of_another_sampling_are_refused(kit, tmp_path, capsys):
    frames = tmp_path / "world"
    assert run("shards", "encode-frames", kit / "world", "--out", frames, "--model", kit / "model", "--workers", 1) == 0
    assert bench(kit, tmp_path / "out", *VGRB, data=frames) == 2
    assert "decoded for another model (fps: 8.0 stored, 2.0 wanted" in capsys.readouterr().err


def test_a_damaged_video_is_named_and_what_was_scored_before_stays(kit, finished, tmp_path, capsys):
    videos = samples((5, 9, 12, 7, 16, 10, 14, 8))
    shortest = min(videos[:RATED], key=lambda v: v.record["num_frames"] * v.record["width"])
    shortest.content = shortest.content[:300]
    write(tmp_path / "world", videos, rated(RATED, SEED))
    assert bench(kit, tmp_path / "out", data=tmp_path / "world") == 2
    captured = capsys.readouterr()
    assert captured.err.count("videoalign: error:") == 1 and f"video '{shortest.key}' cannot be scored" in captured.err
    assert "Traceback" not in captured.err and not captured.out
    want = {key: row for key, row in finished().rewards.items() if key != shortest.key}
    assert Run(tmp_path / "out", "").rewards == want and not (tmp_path / "out" / "world.json").exists()


def test_a_reward_that_is_not_finite_is_refused_with_its_video(kit, finished, tmp_path, monkeypatch, capsys):
    forward, calls = VideoReward.forward, itertools.count()

    def broken(self: VideoReward, **inputs: torch.Tensor) -> torch.Tensor:
        rewards = forward(self, **inputs)
        if next(calls) == 2:
            rewards[1, 2] = math.inf
        return rewards

    monkeypatch.setattr(VideoReward, "forward", broken)
    assert bench(kit, tmp_path) == 2
    scored = list(finished().rewards)
    assert f"the rewards of '{scored[5]}' are not finite" in capsys.readouterr().err
    assert sorted(Run(tmp_path, "").rewards) == sorted(set(scored) - {scored[5]})


# --- numbers ----------------------------------------------------------------------------------------------------


def scales(overall: str) -> list[float]:
    """What each dimension's margin is multiplied by in the overall one."""
    return [1 / s if overall in ("sum", d) else 0.0 for d, s in zip(DIMENSIONS, STD)]


def margins_by_hand(kit: Path, rewards: dict[str, list[float]], overall: str) -> list[tuple[dict, dict[str, float]]]:
    """Rows of the table, each with its margins by column."""
    result = []
    for row in Benchmark(kit / "world").rows:
        each = [a - b for a, b in zip(rewards[row["key_A"]], rewards[row["key_B"]])]
        total = sum(m * s for m, s in zip(each, scales(overall)))
        result.append((row, dict(zip(COLUMNS, (*each, total)))))
    return result


RUNS = {"own sampling": ((), "sum"), "videogen-rewardbench": (VGRB, "sum"), "genai-bench": (GENAI, "TA"),
        "genai-bench, sum": ((*GENAI, "--overall", "sum"), "sum"), "overall MQ": (("--overall", "MQ"), "MQ")}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_accuracies_are_those_of_the_rewards(name, kit, finished):
    options, overall = RUNS[name]
    done = finished(*options)
    assert done.result["overall"] == overall and done.result["videos"] == RATED
    assert done.result["protocol"] == (options[1] if "--benchmark" in options else None)
    pairs = margins_by_hand(kit, done.rewards, overall)
    for column in COLUMNS:
        known = [(VALUES[row[column]], m[column]) for row, m in pairs if row[column] in VALUES]
        labels, margins = zip(*known)
        decided = [label * margin > 0 for label, margin in known if label]
        row = done.result["accuracies"][column]
        assert row["without_ties"] == pytest.approx(np.mean(decided))
        assert row["with_ties"] == pytest.approx(exact(labels, margins))
        assert row["official"] == pytest.approx(walk(labels, margins))
        assert row["floor"] == pytest.approx(labels.count(0) / len(labels))
        assert (row["pairs"], row["decided"]) == (len(labels), len(decided))


@pytest.mark.parametrize("name", ["own sampling", "genai-bench"])
def test_sources_are_measured_on_the_pairs_they_take_part_in(name, kit, finished):
    options, overall = RUNS[name]
    done = finished(*options)
    pairs = margins_by_hand(kit, done.rewards, overall)
    assert set(done.result["sources"]) == {f"maker-{i}" for i in range(4)}
    for source, columns in done.result["sources"].items():
        own = [(row, m) for row, m in pairs if source in (row["A_model"], row["B_model"])]
        for column in COLUMNS:
            right = [VALUES[row[column]] * m[column] > 0 for row, m in own if VALUES.get(row[column])]
            assert columns.get(column, {"decided": 0})["decided"] == len(right)
            if right:
                assert columns[column]["without_ties"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(("options", "overall"), [((), "TA"), (("--overall", "sum"), "sum")])
def test_four_ways_are_measured_on_the_votes(options, overall, kit, finished, tmp_path, capsys):
    done = finished(*GENAI)
    shutil.copytree(done.out / "world", tmp_path / "world")
    assert bench(kit, tmp_path, *GENAI, "--ways", 4, *options) == 0
    found = Run(tmp_path, capsys.readouterr().out)
    pairs = margins_by_hand(kit, done.rewards, overall)
    votes = [row["vote_type"] for row, _ in pairs]
    totals = {key: sum(r * s for r, s in zip(row, scales(overall))) for key, row in done.rewards.items()}
    levels = [(totals[row["key_A"]] + totals[row["key_B"]]) / 2 for row, _ in pairs]
    four = found.result["four_way"]
    assert four["accuracy"] == pytest.approx(four_way(votes, [m["Overall"] for _, m in pairs], levels))
    assert four["shares"] == {vote: pytest.approx(votes.count(vote) / len(votes)) for vote in sorted(set(votes))}
    assert four["commonest"] == max(four["shares"].values()) and four["pairs"] == len(votes)
    assert f"four-way (left, right, both good, both bad): {four['accuracy']:.3f}" in found.text
    assert "four_way" not in done.result and "four-way" not in done.text


def judged(folder: Path, done: Run, vote: Callable[[list[float], list[float]], str]) -> Path:
    """The rated videos again, every pair with the vote that its rewards ask for."""
    rows = rated(RATED, SEED)
    for row in rows:
        row["vote_type"] = vote(done.rewards[row["key_A"]], done.rewards[row["key_B"]])
        row["Overall"] = VOTES[row["vote_type"]]
    return write(folder, samples((5, 9, 12, 7, 16, 10, 14)), rows)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_model_is_right_or_wrong_about_every_pair(share, kit, finished, tmp_path, capsys):
    """Labels from the model's own TA: exactly right, one pair less by the official metric, which says why; or all wrong."""
    sides = ["leftvote", "rightvote"] if share else ["rightvote", "leftvote"]
    judged(tmp_path / "judged", finished(*GENAI), lambda a, b: sides[a[2] < b[2]])
    assert bench(kit, tmp_path / "out", *GENAI, data=tmp_path / "judged") == 0
    text, row = capsys.readouterr().out, Run(tmp_path / "out", "", "judged").result["accuracies"]["Overall"]
    assert row["without_ties"] == row["with_ties"] == row["held_out"] == share and row["floor"] == 0.0
    assert row["official"] == pytest.approx(20 / 21 if share else 0.0)
    assert ("Overall: the official metric differs by -4.762: it never tries to call no pair a tie" in text) == bool(
        share
    )
    assert ("official metric differs" in text) == bool(share)


def test_both_good_is_told_from_both_bad_by_the_mean_of_the_two(kit, finished, tmp_path):
    means = [(a[2] + b[2]) / 2 for a, b in itertools.combinations(finished(*GENAI).rewards.values(), 2)]
    middle = sum(sorted(means)[10:12]) / 2
    vote = ["bothbad_vote", "tievote"]
    judged(tmp_path / "judged", finished(*GENAI), lambda a, b: vote[(a[2] + b[2]) / 2 > middle])
    assert bench(kit, tmp_path / "out", *GENAI, "--ways", 4, data=tmp_path / "judged") == 0
    four = Run(tmp_path / "out", "", "judged").result["four_way"]
    assert four["accuracy"] == 1.0 and four["shares"] == {"bothbad_vote": 11 / 21, "tievote": 10 / 21}


def test_four_ways_need_the_votes(kit, tmp_path, capsys):
    rows = [{k: v for k, v in row.items() if k != "vote_type"} for row in rated(2)]
    write(tmp_path / "voteless", samples((5, 7)), rows)
    assert bench(kit, tmp_path / "out", *GENAI, "--ways", 4, data=tmp_path / "voteless") == 2
    assert "voteless has no column vote_type" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "grid"),
    [((), [8, 40, 64]), (VGRB, [4, 40, 64]), (GENAI, [4, 24, 40])],
    ids=["own", "videogen-rewardbench", "genai-bench"],
)
def test_frames_are_sampled_as_the_protocol_says(options, grid, kit, forwards, tmp_path):
    """Four seconds of 512 x 320 pixels at 4 fps; patches are of 2 frames and 8 x 8 pixels, sides multiples of 16."""
    videos = samples((16, 16), 320, 512, fps=4)
    videos[1] = replace(videos[1], content=videos[0].content, record=videos[0].record)
    write(tmp_path / "large", videos, rated(2))
    assert bench(kit, tmp_path / "out", *options, data=tmp_path / "large") == 0
    assert forwards == [[grid, grid]]
    result = Run(tmp_path / "out", "", "large").result
    want = PROTOCOLS[options[1]].sampling if options else processor_of(kit / "model").sampling
    assert result["sampling"] == want.to_dict()


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        ("videogen-rewardbench", 32, 32),
        ("videogen-rewardbench", 720, 1280),
        ("genai-bench", 320, 512),
    ],
)
def test_no_frame_exceeds_the_pixel_budget(name, height, width):
    sampling = PROTOCOLS[name].sampling
    h, w = sampling.size(height, width, 28)
    assert h * w <= sampling.max_pixels


# --- what is printed and saved ----------------------------------------------------------------------------------


def printed(text: str, name: str) -> list[str]:
    """Cells of the line that begins with a name."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
    return line.removeprefix(name).split()


@pytest.mark.parametrize(
    ("options", "title"),
    [
        (VGRB, "VideoGen-RewardBench: 21 pairs of 7 videos, 2 fps, at most 200704 pixels (448 x 448)"),
        (GENAI, "GenAI-Bench (video): 21 pairs of 7 videos, 2 fps, at most 65536 pixels (256 x 256)"),
    ],
)
def test_published_rows_stand_beside_the_measured_one(options, title, finished):
    done, protocol = finished(*options), PROTOCOLS[options[1]]
    assert title in done.text
    assert (
        "overall is TA" if protocol.overall == "TA" else "overall is the sum of the normalised dimensions"
    ) in done.text
    rows = [done.result["accuracies"][column] for column in protocol.columns]

    def per_cent(*keys: Callable[[dict], float] | None) -> list[str]:
        return [f"{100 * key(row):.2f}" if key else "-" for row in rows for key in keys]

    assert printed(done.text, "measured") == per_cent(lambda r: r["without_ties"], lambda r: r["with_ties"])
    for end, name in (min, "  95 % from"), (max, "  95 % to"):
        ends = [f"{100 * end(row[kind]):.2f}" for row in rows for kind in ("interval", "interval_with_ties")]
        assert printed(done.text, name) == ends
    assert printed(done.text, "  by the official metric") == per_cent(
        lambda r: r["without_ties"], lambda r: r["official"]
    )
    assert printed(done.text, "  held-out threshold") == per_cent(None, lambda r: r["held_out"])
    assert printed(done.text, "always a tie") == per_cent(None, lambda r: r["floor"])
    assert printed(done.text, "  pairs") == [str(n) for row in rows for n in (row["decided"], row["pairs"])]
    for method in protocol.published["Overall"]:
        want = [f"{value:.2f}" for column in protocol.columns for value in protocol.published[column][method]]
        assert printed(done.text, method) == want
    for row in rows:
        assert row["interval"][0] <= row["without_ties"] <= row["interval"][1]
        assert row["interval_with_ties"][0] <= row["with_ties"] <= row["interval_with_ties"][1]


@pytest.mark.parametrize("options", [VGRB, GENAI], ids=lambda options: options[1])
def test_sources_are_printed(options, finished):
    done = finished(*options)
    for source, columns in done.result["sources"].items():
        cells = printed(done.text, source)
        assert [float(cell) for cell in cells[::2]] == [round(columns[c]["without_ties"], 3) for c in COLUMNS]
        assert cells[1::2] == [str(columns[c]["decided"]) for c in COLUMNS]


@pytest.mark.parametrize(
    ("official", "best", "shift"),
    [
        (0.65, 0.6, "+5.00"),
        (0.5, 0.6, "-10.00"),
        (0.6, 0.6, None),
        pytest.param(0.612537, 0.612575, "-0.0"),
    ],
)
def test_the_reason_stands_below_where_the_metrics_differ(official, best, shift, finished):
    result = finished(*GENAI).result
    result["accuracies"]["Overall"] |= {"official": official, "with_ties": best}
    text = report(result)
    assert printed(text, "measured")[1] == f"{100 * best:.2f}"
    assert printed(text, "  by the official metric")[1] == f"{100 * official:.2f}"
    reasons = [line for line in text.splitlines() if "the official metric differs" in line]
    assert len(reasons) == (shift is not None)
    if reasons:
        assert reasons[0].startswith(f"Overall: the official metric differs by {shift}")


def test_numbers_pictures_and_events_are_saved(finished):
    done = finished(*GENAI)
    assert set(done.result["accuracies"]) == set(COLUMNS) and done.result["statistics"]["std"] == list(STD)
    with Image.open(done.out / "world.png") as picture:
        assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 10
    events = EventAccumulator(str(done.out / "world"), size_guidance={"tensors": 0}).Reload()
    assert events.Tags()["images"] == ["bench/world"]
    (text,) = events.Tensors("bench/world/text_summary")
    shown = [line.strip() for line in text.tensor_proto.string_val[0].decode().splitlines() if line.strip()]
    assert "GenAI-Bench (video)" in shown[0] and all(line in done.text for line in shown)


def test_two_sets_are_measured_in_one_run(kit, finished, tmp_path, capsys):
    write(tmp_path / "second", samples((6, 11, 13), 48), rated(3, VQ="same", MQ="A", TA="B", Overall="same"))
    assert bench(kit, tmp_path / "out", *VGRB, "--data", tmp_path / "second") == 0
    text = capsys.readouterr().out
    assert text.count("VideoGen-RewardBench:") == 2 and "21 pairs of 7 videos" in text and "3 pairs of 3 videos" in text
    first, second = Run(tmp_path / "out", ""), Run(tmp_path / "out", "", "second")
    assert first.result == finished(*VGRB).result
    assert second.result["benchmark"] == "second" and len(second.rewards) == 3
    row = second.result["accuracies"]["Overall"]  # ties only: undefined, not wrong, and valid JSON
    assert row["without_ties"] is None and row["interval"] == [None, None] and row["with_ties"] == 1.0


@pytest.mark.parametrize("options", [VGRB, GENAI], ids=lambda options: options[1])
def test_a_set_without_overall_labels_is_no_public_benchmark(options, kit, forwards, tmp_path, capsys):
    write(tmp_path / "mine", samples((5, 7)), rated(2, VQ="A", MQ="A", TA="A", Overall=""))
    assert bench(kit, tmp_path / "out", *options, data=tmp_path / "mine") == 2
    title = PROTOCOLS[options[1]].title
    assert f"mine has no label in Overall, so it is not {title}" in capsys.readouterr().err
    assert not forwards and not (tmp_path / "out").exists()


def test_a_set_without_any_label_is_refused(kit, tmp_path, capsys):
    write(tmp_path / "mine", samples((5, 7)), rated(2, VQ="invalid", MQ="", TA="", Overall=""))
    assert bench(kit, tmp_path / "out", data=tmp_path / "mine") == 2
    assert "mine" in capsys.readouterr().err


def test_results_are_not_written_into_the_set(kit, tmp_path, capsys):
    shutil.copytree(kit / "world", tmp_path / "world")
    before = sorted(path.name for path in (tmp_path / "world").iterdir())
    assert bench(kit, tmp_path, data=tmp_path / "world") == 2
    assert "world is not a folder of rewards" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "world").iterdir()) == before


# --- two processes ----------------------------------------------------------------------------------------------


def two_processes(kit: Path, out: Path, *options: object, data: Path | str = "world") -> subprocess.CompletedProcess:
    """The installed command, with two gloo processes."""
    command = [
        Path(sys.executable).with_name("videoalign"),
        "bench",
        "--model",
        kit / "model",
        "--data",
        kit / data,
        "--out",
        out,
        "--device",
        "cpu",
        "--workers",
        0,
        "--batch-size",
        BATCH,
        "--devices",
        2,
        *options,
    ]
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_processes_share_the_videos_and_agree_with_one(kit, finished, forwards, tmp_path):
    """Two begin one set and take up another that one process left; one process takes up what two left."""
    whole, out = lines(finished().out / "world"), tmp_path / "out"
    shutil.copytree(kit / "world", tmp_path / "begun")
    shutil.copytree(finished().out / "world", out / "begun")
    begun = out / "begun" / "rewards.0.jsonl"
    begun.write_text("".join(f"{line}\n" for line in begun.read_text().splitlines()[:BATCH]))
    done = two_processes(kit, out, "--data", tmp_path / "begun")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout.count("7 pairs of") == 0 and done.stdout.count("21 pairs of 7 videos") == 2
    )  # printed by one process
    shares = [(out / "world" / f"rewards.{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert sorted(len(share) for share in shares) == [3, 4]  # batches of 2, 2, 2 and 1 in turn
    for name in ("world", "begun"):
        assert lines(out / name) == whole  # each video once, and to the last digit
        assert Run(out, "", name).result == {**finished().result, "benchmark": name}
    for rank in range(2):
        file = out / "world" / f"rewards.{rank}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:BATCH]))
    assert bench(kit, out) == 0
    assert sum(map(len, forwards)) == RATED - 2 * BATCH and lines(out / "world") == whole
    assert Run(out, "").result == finished().result


@pytest.mark.slow
def test_a_process_may_have_nothing_left_to_score(kit, finished, tmp_path):
    """Every interrupted run may come to this, and every run of fewer batches than processes."""
    shutil.copytree(finished().out / "world", tmp_path / "world")
    file = tmp_path / "world" / "rewards.0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    done = two_processes(kit, tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    assert (
        lines(tmp_path / "world") == lines(finished().out / "world") and Run(tmp_path, "").result == finished().result
    )


@pytest.mark.slow
def test_a_mistake_met_by_one_of_two_processes_is_one_message(kit, tmp_path):
    videos = samples((5, 9, 12, 7, 16, 10, 14, 8))
    order = sorted(videos[:RATED], key=lambda v: -v.record["num_frames"] * v.record["width"])
    order[BATCH].content = order[BATCH].content[:300]  # of the second process's first batch
    write(tmp_path / "world", videos, rated(RATED, SEED))
    done = two_processes(kit, tmp_path / "out", data=tmp_path / "world")
    assert done.stderr.count("cannot be scored") == 1 and done.stderr.count("videoalign: error:") == 1
    assert "Traceback" not in done.stderr and done.returncode == 2
