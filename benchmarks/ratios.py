"""Performance, as ratios of two ways measured side by side in one run: `make bench`.

Each row checks first that both ways give the same result. Times are medians of repeated runs with one torch thread;
the spread is the range. Nothing here is asserted in tests.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from videoalign.alignment import FlowDPO, RewardModel
from videoalign.commands.reward_judge import RewardJudge
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.frames import FrameReader, encode_frames
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode, encode, probe
from videoalign.datamodules.video_list import Listed, videos_of
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import FrameSampling, VideoReward, accuracy_with_ties
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import guided
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape


def timed(*ways: Callable[[], object], repeats: int = 7) -> list[list[float]]:
    """Seconds of each way, taken in turn so that a busy machine slows all of them; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(repeats + 1):
        for times, way in zip(seconds, ways):
            started = time.perf_counter()
            way()
            if number:
                times.append(time.perf_counter() - started)
    return seconds


def row(name: str, slow: list[float], fast: list[float], per: int = 1, unit: str = "") -> None:
    """Print one comparison."""
    s, f = statistics.median(slow), statistics.median(fast)
    low, high = min(slow) / max(fast), max(slow) / min(fast)
    rates = f"{per / s:10.1f} -> {per / f:10.1f} {unit}" if unit else f"{s * 1e3:8.2f} -> {f * 1e3:8.2f} ms"
    print(f"{name:68} {s / f:6.1f}x  (range {low:.1f}-{high:.1f})  {rates}", flush=True)


def python_with_ties(labels: list[int], margins: list[float]) -> float:
    """A straightforward loop over the pairs sorted by absolute margin: one threshold after the other."""
    order = sorted(range(len(labels)), key=lambda i: abs(margins[i]))
    correct = sum(1 for label, margin in zip(labels, margins) if label != 0 and label * margin > 0)
    best = correct
    for place, i in enumerate(order):
        if labels[i] == 0:
            correct += 1
        elif labels[i] * margins[i] > 0:
            correct -= 1
        last = place + 1 == len(order) or abs(margins[order[place + 1]]) != abs(margins[i])
        if last and correct > best:
            best = correct
    return best / len(labels)


def torch_with_ties(labels: torch.Tensor, margins: torch.Tensor) -> float:
    """The same loop over tensors, as the official script's runs over array elements."""
    order = margins.abs().argsort()
    labels, margins = labels[order], margins[order]
    correct = int(((labels != 0) & (labels * margins > 0)).sum())
    best = correct
    for place in range(len(labels)):
        if labels[place] == 0:
            correct += 1
        elif labels[place] * margins[place] > 0:
            correct -= 1
        last = place + 1 == len(labels) or margins[place + 1].abs() != margins[place].abs()
        if last and correct > best:
            best = correct
    return best / len(labels)


def tie_metric() -> None:
    """Accuracy with ties of as many pairs as VideoGen-RewardBench has."""
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.choice([1, -1, 0], 26457, p=[0.27, 0.26, 0.47]))
    margins = torch.tensor(rng.normal(0, 1, 26457) + labels.numpy(), dtype=torch.float32)
    lists = labels.tolist(), margins.tolist()
    assert accuracy_with_ties(labels, margins) == python_with_ties(*lists) == torch_with_ties(labels, margins)
    fast = lambda: accuracy_with_ties(labels, margins)  # noqa: E731
    loop, ours = timed(lambda: python_with_ties(*lists), fast)
    row("accuracy with ties, 26,457 pairs: loop over Python lists", loop, ours)
    loop, ours = timed(lambda: torch_with_ties(labels, margins), fast, repeats=3)
    row("accuracy with ties, 26,457 pairs: loop over tensors", loop, ours)


