"""Reward models: how a training step goes through the network, and scoring every video of a benchmark once."""

from pathlib import Path

import numpy as np
import torch
from decoding import clips
from timing import row, timed

from videoalign.alignment import RewardModel
from videoalign.commands.reward_judge import RewardJudge
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode, probe
from videoalign.datamodules.video_list import Listed, videos_of
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import FrameSampling, VideoReward
from videoalign.models.vision_attention import NAME as BATCHED


def one_forward(folder: Path) -> None:
    """Time a training step with A and B in one forward against two.

    Args:
        folder: Folder of all benchmarks.
    """
    make_qwen(folder / "mini", corpus=["a red circle moves left to right"])
    network = VideoReward(folder / "mini", "plain", FrameSampling(fps=8.0, min_pixels=0), language="full")
    model = RewardModel(network)
    videos = [torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8) for _ in range(48)]
    prompts, labels = ["a red circle moves left to right"] * 48, torch.randint(-1, 2, (24, 3)).float()
    both, a, b = (network.processor(videos[s], prompts[s]) for s in (slice(48), slice(24), slice(24, 48)))

    def step(*inputs: dict) -> torch.Tensor:
        network.zero_grad()
        rewards = torch.cat([network(**batch) for batch in inputs]).unflatten(0, (2, -1))
        loss = model.pair_losses(rewards, labels, torch.ones(2, 24, 3)).mean()
        loss.backward()
        return torch.stack([loss.detach(), network.head.weight.grad.abs().sum()])

    torch.testing.assert_close(step(a, b), step(both), rtol=1e-5, atol=1e-5)
    slow, fast = timed(lambda: step(a, b), lambda: step(both))
    row("training step, 24 pairs: A and B in one forward against two", slow, fast, 24, "pairs/s")


def frames_at_once(folder: Path) -> None:
    """Time a training step whose vision tower attends to all frames in one call, against one call a frame.

    One call a frame is transformers' own way, and the official code's. Videos have nine frames of 32 x 32, or of 128 x
    128, where the calls' own time counts less.

    Args:
        folder: Folder of all benchmarks.
    """
    make_qwen(folder / "tower", corpus=["a red circle moves left to right"], hidden=128, layers=4, vision_layers=4)
    network = VideoReward(folder / "tower", "plain", FrameSampling(fps=8.0, min_pixels=0), language="full")
    tower = network.backbone.visual.config
    for side, count in ((32, 48), (128, 6)):
        videos = [torch.randint(0, 256, (18, 3, side, side), dtype=torch.uint8) for _ in range(count)]
        batch = network.processor(videos, ["a red circle moves left to right"] * count)

        def step(attention: str, batch: dict = batch) -> torch.Tensor:
            tower._attn_implementation = attention
            network.zero_grad()
            loss = network(**batch).square().mean()
            loss.backward()
            return torch.stack([loss.detach(), network.head.weight.grad.abs().sum()])

        torch.testing.assert_close(step("sdpa"), step(BATCHED), rtol=1e-4, atol=1e-5)
        each, at_once = timed(lambda: step("sdpa"), lambda: step(BATCHED), repeats=5)
        row(
            f"training step, frames of {side} x {side}: attention at once against by frame",
            each,
            at_once,
            count,
            "videos/s",
        )


def scoring(folder: Path) -> None:
    """Time the scoring of 40 clips of 480 x 832 and 80 of the miniature world's size, each in ten of 600 pairs.

    Scoring pair by pair is timed on every tenth pair, and multiplied.

    Args:
        folder: Folder of all benchmarks.
    """
    rated = _benchmark(folder)
    make_qwen(folder / "judge", hidden=128, layers=4, vision_layers=4)
    sampling = FrameSampling(max_pixels=128 * 128, min_pixels=0)
    VideoReward(folder / "judge", "plain", sampling, language="full").save_pretrained(folder / "reward")
    judge = RewardJudge(model=str(folder / "reward"), device="cpu")
    model = judge.module.eval()
    found = videos_of(rated.shards, model.processor)
    videos = [found[key] for key in rated.keys]
    runs = iter(range(99))

    @torch.no_grad()
    def alone(video: Listed) -> torch.Tensor:
        return model(model.processor([video.frames(model.processor)], [video.prompt]))[0]

    def ours() -> torch.Tensor:
        return judge.score_set(rated.shards, rated.keys, folder / "scores" / str(next(runs)))

    def each() -> torch.Tensor:
        return torch.stack([alone(video) for video in videos])

    def pairs() -> None:
        for a, b in rated.ends[::10].tolist():
            alone(videos[a]), alone(videos[b])

    torch.testing.assert_close(ours(), each(), rtol=1e-4, atol=1e-4)
    in_pairs, in_line, overlapped = timed(pairs, each, ours, repeats=3)
    in_pairs = [10 * seconds for seconds in in_pairs]
    row("scoring 600 pairs of 120 videos: against both of each pair in turn", in_pairs, overlapped, 120, "videos/s")
    row("scoring 120 videos: against each once, decoded in line", in_line, overlapped, 120, "videos/s")
    torch.set_num_threads(2)  # the way in line with the core that decoding overlapped with
    _, in_line = timed(each, each, repeats=3)
    torch.set_num_threads(1)
    row("the same, in line with two torch threads", in_line, overlapped, 120, "videos/s")


def _benchmark(folder: Path) -> Benchmark:
    """A benchmark of 120 videos in 600 pairs."""
    rng = np.random.default_rng(1)
    small = [encode(rng.integers(0, 255, (16, 64, 64, 3), np.uint8), 8) for _ in range(80)]
    large = [raw.members[f"{side}.mp4"] for side in "ab" for raw in clips(folder)]
    with ShardWriter(folder / "bench", "videos") as writer:
        for number, content in enumerate([*(large * 3)[:40], *small]):
            clip = probe(content)
            size = {"height": clip.height, "width": clip.width}
            record = {"prompt": "waves", "fps": clip.fps, "num_frames": clip.frames, **size}
            writer.write(f"{number:03d}", {"": content}, record)
        # ten rounds of a tournament: every video is in one pair of each, and no pair comes twice
        ends = [pair for r in range(10) for pair in [(119, r), *(((r + k) % 119, (r - k) % 119) for k in range(1, 60))]]
        ends = rng.permutation(ends)
        words = dict.fromkeys(("VQ", "MQ", "TA", "Overall"), "A")
        writer.write_table("pairs.csv", [{"key_A": f"{a:03d}", "key_B": f"{b:03d}", **words} for a, b in ends])
    return Benchmark(folder / "bench")
