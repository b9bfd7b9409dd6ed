"""`videoalign generate`: a predict run that samples videos from a generator, with recorded seeds."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.contracts import HasPrompts, offers
from ..datamodules.sample_images import read_image
from ..datamodules.video import encode
from ..models.adapters import apply_loras
from ..models.checksums import digest
from ..models.conditions import check_negative
from ..models.dimensions import DIMENSIONS
from ..models.evaluations import Evaluations
from ..models.family import Condition, Encoded
from ..models.fingerprint import fingerprint
from ..models.finite import by_name, require_finite
from ..models.flow import draw, interpolate
from ..models.generator_folder import load_generator
from ..models.guidance import Guidance, steering
from ..models.hub import commits_of
from ..models.lora_specs import Loras, adapter_commits
from ..models.memory import Memory
from ..models.noisy_reward import NoisyReward
from ..models.number_checks import at_least, positive
from ..models.search import Chosen, Search
from ..models.searcher import Searcher, rows
from .text_first import embed_first

VIEWED_AT = 0.1
"""Time at which the noisy reward scores finished latents: the first of the times that it is validated at."""


class Generate(L.LightningModule):
    """Samples videos through the generator's own pipeline and scheduler.

    Samples that a model is to be *trained* on are best drawn with cfg_scale 1: training on guided samples teaches the
    guidance, which looks like an improvement without any preference (a model fine-tuned on unselected guided samples
    already "wins").

    The records hold the seconds that the sampling of a video took (its share of a batch; on a CPU in seconds of one
    core), its evaluations of the transformer, and the noisy reward's own scores of it.

    Args:
        generator: Folder or hub id of a diffusers pipeline.
        num_frames: Number of frames of a video.
        height: Height of the videos in pixels.
        width: Width of the videos in pixels.
        fps: Frame rate of the videos, in frames per second, at least 1.
        steps: Number of scheduler steps, at least 1.
        cfg_scale: Classifier-free guidance scale, at least 1; 1 turns it off.
        lora: Folder, file or hub id of LoRA adapters, in the names of diffusers, peft, ComfyUI, DiffSynth or kohya, or
            a list of several. Each may end in ``,scale=S``, and for a generator with two experts in ``,expert=high`` or
            ``,expert=low``, where its file does not state the expert.
        negative: Negative prompt of classifier-free guidance.
        dtype: Dtype of the transformer.
        source: Name of the generator, which is written into the videos' records.
        crf: Constant rate factor of the mp4 files, from 0 (lossless) to 51 (smallest files).
        noisy_reward: Folder or hub id of a noisy reward that steers sampling (Flow-NRG).
        guide: Times and strength of the steering by the noisy reward.
        family: Class of the generator's family, by import path (``package.module:Name``) or name; found by the
            pipeline's class if not given.
        cfg_scale_2: Scale of the second of two experts (Wan2.2-A14B), which works at low noise; ``cfg_scale`` if not
            given.
        shift: Shift of the scheduler's time steps; the authors' own if not given.
        memory: How the weights are held and computed: quantised, offloaded, compiled and so on.
        search: Search among candidates of each video by the noisy reward, which then guides only where ``guide`` says
            so; no search if not given.
    """

    def __init__(
        self,
        generator: str,
        num_frames: int,
        height: int,
        width: int,
        fps: int = 16,
        steps: int = 50,
        cfg_scale: float = 1.0,
        lora: Loras = None,
        negative: str = "",
        dtype: Literal["float32", "bfloat16"] = "float32",
        source: str = "generator",
        crf: int = 10,
        noisy_reward: str | None = None,
        guide: Guidance | None = None,
        family: str | None = None,
        cfg_scale_2: float | None = None,
        shift: float | None = None,
        memory: Memory = Memory(),  # noqa: B008  frozen
        search: Search | None = None,
    ) -> None:
        super().__init__()
        options = {"family": family, "cfg_scale_2": cfg_scale_2, "shift": shift}
        # videos of earlier releases were made without them, and are gone on with
        self.save_hyperparameters(
            ignore=["guide", "memory", "search", *(name for name, value in options.items() if value is None)]
        )
        at_least(1, steps=steps, cfg_scale=cfg_scale, fps=fps, cfg_scale_2=cfg_scale_2)
        positive(shift=shift)
        check_negative("", negative, cfg_scale, cfg_scale_2)
        if noisy_reward and memory.stored:
            raise VideoAlignError(
                "a noisy reward copies blocks of the transformer, and cannot where they are quantised or cast: leave "
                "memory.quantization and memory.layerwise_casting out, or the noisy reward"
            )
        self.memory = memory
        self.generator = load_generator(generator, dtype, fps=fps, family=family, memory=memory)
        if cfg_scale_2 is not None and self.generator.boundary is None:
            raise VideoAlignError("cfg_scale_2 is the scale of a second expert, and this generator has one transformer")
        apply_loras(self.generator, lora)
        self.noisy_reward = NoisyReward.from_pretrained(noisy_reward, self.generator) if noisy_reward else None
        if self.noisy_reward:  # its gradient would otherwise hold all tokens of all blocks
            self.noisy_reward.trunk.enable_gradient_checkpointing()
        self.guide = guide or (Guidance(strength=0.0) if search else Guidance())
        if self.noisy_reward and (self.guide.strength or search):
            self.noisy_reward.need_statistics(noisy_reward)
        if (guide or search) and not noisy_reward:
            who = "guidance" if guide else "a search"
            raise VideoAlignError(f"{who} needs a noisy reward: name its folder (--noisy-reward)")
        memory.compile_blocks(self.generator)
        self._embedded: dict[str, Encoded] = {}
        self.shape = self.generator.latent_shape(num_frames, height, width)
        self.steps, self.negative = steps, negative
        self.cfg_scale, self.cfg_scale_2, self.shift = cfg_scale, cfg_scale_2, shift
        scales = {"cfg_scale": cfg_scale, "cfg_scale_2": cfg_scale_2, "shift": shift}
        self.searcher = None
        if search:
            self.searcher = Searcher(search, self.generator, self.noisy_reward, self.guide, steps, scales)

    def making(self) -> dict[str, Any]:
        """Settings that the videos depend on, and digests of all weights, as plain values."""
        commits = commits_of(**{name: self.hparams[name] for name in ("generator", "noisy_reward")})
        commits |= adapter_commits(self.hparams["lora"])
        return {
            **self.hparams,
            **commits,
            **({"weights": self._weights()} if self._trainer is None or self.trainer.is_global_zero else {}),
            **self.memory.made(),
            **({"guide": asdict(self.guide)} if self.noisy_reward else {}),
            **({"search": self.searcher.search.settings()} if self.searcher else {}),
        }

    def _weights(self) -> dict[str, str]:
        """Digests of the networks; the first process, which compares them, alone computes them."""
        found = {"generator": fingerprint(self.generator)}
        if self.noisy_reward:
            said = digest(asdict(self.noisy_reward.statistics))
            found["noisy_reward"] = f"{fingerprint(self.noisy_reward)} {said}"
        return found

    def setup(self, stage: str) -> None:
        """Refuse prompts that are too long, offload parts, and embed all prompts where they are first."""
        if offers(self.trainer.datamodule, HasPrompts):
            self.generator.checked_lengths([*self.trainer.datamodule.all_prompts(), self.negative])
        self.memory.place(self.generator, self.trainer.strategy.root_device)
        if self.memory.text_first:
            self._embedded = embed_first(self, [self.negative])

    def _encoded(self, prompts: Sequence[str]) -> list[Encoded]:
        """Embeddings of prompts, on the device: computed now, or before all else."""
        if not self.memory.text_first:
            return self.generator.encode_prompts(prompts)
        return [{name: part.to(self.device) for name, part in self._embedded[p].items()} for p in prompts]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, dict[str, bytes], dict]]:
        """Sample the videos of a batch.

        Returns:
            Key, members and record of each sample of a *videos* set. The image that a video begins with is one of its
            members.
        """
        if not batch["keys"]:
            return []
        generator, h = self.generator, self.hparams
        encoded = self._encoded(batch["prompts"])
        if "images" in batch:
            images = generator.encode_images(batch["images"], h["num_frames"])
            encoded = [prompt | image for prompt, image in zip(encoded, images)]
        condition = generator.condition(encoded, self.device)
        guided = max(self.cfg_scale, self.cfg_scale_2 or 1) > 1
        null = generator.null_condition(self._encoded([self.negative])[0]) if guided else None
        _, noise = draw(torch.tensor(batch["seeds"]), torch.Size(self.shape), self.device)
        if self.searcher:
            self.searcher.check_memory(condition, null, noise)
        # on a CPU the time of all cores that compute, whatever else the machine does meanwhile
        clock = time.monotonic if self.device.type == "cuda" else time.process_time
        begun = clock()
        with Evaluations(generator, self.noisy_reward) as evaluations:
            latents, found = self._sampled(batch, condition, null, noise)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (clock() - begun) / len(latents)
        videos = generator.decode(latents, batch["keys"])  # (N, T, 3, H, W); refuses what is not finite
        views = self._views(latents, noise, condition, batch["keys"])
        files = batch.get("image_files") or [None] * len(views)
        samples = []
        sampled = zip(batch["keys"], batch["prompts"], batch["seeds"], videos.cpu(), views, files, found)
        for key, prompt, seed, video, view, file, chosen in sampled:
            record = {"prompt": prompt, "source": h["source"], "seed": seed, "guidance": h["cfg_scale"]}
            record |= {name: h[name] for name in ("steps", "fps", "num_frames", "height", "width")}
            if self.noisy_reward:
                record |= {"guide": asdict(self.guide), "reward": h["noisy_reward"]}
                record["noisy_reward"] = dict(zip(DIMENSIONS, view))
            if chosen:
                record["search"] = self.searcher.search.settings() | {"left": chosen.left, "reward": chosen.reward}
            record |= {"seconds": round(seconds, 4), "evaluations": round(evaluations.total / len(latents), 4)}
            members = {"mp4": encode(video.permute(0, 2, 3, 1).numpy(), h["fps"], h["crf"])}
            if file:
                image = read_image(Path(file), file)
                members[image.kind], record["image"] = image.content, image.entry(Path(file).name)
            samples.append((key, members, record))
        return samples

    def _sampled(
        self, batch: dict[str, Any], condition: Condition, null: Condition | None, noise: Tensor
    ) -> tuple[Tensor, Sequence[Chosen | None]]:
        """Latents (N, C, F, H, W) of a batch, and what a search has chosen for each."""
        if self.searcher:
            found = [
                self.searcher(rows(condition, [i]), null, seed, noise[i : i + 1], key)
                for i, (seed, key) in enumerate(zip(batch["seeds"], batch["keys"], strict=True))
            ]
            return torch.cat([latents for latents, _ in found]), [chosen for _, chosen in found]
        steer = steering(self.noisy_reward, self.guide, condition) if self.noisy_reward else None
        scales = {"cfg_scale": self.cfg_scale, "cfg_scale_2": self.cfg_scale_2, "shift": self.shift, "null": null}
        latents = self.generator.sample(condition, noise, self.steps, steer=steer, **scales)
        return latents, [None] * len(latents)

    def _views(self, latents: Tensor, noise: Tensor, condition: Condition, keys: list[str]) -> list:
        """The noisy reward's own scores of finished latents: normalised rewards (N, D) at t = :data:`VIEWED_AT`."""
        if not self.noisy_reward:
            return [None] * len(latents)
        t = torch.full((len(latents),), VIEWED_AT, device=latents.device)
        with torch.no_grad():
            x = self.generator.with_image(interpolate(latents, noise, t), condition)
            rewards = self.noisy_reward(x, t, condition)
        rewards = self.noisy_reward.normalise(rewards)
        remedy = f"look at {self.hparams['noisy_reward']}"
        require_finite("the noisy reward's view of sampled videos", by_name(keys, rewards), remedy)
        return rewards.tolist()

    def extra_files(self) -> dict[str, bytes]:
        """A *videos* set needs no further files."""
        return {}
