"""Pairs from rewards."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch

from generator_kit import COLUMNS, counting, failing_after, noise_video
from helpers import call, flags
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode
from videoalign.models import VideoReward

# --- pairs from rewards ---------------------------------------------------------------------------


def pair_up(judge: Path, data: Path, out: Path, *options) -> int:
    given = flags(model=judge, data=data, out=out, device="cpu", workers=0, batch_size=3)
    return call("shards", "pairs-from-rewards", *given, *options)


@pytest.fixture(scope="module")
def rewards(judge, clips) -> dict[str, torch.Tensor]:
    """Normalised rewards of every video, by the network itself."""
    network, found = VideoReward.from_pretrained(judge).eval(), {}
    for kind, sides in (("videos", ("",)), ("pairs", ("a", "b"))):
        for content in ShardSet(clips / kind).contents():
            for side in sides:
                video = content.read(f"{side}.mp4".lstrip("."))
                frames = decode(video, network.processor.sampling, network.processor.factor)
                with torch.no_grad():
                    raw = network(**network.processor([frames], [content.record["prompt"]]))[0]
                mean, std = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
                found[f"{content.key}.{side}".rstrip(".")] = (raw - mean) / std
    return found


def groups(clips: Path) -> list[list[str]]:
    keys = [content.key for content in ShardSet(clips / "videos").contents()]
    return [keys[:4], keys[4:7], keys[7:]]


def weighted(rewards: dict, key: str, weights=(1, 1, 1)) -> float:
    return float((rewards[key] * torch.tensor(weights)).sum() / sum(weights))


@pytest.mark.parametrize("weights", [(1, 1, 1), (0, 0, 1)])
@pytest.mark.parametrize("mode", ["best-worst", "margin"])
def test_pairs_of_each_prompt(mode, weights, judge, clips, rewards, tmp_path, capsys):
    score = {key: weighted(rewards, key, weights) for group in groups(clips) for key in group}
    every = [pair for group in groups(clips) for pair in combinations(group, 2)]
    gaps = sorted(abs(score[a] - score[b]) for a, b in every)
    margin = (gaps[3] + gaps[4]) / 2 if mode == "margin" else 0.0
    if mode == "margin":
        want = [(a, b) for a, b in every if abs(score[a] - score[b]) > margin]
    else:
        ends = [(min(g, key=score.get), max(g, key=score.get)) for g in groups(clips)[:2]]
        want = [tuple(sorted(pair)) for pair in ends]  # the first key is A, whichever is better
    options = ["--mode", mode, "--margin", margin, "--weights", *weights]
    assert pair_up(judge, clips / "videos", tmp_path / "out", *options) == 0
    assert f"{len(want)} pairs of 8 samples" in capsys.readouterr().out
    media = {raw.key: (raw.members["mp4"], raw.record()) for raw in ShardSet(clips / "videos")}
    found = list(ShardSet(tmp_path / "out", "pairs"))
    assert [tuple(raw.record()["keys"].values()) for raw in found] == want
    for raw, (a, b) in zip(found, want):
        record = raw.record()
        assert (raw.members["a.mp4"], raw.members["b.mp4"]) == (media[a][0], media[b][0])
        assert record["prompt"] == media[a][1]["prompt"] == media[b][1]["prompt"]
        for field, name in (
            ("sources", "source"),
            ("seeds", "seed"),
            ("fps", "fps"),
            ("num_frames", "num_frames"),
            ("guidance", "guidance"),
        ):
            assert record[field] == {"A": media[a][1][name], "B": media[b][1][name]}
        have = torch.tensor([[record["rewards"][s][d] for d in COLUMNS[:3]] for s in "AB"])
        torch.testing.assert_close(have, torch.stack([rewards[a], rewards[b]]), rtol=0, atol=1e-4)
        gap = (have[0] - have[1]).tolist()
        signs = {c: "A" if g > 0 else "B" if g < 0 else "same" for c, g in zip(COLUMNS, [*gap, sum(gap)])}
        assert record["labels"] == signs
    assert call("shards", "verify", tmp_path / "out") == 0 and call("shards", "info", tmp_path / "out") == 0


def test_relabelled_pairs_keep_what_they_were(judge, clips, rewards, tmp_path, capsys):
    gaps = {f"pair{i}": abs(weighted(rewards, f"pair{i}.a") - weighted(rewards, f"pair{i}.b")) for i in range(4)}
    margin = sum(sorted(gaps.values())[:2]) / 2
    assert pair_up(judge, clips / "pairs", tmp_path / "out", "--mode", "relabel", "--margin", margin) == 0
    assert "3 pairs of 4 samples, 1 left out" in capsys.readouterr().out
    old, new = ({raw.key: raw for raw in ShardSet(folder)} for folder in (clips / "pairs", tmp_path / "out"))
    assert new.keys() == {key for key, gap in gaps.items() if gap > margin}
    for key, raw in new.items():
        before, after = old[key].record(), raw.record()
        assert {e: raw.members[e] for e in ("a.mp4", "b.mp4")} == {e: old[key].members[e] for e in ("a.mp4", "b.mp4")}
        replaced = ("labels", "rewards", "scores", "votes")
        assert {k: v for k, v in after.items() if k not in replaced} == {
            k: v for k, v in before.items() if k not in replaced
        }
        assert "scores" in before and not {"scores", "votes"} & after.keys()  # they are of the labels before
        gap = rewards[f"{key}.a"] - rewards[f"{key}.b"]
        assert [after["labels"][c] for c in COLUMNS] == [
            "A" if g > 0 else "B" for g in [*gap.tolist(), float(gap.sum())]
        ]
        assert list(after["rewards"]["B"].values()) == pytest.approx(rewards[f"{key}.b"].tolist(), abs=1e-4)


def test_interrupted_scoring_goes_on_where_it_stopped(judge, clips, tmp_path, monkeypatch):
    assert pair_up(judge, clips / "videos", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        failing_after(patch, VideoReward, "forward", 2)
        assert pair_up(judge, clips / "videos", tmp_path / "out") == 1  # a fault of the program
    assert not (tmp_path / "out").exists()
    calls = counting(monkeypatch, VideoReward, "forward")
    assert pair_up(judge, clips / "videos", tmp_path / "out") == 0
    assert len(calls) == 1  # of three batches
    whole, again = ([(r.key, r.members) for r in ShardSet(tmp_path / name)] for name in ("whole", "out"))
    assert whole == again


PAIRS_REFUSED = {
    "nothing differs enough": (["--mode", "margin", "--margin", 1e6], "no pair to write"),
    "best and worst too close": (["--margin", 1e6], "no sample was written"),
    "no prompt with two videos": (["--data", "single"], "no pair to write"),
    "pairs in place of videos": (["--data", "pairs"], "holds pairs as mp4; --mode best-worst needs videos"),
    "videos in place of pairs": (["--mode", "relabel"], "holds videos as mp4; --mode relabel needs pairs"),
    "latents": (["--data", "latents"], "holds latents as safetensors"),
    "no model": (["--model", "none"], "there is no such folder of a reward model"),
    "model that was never measured": (["--model", "unmeasured"], "unmeasured has no statistics of its rewards"),
    "weights of nothing": (["--weights", 0, 0, 0], "weights"),
    "negative weight": (["--weights", -1, 1, 1], "weights"),
    "margin nan": (["--margin", "nan"], "margin"),
    "negative margin": (["--margin", -1], "margin"),
}


@pytest.mark.parametrize("name", PAIRS_REFUSED)
def test_pairs_from_rewards_refuses(name, judge, clips, latents, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ShardWriter(tmp_path / "single", "videos") as writer:
        writer.write("0", {"": noise_video(0)}, {"prompt": "a video"})
    never = json.loads((shutil.copytree(judge, tmp_path / "unmeasured") / "reward.json").read_text())
    never["statistics"] = {"mean": [0.0] * 3, "std": [1.0] * 3}
    (tmp_path / "unmeasured" / "reward.json").write_text(json.dumps(never))
    options, words = PAIRS_REFUSED[name]
    options = [{"pairs": clips / "pairs", "latents": latents / "wan"}.get(o, o) for o in options]
    assert pair_up(judge, clips / "videos", tmp_path / "out", *options) == 2
    err = capfd.readouterr().err
    assert words in err.split("videoalign: error:")[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
