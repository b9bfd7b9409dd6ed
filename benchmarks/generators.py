"""Alignment steps and guided sampling of a Wan transformer of 5 million parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from timing import peak_memory, row, timed
from torch import Tensor

from videoalign.alignment import FlowDPO
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import FrameSampling, VideoReward
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance, steering
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape


def wan(folder: Path) -> str:
    """The pipeline's folder; written once.

    Args:
        folder: Folder of all benchmarks.
    """
    if not (folder / "wan").exists():
        make_generator(folder / "wan", "wan", hidden=240, layers=7)
    return str(folder / "wan")


# --- alignment ----------------------------------------------------------------------------------------------------


def alignment(folder: Path) -> None:
    """Time Flow-DPO steps of two pairs: latents (16, 5, 16, 16), adapters of rank 64.

    Args:
        folder: Folder of all benchmarks.
    """
    module = FlowDPO(generator=wan(folder))
    count = sum(p.numel() for n, p in module.policy.named_parameters() if ".lora_" not in n)
    name = f"DPO step, {count / 1e6:.1f} M parameters"
    rng = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(2, 2, 16, 5, 16, 16, generator=rng),
        "conditions": [{"prompt": torch.randn(12, 32, generator=rng)}] * 2,
        "seeds": torch.tensor([1, 2]),
        "reference": torch.full((2, 2), torch.nan),
        "valid": torch.ones(2, dtype=torch.bool),
    }
    live = _forwards(name, module, batch)
    _encoding(name, module, batch, live, load_generator(wan(folder)), rng)
    for kind in ("adapters off", "a second copy"):
        text = f"peak memory of 3 DPO steps, 65 M parameters, reference: {kind}"
        print(f"{text:68} {peak_memory('peak_of_dpo.py', folder, kind):6.0f} MiB")


def _forwards(name: str, module: FlowDPO, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """Compare ways to get policy's and reference's errors; returns the usual step."""
    latents, seeds, prompts = batch["latents"], batch["seeds"], batch["conditions"]
    trained = [p for p in module.parameters() if p.requires_grad]

    def step(errors: Tensor, reference: Tensor) -> Tensor:
        module.zero_grad()
        loss = module.loss(batch, errors, reference, torch.zeros(2))[0].mean()
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten()[:4] for p in trained)])

    def live() -> Tensor:
        reference = module.reference_errors(batch, latents)
        return step(module.errors(latents, seeds, prompts)[0], reference)

    def four() -> Tensor:
        reference, errors = [], []
        for side in latents:
            with module.as_reference() as net:
                reference.append(module.errors(side[None], seeds, prompts, net)[0])
            errors.append(module.errors(side[None], seeds, prompts)[0])
        return step(torch.cat(errors), torch.cat(reference))

    cached_batch = {**batch, "reference": module.reference_errors(batch, latents)}

    def cached() -> Tensor:
        reference = module.reference_errors(cached_batch, latents)
        return step(module.errors(latents, seeds, prompts)[0], reference)

    torch.testing.assert_close(four(), live(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cached(), live(), rtol=1e-4, atol=1e-6)
    apart, together, without = timed(four, live, cached, repeats=5)
    row(f"{name}: pair in one forward against four forwards", apart, together, 2, "pairs/s")
    row(f"{name}: cached reference errors against live", together, without, 2, "pairs/s")
    return live


def _encoding(
    name: str,
    module: FlowDPO,
    batch: dict[str, Any],
    live: Callable[[], Tensor],
    encoder: Generator,
    rng: torch.Generator,
) -> None:
    """Compare latents from disk with encoding in every step."""
    videos = torch.randint(0, 256, (4, 17, 3, 128, 128), dtype=torch.uint8, generator=rng)  # these latents' size

    def encoding() -> Tensor:
        encoder.encode_video(videos), encoder.encode_prompts(["waves at sunset"] * 2)
        return live()

    slow, fast = timed(encoding, live, repeats=3)
    row(f"{name}: latents from disk, against the miniature's autoencoder", slow, fast, 2, "pairs/s")
    vae = AutoencoderKLWan()  # Wan2.1's own size, 127 M; the cost depends on no weight's value
    short, pixels = batch["latents"][:, :, :, :2], torch.rand(4, 3, 5, 128, 128, generator=rng)

    def own_size() -> None:
        with torch.no_grad():
            vae.encode(pixels)

    def train() -> None:
        module.errors(short, batch["seeds"], batch["conditions"])[0].sum().backward()

    slow, fast = timed(own_size, train, repeats=1)
    slow = [a + b for a, b in zip(slow, fast)]
    row(f"{name}: latents from disk, against Wan2.1's autoencoder", slow, fast, 2, "pairs/s")


# --- guidance -----------------------------------------------------------------------------------------------------


class PixelReward:
    """A reward model's view of latents: decoded, cut into patches and rated, all of it differentiable.

    Args:
        generator: Generator whose autoencoder decodes.
        folder: Folder of the reward model's backbone, which is written here.
        prompt: Prompt of all latents.
    """

    def __init__(self, generator: Generator, folder: Path, prompt: str) -> None:
        make_qwen(folder, corpus=[prompt])
        self.generator, self.prompt = generator, prompt
        sampling = FrameSampling(fps=8.0, min_pixels=0)
        self.network = VideoReward(str(folder), "plain", sampling=sampling).eval().requires_grad_(False)

    def normalise(self, rewards: Tensor) -> Tensor:
        """Rewards as they are: a random model has no statistics.

        Args:
            rewards: Rewards (B, 3).
        """
        return rewards

    def __call__(self, x: Tensor, t: Tensor, condition: dict) -> Tensor:
        """Rewards (B, 3) of normalised latents.

        Args:
            x: Latents.
            t: Flow time, which this reward does not read.
            condition: Condition of the generator, which this reward does not read.
        """
        mean, std = self.generator.moments()
        video = (self.generator._decode(x * std + mean).transpose(1, 2) / 2 + 0.5).clamp(0, 1) * 255  # (B, T, 3, H, W)
        inputs = self.network.processor(list(video[:, :16]), [self.prompt] * len(x))
        return self.network(**inputs)


def guidance(folder: Path) -> None:
    """Time sampling with classifier-free guidance, and what reward guidance adds to it.

    The reward is a noisy reward of two of the seven blocks, at the noisy latents or through the predicted end, or a
    reward model that reads the predicted end's pixels.

    Args:
        folder: Folder of all benchmarks.
    """
    generator = load_generator(wan(folder))
    reward = NoisyReward(generator, NoisyRewardShape(blocks=2)).eval().requires_grad_(False)
    condition, null = (generator.condition(generator.encode_prompts([text])) for text in ("waves at sunset", ""))
    noise = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = PixelReward(generator, folder / "pixel_judge", "waves at sunset")

    def sample(reward: object = reward, **options: object) -> Tensor:
        steer = steering(reward, Guidance(**options), condition)
        return generator.sample(condition, noise, 9, 5.0, null, steer=steer)

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
