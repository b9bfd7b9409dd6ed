"""On-policy training against a bare loop: samples per second, and what an update costs beside its arithmetic."""

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import WanPipeline
from generators import wan
from timing import row, timed
from torch import Tensor, nn

from videoalign.alignment import DiffusionNFT
from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.datamodules.prompt_groups import PromptGroups
from videoalign.models.flow import draw, draw_seed
from videoalign.models.function_scores import FunctionScores
from videoalign.models.generator_folder import load_generator
from videoalign.models.policy_losses import nft_losses, optimality

SIZE = Sampling(num_frames=9, height=128, width=128, steps=8, batch_size=4)
"""Latents (16, 3, 16, 16)."""
SAMPLES, UPDATES = 8, 6
"""Samples of an iteration, and updates on them."""
PROMPT = "waves at sunset"


def first_channel(latents: Tensor, prompts: list[str]) -> dict[str, list[float]]:
    """A reward that costs nothing.

    Args:
        latents: Latents (B, C, F, H, W).
        prompts: Their prompts.
    """
    return {"first": latents[:, 0].flatten(1).mean(1).tolist()}


class Clock(L.Callback):
    """Seconds of each update's micro-batch, its optimizer step included, but for the first one, which samples.

    Args:
        seconds: Where they are put.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        """Note the time since the last batch."""
        now = time.perf_counter()
        if trainer.global_step > 1:
            self.seconds.append(now - self.last)
        self.last = time.perf_counter()


def policy(folder: Path) -> DiffusionNFT:
    """DiffusionNFT of the Wan transformer of 5 million parameters.

    Args:
        folder: Folder of all benchmarks.
    """
    torch.manual_seed(0)
    return DiffusionNFT(
        generator=wan(folder),
        rewards={"r": FunctionScores("rollouts:first_channel", needs="latents")},
        sampling=SIZE,
        updates=UPDATES,
        weighted=False,
        optimizer=partial(torch.optim.AdamW, lr=1e-4),
    )


def fitted(folder: Path, callbacks: list[L.Callback]) -> DiffusionNFT:
    """A policy after an iteration of the suite's own loop.

    Args:
        folder: Folder of all benchmarks.
        callbacks: Callbacks of the run.
    """
    prompts = folder / "rollout_prompts.txt"
    prompts.write_text(PROMPT + "\n")
    module = policy(folder)
    data = PromptGroups(str(prompts), groups=1, samples=SAMPLES, batch_size=SAMPLES)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        default_root_dir=folder,
        **quiet,
    ).fit(module, data)
    return module


class Bare:
    """The same updates in a loop of a few lines, with a copy of the transformer as the behaviour policy.

    Args:
        module: A policy that was not trained.
        rollout: The samples of the iteration, with their advantages.
        embeds: The prompt's embeddings (1, L, E).
    """

    def __init__(self, module: DiffusionNFT, rollout: Any, embeds: Tensor) -> None:
        self.net, self.old = module.policy, copy.deepcopy(module.policy).requires_grad_(False)
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.kl, self.beta, self.largest = module.kl, module.beta, 5.0
        self.rollout, self.embeds = rollout, embeds.expand(SAMPLES, -1, -1)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """Velocities (B, C, F, H, W).

        Args:
            net: Transformer.
            x: Noisy latents (B, C, F, H, W).
            t: Times (B,).
        """
        return net(x, 1000 * t, self.embeds, return_dict=False)[0]

    def step(self, update: int) -> None:
        """One update on all samples.

        Args:
            update: Its number, which noise and times belong to.
        """
        data, seeds = self.rollout.latents, [draw_seed("time", one.seed, update, 0) for one in self.rollout.drawn]
        uniform, noise = draw(torch.tensor(seeds), data.shape[1:], data.device)
        t = uniform.to(data)
        x = torch.lerp(data, noise, t.view(-1, 1, 1, 1, 1))
        with torch.no_grad():
            old = self.velocity(self.old, x, t)
            self.net.disable_adapters()
            reference = self.velocity(self.net, x, t)
            self.net.enable_adapters()
        velocity = self.velocity(self.net, x, t)
        optimal = optimality(self.rollout.advantages.to(data), self.largest)
        losses = self.largest * nft_losses(x, t, data, velocity, old, optimal, self.beta, False)
        loss = (losses + self.kl * (velocity - reference).square().flatten(1).mean(1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def _samples(folder: Path, module: DiffusionNFT, drawn: list, embeds: Tensor) -> None:
    """Compare the rollout of eight samples with the pipeline at the same batch, with the same adapters or with none."""
    plain = WanPipeline.from_pretrained(wan(folder))
    adapted = WanPipeline.from_pretrained(wan(folder), transformer=module.policy)
    for one in (plain, adapted):
        one.set_progress_bar_config(disable=True)
    batches = [drawn[i : i + SIZE.batch_size] for i in range(0, SAMPLES, SIZE.batch_size)]

    def pipeline(whole: WanPipeline) -> Tensor:
        found = []
        for some in batches:
            noise = draw(torch.tensor([one.seed for one in some]), module.sampler.shape, torch.device("cpu"))[1]
            found.append(
                whole(
                    prompt_embeds=embeds.expand(len(some), -1, -1),
                    latents=noise,
                    num_frames=SIZE.num_frames,
                    height=SIZE.height,
                    width=SIZE.width,
                    num_inference_steps=SIZE.steps,
                    guidance_scale=1.0,
                    output_type="latent",
                ).frames
            )
        return torch.cat(found)

    def rollout() -> Tensor:
        with module.as_old():
            return torch.cat([module.sample(some)[0] for some in batches])

    def with_adapters() -> Tensor:
        with module.as_old():
            return pipeline(adapted)

    torch.testing.assert_close(rollout(), with_adapters(), rtol=1e-4, atol=1e-4)
    bare, theirs, ours = timed(partial(pipeline, plain), with_adapters, rollout, repeats=5)
    row(f"rollout of {SAMPLES} samples against the pipeline with adapters", theirs, ours, SAMPLES, "samples/s")
    row("  against the pipeline without adapters", bare, ours, SAMPLES, "samples/s")


def rollouts(folder: Path) -> None:
    """Time samples and updates of DiffusionNFT.

    Args:
        folder: Folder of all benchmarks.
    """
    fresh, seconds, bare_seconds = policy(folder), [], []
    prompt = load_generator(wan(folder)).encode_prompts([PROMPT])[0]["prompt"][None]
    embeds = torch.nn.functional.pad(prompt, (0, 0, 0, fresh.generator.max_tokens - prompt.shape[1]))
    start = {name: p.detach().clone() for name, p in fresh.trained().items()}
    for number in range(3):  # in turn, so that a busy machine slows both
        own: list[float] = []
        module = fitted(folder, [Clock(own)])
        with torch.no_grad():
            for name, parameter in fresh.trained().items():
                parameter.copy_(start[name])
        bare = Bare(fresh, module.rollout, embeds)
        bare.step(0)
        for update in range(1, UPDATES):
            began = time.perf_counter()
            bare.step(update)
            bare_seconds.append(time.perf_counter() - began)
        seconds += own
        if not number:
            for name, parameter in fresh.trained().items():
                torch.testing.assert_close(parameter, module.trained()[name], rtol=1e-3, atol=1e-6)
    row(f"NFT update of {SAMPLES} samples: the suite's loop against a bare one", seconds, bare_seconds)
    _samples(folder, module, module.rollout.drawn, embeds)
