"""Rows without a backward pass through the whole model: sampling, with and without guidance, and scoring."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_flops import Part, reward_parts, summary, wan, wan_tokens
from gpu_place import Place
from gpu_rows import clip_of
from gpu_timing import StepTimes, device, finish, peak_gib, spread
from random_weights import PROMPT, random_prompt

from videoalign.commands.config_files import FOLDER
from videoalign.commands.reward_judge import RewardJudge
from videoalign.datamodules.video_list import Listed
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance, steering
from videoalign.models.lora import LoRA
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.video_reward import VideoReward


def sampling(place: Place, generator: str, steps: int = 7, cfg_scale: float = 1.0, blocks: int = 0) -> dict[str, Any]:
    """Time the steps of sampling one video, as `videoalign generate --dtype bfloat16` takes them.

    Args:
        place: Where models and sets are.
        generator: Name of the generator.
        steps: Number of scheduler steps; the first one, which is never steered, is not counted.
        cfg_scale: Classifier-free guidance scale; 1 turns it off.
        blocks: Blocks of the noisy reward that steers every step; 0 for none.
    """
    clip, where = clip_of(generator, place.toy), device()
    model = load_generator(place.generator(generator), "bfloat16", ("transformer",)).to(where)
    shape = model.latent_shape(clip.frames, clip.height, clip.width)
    condition = model.condition([random_prompt(model, model.max_tokens // 4)], where)
    null = model.null_condition(random_prompt(model, 1), where) if cfg_scale > 1 else None
    steer, parts = None, []
    evaluations = 2 if cfg_scale > 1 else 1
    one = wan(model.transformer, shape, model.max_tokens, evaluations)
    parts = [Part(f"{evaluations} evaluation(s)", one["weights"] + one["attention"])]
    if blocks:
        blocks = min(blocks, model.config.num_layers)
        reward = NoisyReward(model, NoisyRewardShape(blocks=blocks)).to(where).eval().requires_grad_(False)
        reward.trunk.enable_gradient_checkpointing()  # as Generate does
        steer = steering(reward, Guidance(), condition)
        own = wan(reward.trunk, shape, model.max_tokens, 1, blocks)
        parts += [Part("noisy reward: weights", own["weights"], 2, True)]
        parts += [Part("noisy reward: attention", own["attention"], 3, True)]
    ends: list[float] = []
    noise = torch.randn(1, *shape, device=where)
    model.sample(condition, noise, steps, cfg_scale, null, on_step=lambda: ends.append(finish()), steer=steer)
    seconds = [end - begun for begun, end in pairwise(ends)]
    times = spread(seconds)
    return {
        **times,
        "flops": summary(parts),
        "peak_gib": peak_gib(),
        "tokens": wan_tokens(model.transformer, shape) * evaluations,
        "token": "video tokens",
        "seconds_per_evaluation": None if blocks else times["seconds"] / evaluations,
        "what": f"step of one video, latents {' x '.join(map(str, shape))}, {evaluations} evaluation(s)"
        + (f", gradient of a reward of {blocks} blocks" if blocks else ""),
        "precision": "bf16",
    }


def score(place: Place, dtype: str, batches: int = 6, size: int = 8) -> dict[str, Any]:
    """Time the batches in which `videoalign score` rates video files, with the settings of the recipe's model.

    Args:
        place: Where models and sets are.
        dtype: Dtype of the backbone's frozen weights, ``--dtype`` of the command.
        batches: Number of batches; the first one is not counted.
        size: Number of videos in a batch, ``--batch-size`` of the command.
    """
    recipe = yaml.safe_load(Path(FOLDER, "videoreward/qwen2vl_2b.yaml").read_text(encoding="utf-8"))
    settings = dict(recipe["model"]["init_args"]["network"]["init_args"])
    settings |= {"backbone": place.backbone(), "dtype": dtype, "gradient_checkpointing": False}
    sampling = settings["sampling"] | ({"min_pixels": 0} if place.toy else {})
    settings |= {"sampling": FrameSampling(**sampling), "lora": LoRA(**settings["lora"])}
    judge = RewardJudge(model="random weights", batch_size=size, workers=4)
    judge.network = VideoReward(**settings)
    files, watch = place.files(), StepTimes()
    listed = [Listed(f"v{n}", PROMPT, files[n % len(files)]) for n in range(batches * size)]
    judge.score_files(listed, watch)
    inputs = watch.batch["inputs"]
    rows, length = inputs["input_ids"].shape
    return {
        **watch.result(),
        "flops": summary(reward_parts(judge.network, inputs, False, False)),
        "peak_gib": peak_gib(),
        "tokens": rows * length,
        "token": "language tokens",
        "what": f"batch of {rows} videos, {length} tokens and {len(inputs['pixel_patches']) // rows} patches each",
        "precision": f"weights in {dtype}",
    }