def clips(folder: Path, pairs: int) -> ShardSet:
    """A set of 480 x 832 clips of 5 seconds at 24 fps, as generators make them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:480, :832]
    videos = []
    for _ in range(4):
        phase = rng.uniform(0, 6, 3)
        frames = np.stack(
            [
                np.stack(
                    [
                        127 + 90 * np.sin(x / 60 + p + t / 9) * np.cos(y / 40 - p) + rng.normal(0, 4, y.shape)
                        for p in phase
                    ],
                    -1,
                )
                for t in range(120)
            ]
        )
        videos.append(encode(frames.clip(0, 255).astype(np.uint8), 24, crf=23))
    with ShardWriter(folder, "pairs", per_shard=4) as writer:
        for i in range(pairs):
            record = {"prompt": "waves", "labels": {"VQ": "A", "MQ": "B", "TA": "same"}}
            writer.write(f"{i:04d}", {"a": videos[i % 4], "b": videos[(i + 1) % 4]}, record)
    return ShardSet(folder)


def decode_all(content: bytes, sampling: FrameSampling) -> torch.Tensor:
    """Convert every frame, then choose: what is done where frames are read with a whole-clip reader."""
    import io

    from torchvision.transforms.functional import InterpolationMode, resize

    with av.open(io.BytesIO(content)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = torch.from_numpy(np.stack([frames[i] for i in sampling.indices(len(frames), 24.0)])).permute(0, 3, 1, 2)
    return resize(video, list(sampling.size(480, 832, 28)), InterpolationMode.BICUBIC, antialias=True)


def decoding(folder: Path) -> None:
    """Pairs per second from mp4 shards and from frames that were decoded once."""
    sampling = FrameSampling()
    mp4 = clips(folder / "mp4", 8)
    for _ in encode_frames(mp4, folder / "frames", sampling, 28):
        pass
    cached = ShardSet(folder / "frames")
    read_mp4, read_frames = FrameReader(mp4, sampling, 28), FrameReader(cached, sampling, 28)
    assert all(torch.equal(a, b) for x, y in zip(mp4, cached) for a, b in zip(read_mp4(x), read_frames(y)))
    slow, fast = timed(lambda: [read_mp4(raw) for raw in mp4], lambda: [read_frames(raw) for raw in cached], repeats=3)
    row("pairs from frame-cached shards against decoding mp4 each time", slow, fast, 8, "pairs/s")
    content = next(iter(mp4)).members["a.mp4"]
    assert torch.equal(decode_all(content, sampling), decode(content, sampling, 28))
    slow, fast = timed(lambda: decode_all(content, sampling), lambda: decode(content, sampling, 28), repeats=5)
    row("mp4: only the kept frames converted against all of them", slow, fast, 1, "clips/s")


def one_forward(folder: Path) -> None:
    """A training step with A and B in one forward against two."""
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


def scored(folder: Path) -> None:
    """Benchmark scoring: 40 clips of 480 x 832 and 80 of the miniature world's size, each in ten of 600 pairs.

    Scoring pair by pair is timed on every tenth pair, and multiplied.
    """
    rng = np.random.default_rng(1)
    small = [encode(rng.integers(0, 255, (16, 64, 64, 3), np.uint8), 8) for _ in range(80)]
    large = [raw.members["a.mp4"] for raw in ShardSet(folder / "pairs")] + [
        raw.members["b.mp4"] for raw in ShardSet(folder / "pairs")
    ]
    with ShardWriter(folder / "bench", "videos") as writer:
        for number, content in enumerate([*(large * 3)[:40], *small]):
            clip = probe(content)
            record = {
                "prompt": "waves",
                "fps": clip.fps,
                "num_frames": clip.frames,
                "height": clip.height,
                "width": clip.width,
            }
            writer.write(f"{number:03d}", {"": content}, record)
        ends = np.concatenate([rng.permutation(120).reshape(-1, 2) for _ in range(10)])
        words = dict.fromkeys(("VQ", "MQ", "TA", "Overall"), "A")
        writer.write_table("pairs.csv", [{"key_A": f"{a:03d}", "key_B": f"{b:03d}", **words} for a, b in ends])
    make_qwen(folder / "judge", hidden=128, layers=4, vision_layers=4)
    rated = Benchmark(folder / "bench")
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


def alignment(folder: Path) -> None:
    """A Flow-DPO step of a Wan transformer of 5 million parameters: two pairs, latents (16, 5, 16, 16), adapters of rank 64."""
    make_generator(folder / "wan", "wan", hidden=240, layers=7)
    module = FlowDPO(generator=str(folder / "wan"))
    count = sum(p.numel() for n, p in module.policy.named_parameters() if ".lora_" not in n)
    rng = torch.Generator().manual_seed(0)
    latents, prompts = torch.randn(2, 2, 16, 5, 16, 16, generator=rng), [torch.randn(12, 32, generator=rng)] * 2
    batch = {
        "latents": latents,
        "prompts": prompts,
        "seeds": torch.tensor([1, 2]),
        "reference": torch.full((2, 2), torch.nan),
        "valid": torch.ones(2, dtype=torch.bool),
    }
    trained = [p for p in module.parameters() if p.requires_grad]

    def step(errors: torch.Tensor, reference: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        module.zero_grad()
        loss = module.loss(batch, errors, reference, t)[0].mean()
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten()[:4] for p in trained)])

    def live() -> torch.Tensor:
        reference = module.reference_errors(batch, latents)
        return step(module.errors(latents, batch["seeds"], prompts)[0], reference, torch.zeros(2))

    def four() -> torch.Tensor:
        reference, errors = [], []
        for side in latents:
            with module.as_reference() as net:
                reference.append(module.errors(side[None], batch["seeds"], prompts, net)[0])
            errors.append(module.errors(side[None], batch["seeds"], prompts)[0])
        return step(torch.cat(errors), torch.cat(reference), torch.zeros(2))

    cached_batch = {**batch, "reference": module.reference_errors(batch, latents)}

    def cached() -> torch.Tensor:
        reference = module.reference_errors(cached_batch, latents)
        return step(module.errors(latents, batch["seeds"], prompts)[0], reference, torch.zeros(2))

    torch.testing.assert_close(four(), live(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cached(), live(), rtol=1e-4, atol=1e-6)
    apart, together, without = timed(four, live, cached, repeats=5)
    name = f"DPO step, {count / 1e6:.1f} M parameters"
    row(f"{name}: pair in one forward against four forwards", apart, together, 2, "pairs/s")
    row(f"{name}: cached reference errors against live", together, without, 2, "pairs/s")

    encoder = load_generator(folder / "wan")
    videos = torch.randint(0, 256, (4, 17, 3, 128, 128), dtype=torch.uint8, generator=rng)  # of these latents' size

    def encoding() -> torch.Tensor:
        encoder.encode_video(videos), encoder.encode_prompts(["waves at sunset"] * 2)
        return live()

    slow, fast = timed(encoding, live, repeats=3)
    row(f"{name}: latents from disk, against the miniature's autoencoder", slow, fast, 2, "pairs/s")
    vae = AutoencoderKLWan()  # Wan2.1's own size, 127 M; the cost depends on no weight's value
    short, pixels = latents[:, :, :, :2], torch.rand(4, 3, 5, 128, 128, generator=rng)

    def own_size() -> None:
        with torch.no_grad():
            vae.encode(pixels)

    slow, fast = timed(own_size, lambda: module.errors(short, batch["seeds"], prompts)[0].sum().backward(), repeats=1)
    slow = [a + b for a, b in zip(slow, fast)]
    row(f"{name}: latents from disk, against Wan2.1's autoencoder", slow, fast, 2, "pairs/s")
    for kind in ("adapters off", "a second copy"):
        done = subprocess.run([sys.executable, "-c", PEAK, folder, kind], capture_output=True, text=True, check=True)
        print(
            f"{f'peak memory of 3 DPO steps, 65 M parameters, reference: {kind}':68} {int(done.stdout) / 1024:6.0f} MiB"
        )


class PixelReward:
    """A reward model's view of latents: decoded, cut into patches, graded, all of it differentiable."""

    def __init__(self, generator: Generator, folder: Path, prompt: str) -> None:
        make_qwen(folder, corpus=[prompt])
        self.generator, self.prompt = generator, prompt
        sampling = FrameSampling(fps=8.0, min_pixels=0)
        self.network = VideoReward(str(folder), "plain", sampling=sampling).eval().requires_grad_(False)

    def normalise(self, rewards: torch.Tensor) -> torch.Tensor:
        return rewards

    def __call__(self, x: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
        mean, std = self.generator.moments()
        video = (self.generator._decode(x * std + mean).transpose(1, 2) / 2 + 0.5).clamp(0, 1) * 255  # (B, T, 3, H, W)
        inputs = self.network.processor(list(video[:, :16]), [self.prompt] * len(x))
        return self.network(**inputs)


def guidance(folder: Path) -> None:
    """Sampling with classifier-free guidance, and a noisy reward of two of its seven blocks on top; a reward model that
    reads pixels, through the autoencoder; and the noisy reward through the predicted end."""
    generator = load_generator(folder / "wan")
    reward = NoisyReward(generator, NoisyRewardShape(blocks=2)).eval().requires_grad_(False)
    condition, null = (generator.condition(generator.encode_prompts([text])) for text in ("waves at sunset", ""))
    noise = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))

    pixels = PixelReward(generator, folder / "judge", "waves at sunset")

    def sample(reward: object = reward, **options: object) -> torch.Tensor:
        with guided(generator.pipeline, reward, **options):
            return generator.sample(condition, noise, 9, 5.0, null)

    assert torch.equal(sample(strength=0.0), generator.sample(condition, noise, 9, 5.0, null))
    plain, every, second = timed(
        lambda: sample(strength=0.0), lambda: sample(strength=1.0), lambda: sample(strength=1.0, every=2), repeats=5
    )
    row("9 sampling steps with CFG: reward guidance in every step against none", every, plain)
    row("9 sampling steps with CFG: in every second step against none", second, plain)
    plain, end, pixel = timed(
        lambda: sample(strength=0.0),
        lambda: sample(strength=1.0, through="predicted"),
        lambda: sample(pixels, strength=1e-3, through="predicted"),
        repeats=3,
    )
    row("  through the predicted end (FreeDoM) against none", end, plain)
    row("  through the predicted end's pixels (decode, reward model) against none", pixel, plain)


