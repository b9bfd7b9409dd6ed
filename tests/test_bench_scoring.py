"""Scoring the videos of a benchmark: rewards on disk, and interrupted and repeated runs."""

import contextlib
import itertools
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench_kit import BATCH, RATED, SEED, VGRB, Run, bench, encode_frames, lines, rated, samples, write
from helpers import call, flags, noise_clip
from videoalign import VideoAlignError
from videoalign.callbacks.reward_rows import read_rewards
from videoalign.models import VideoReward
from videoalign.models.fingerprint import fingerprint

# --- rewards on disk ------------------------------------------------------------------------------

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
    videos[0].content = noise_clip(99, 5)
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
    """This holds whether or not videos are left: else one model's rewards would be reported as another's."""
    out = tmp_path / "out"
    shutil.copytree(finished().out / "world", out / "world")
    file = out / "world" / "rewards.0.jsonl"
    if not whole:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:BATCH]))
    before = file.read_bytes()
    options = [str(o) for o in CHANGES[what](kit, tmp_path)]
    given = {"--model": str(kit / "model"), "--data": str(kit / "world")} | dict(zip(options[::2], options[1::2]))
    rest = flags(out=out, device="cpu", workers=0, batch_size=BATCH)
    capsys.readouterr()
    assert call("bench", *itertools.chain(*given.items()), *rest) == 2
    captured = capsys.readouterr()
    differ = {"dtype": "dtype, weights"}.get(what, what)  # bfloat16 weights are other weights, too
    assert f"holds rewards of another model or other settings ({differ} differ)" in captured.err
    assert "Name another --out" in captured.err
    assert file.read_bytes() == before
    assert not captured.out
    assert not (out / "world.json").exists()


@pytest.mark.parametrize("place", [0, pytest.param(-1)])
def test_any_changed_weight_changes_the_fingerprint(place, kit):
    network = VideoReward.from_pretrained(kit / "model")
    assert fingerprint(network) == fingerprint(VideoReward.from_pretrained(kit / "model"))
    before, largest = fingerprint(network), max(network.parameters(), key=torch.numel)
    with torch.no_grad():
        largest.view(-1)[place] += 1.0
    assert fingerprint(network) != before


# --- interrupted and repeated scoring -------------------------------------------------------------


@pytest.fixture
def keep_signals() -> Iterator[None]:
    """Restores the signal handlers: Lightning ignores further Ctrl+C once it has seen one."""
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
    assert not (tmp_path / "world.json").exists()
    assert len(lines(tmp_path / "world")) == after * BATCH
    already = set(read_rewards(tmp_path / "world"))
    forwards.clear()
    assert bench(kit, tmp_path) == 0
    assert sum(map(len, forwards)) == RATED - after * BATCH
    assert len(forwards) == math.ceil(RATED / BATCH) - after
    again = Run(tmp_path, "")
    assert already <= again.rewards.keys()
    assert lines(tmp_path / "world") == lines(finished().out / "world")
    assert again.result == finished().result


def test_ctrl_c_while_scoring_ends_with_the_status_of_ctrl_c(kit, keep_signals, tmp_path, monkeypatch):
    stopping(monkeypatch, 1, KeyboardInterrupt())
    assert bench(kit, tmp_path) == 130


def test_a_finished_run_is_not_scored_again(kit, finished, forwards, tmp_path):
    shutil.copytree(finished().out / "world", tmp_path / "world")
    assert bench(kit, tmp_path) == 0
    assert not forwards
    assert Run(tmp_path, "").result == finished().result


def test_every_rated_video_is_scored_once(kit, forwards, tmp_path):
    assert bench(kit, tmp_path) == 0
    assert [len(batch) for batch in forwards] == [2, 2, 2, 1]
    tokens = [math.prod(grid) for batch in forwards for grid in batch]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) > 3
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
    assert encode_frames(kit, frames) == 0
    assert bench(kit, tmp_path / "out", data=frames) == 0
    assert Run(tmp_path / "out", "").rewards == finished().rewards


def test_decoded_frames_of_another_sampling_are_refused(kit, tmp_path, capsys):
    frames = tmp_path / "world"
    assert encode_frames(kit, frames) == 0
    assert bench(kit, tmp_path / "out", *VGRB, data=frames) == 2
    assert "decoded for another model (fps: 8.0 stored, 2.0 wanted" in capsys.readouterr().err


def test_a_damaged_video_is_named_and_what_was_scored_before_stays(kit, finished, tmp_path, capsys):
    videos = samples((5, 9, 12, 7, 16, 10, 14, 8))
    shortest = min(videos[:RATED], key=lambda v: v.record["num_frames"] * v.record["width"])
    shortest.content = shortest.content[:300]
    write(tmp_path / "world", videos, rated(RATED, SEED))
    assert bench(kit, tmp_path / "out", data=tmp_path / "world") == 2
    captured = capsys.readouterr()
    assert captured.err.count("videoalign: error:") == 1
    assert f"video '{shortest.key}' cannot be scored" in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    want = {key: row for key, row in finished().rewards.items() if key != shortest.key}
    assert Run(tmp_path / "out", "").rewards == want
    assert not (tmp_path / "out" / "world.json").exists()


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