PEAK = """
import copy, sys
from pathlib import Path
import torch
from videoalign.alignment import FlowDPO
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
folder = Path(sys.argv[1]) / "large"
if not folder.exists():
    make_generator(folder, "wan", hidden=768, layers=8)
torch.set_num_threads(1)
module = FlowDPO(generator=str(folder))
if sys.argv[2] == "a second copy":
    module.reference = copy.deepcopy(module.policy)
latents, prompts, seeds = torch.randn(2, 1, 16, 3, 8, 8), [torch.randn(12, 32)], torch.tensor([1])
batch = {"reference": torch.full((2, 1), torch.nan), "seeds": seeds, "prompts": prompts}
optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
for _ in range(3):
    reference = module.reference_errors(batch, latents)
    errors, t = module.errors(latents, seeds, prompts)
    module.loss(batch, errors, reference, t)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')))
"""

STREAM = """
import sys
from pathlib import Path
from videoalign.datamodules.frames import FrameReader
from videoalign.datamodules.pairs import PairDecoder
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.stream import Share, ShardLoader, ShardStream
from videoalign.models import FrameSampling
shards = ShardSet(sys.argv[1])
decode = PairDecoder(FrameReader(shards, FrameSampling(**{k: v for k, v in shards.index.frames.items() if k != "factor"}), 28), 0)
stream = ShardStream(shards.contents(), decode, Share(len(shards), 2, 1, True), shuffle_buffer=8)
for batch in ShardLoader(stream, lambda items: {"dropped": []}, 0):
    pass
# not ru_maxrss, which a child inherits
print(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')))
"""


def memory(folder: Path) -> None:
    """Peak memory of a process that streams 1x and 10x as many shards."""
    peaks = []
    for times in (1, 10):
        with ShardWriter(
            folder / f"x{times}", "pairs", "safetensors", ShardSet(folder / "frames").index.frames, per_shard=4
        ) as writer:
            raws = list(ShardSet(folder / "frames"))
            for i in range(8 * times):
                raw = raws[i % len(raws)]
                videos = {side: raw.members[f"{side}.safetensors"] for side in "ab"}
                writer.write(f"{i:04d}", videos, raw.record())
        done = subprocess.run(
            [sys.executable, "-c", STREAM, folder / f"x{times}"], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    print(
        f"{'peak memory while streaming 10x as many shards':68} {peaks[1] / peaks[0]:6.3f}x  {peaks[0]:.0f} -> {peaks[1]:.0f} MiB"
    )


def main() -> None:
    """All rows."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, 1 thread; page cache warm")
    with tempfile.TemporaryDirectory() as name:
        tie_metric()
        decoding(Path(name))
        one_forward(Path(name))
        scored(Path(name))
        alignment(Path(name))
        guidance(Path(name))
        memory(Path(name))


if __name__ == "__main__":
    main()
