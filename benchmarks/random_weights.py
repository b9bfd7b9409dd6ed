"""Released models with random weights: folders with their real configurations, and sets that they can train on.

Real tokenizers and text encoders are out of reach without a network, so those of the miniatures take their places;
embedded prompts are random, of the real width.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import diffusers
import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, Qwen2VLForConditionalGeneration, UMT5EncoderModel

from videoalign.datamodules.latents import NULL
from videoalign.datamodules.shards import ShardWriter, sha256
from videoalign.datamodules.video import encode
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models.generator import Generator
from videoalign.models.known_generators import KNOWN, write_configs
from videoalign.models.live_memory import size_of
from videoalign.models.template import Template
from videoalign.models.whole import load_whole, shapes_only

SHARD = 2**30
"""Bytes that a shard of weights holds at most, but for its last tensor."""
TOKENS = 32
"""Length of a prompt that the small text encoder reads: bf16 is slow on most CPUs."""
PROMPT = "a girl with braided hair sits down on a chair by the window while it rains outside"
QWEN2_VL_2B = {
    "model_type": "qwen2_vl",
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_vl_text",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vision_config": {
        "model_type": "qwen2_vl_vision",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""Configuration of Qwen2-VL-2B-Instruct, but for the ids of its special tokens."""
QWEN_TINY = {
    **QWEN2_VL_2B,
    "text_config": {
        **QWEN2_VL_2B["text_config"],
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        **QWEN2_VL_2B["vision_config"],
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 64,
        "num_heads": 2,
    },
}
"""The same architecture with two narrow layers, for a run on a CPU."""


# --- weights ------------------------------------------------------------------------------------------------------


def write_generator(folder: Path, name: str, vae: Mapping[str, int] | None = None, tokens: int = TOKENS) -> None:
    """Write a released generator's folder with random weights in bf16, tensor by tensor; nothing if it is there.

    The autoencoder's weights are fp32. Tensors are drawn on the GPU where there is one.

    Args:
        folder: Folder to write.
        name: Hub id of the released generator, one of Wan's.
        vae: Settings of the autoencoder that differ from the released ones.
        tokens: Number of tokens that prompts are padded to.
    """
    if (folder / "model_index.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as building:
        made = Path(building, "generator")
        write_configs(name, made)
        settings = made / "vae" / "config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | dict(vae or {})))
        _add_small_encoder(made, tokens)
        for part, dtype in (("transformer", torch.bfloat16), ("vae", torch.float32)):
            kind = getattr(diffusers, KNOWN[name][2][part][1])
            with shapes_only():
                shapes = load_whole(kind, made, name, part, dtype=dtype).state_dict()
            write_tensors(made / part, shapes, "diffusion_pytorch_model")
        made.rename(folder)


def write_backbone(folder: Path, config: Mapping[str, object]) -> None:
    """Write a Qwen2-VL's folder with random weights in bf16; nothing if it is there.

    The tokenizer is a miniature's whose tokens are words of the reward model's template, so that its texts are about as
    long as under the real tokenizer.

    Args:
        folder: Folder to write.
        config: Content of ``config.json`` without the ids of special tokens, such as :data:`QWEN2_VL_2B`.
    """
    if (folder / "config.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as building:
        made = Path(building, "backbone")
        patch = config["vision_config"]["patch_size"]
        corpus = [Template.load("rubrics").text, PROMPT]
        make_qwen(made, corpus=corpus, layers=1, vision_layers=1, patch=patch, vocabulary=4000)
        (made / "model.safetensors").unlink()
        small = json.loads((made / "config.json").read_text())
        ids = {key: value for key, value in small.items() if key.endswith("_token_id") and value is not None}
        (made / "config.json").write_text(json.dumps({**config, **ids}, indent=1))
        with shapes_only():
            model = load_whole(Qwen2VLForConditionalGeneration, made, "the backbone", dtype=torch.bfloat16)
        shapes = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # it is tied
        write_tensors(made, shapes, "model")
        made.rename(folder)


def write_tensors(folder: Path, shapes: Mapping[str, Tensor], stem: str) -> None:
    """Write random tensors as sharded safetensors with their index, a shard at a time.

    Args:
        folder: Folder to write into.
        shapes: Tensors by name, whose shapes and dtypes are taken.
        stem: Beginning of the files' names.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for key, tensor in shapes.items():
        if size_of(shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][key] = tensor
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file({k: _random(k, t) for k, t in shard.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": size_of(shapes.values())}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, like: Tensor) -> Tensor:
    """Random values of the size that a network's layers begin with, on the CPU."""
    made = torch.empty(like.shape, dtype=like.dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    if like.ndim > 1 and not name.endswith("gamma"):
        return made.normal_(0, 0.02).cpu()
    return made.fill_(0.0 if name.endswith("bias") else 1.0).cpu()


def _add_small_encoder(folder: Path, tokens: int) -> None:
    """Put a miniature's tokenizer into a folder, and a small text encoder of the width that the transformer takes."""
    with tempfile.TemporaryDirectory() as small:
        make_generator(f"{small}/wan", "wan", max_tokens=tokens)
        parts = ("tokenizer", "text_encoder")
        for part in parts:
            shutil.copytree(f"{small}/wan/{part}", folder / part)
        index, own = (json.loads(Path(f, "model_index.json").read_text()) for f in (folder, f"{small}/wan"))
    width = json.loads((folder / "transformer/config.json").read_text())["text_dim"]
    config = AutoConfig.from_pretrained(folder / "text_encoder", d_model=width)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    index |= {part: own[part] for part in parts}
    (folder / "model_index.json").write_text(json.dumps(index))


# --- sets ---------------------------------------------------------------------------------------------------------


def random_prompt(generator: Generator, tokens: int = TOKENS) -> dict[str, Tensor]:
    """A random embedded prompt of the generator's width.

    Args:
        generator: Generator that will read it.
        tokens: Length of the prompt.
    """
    return {name: torch.randn(tokens, width) for name, (_, width) in generator.prompt_shapes().items()}


def write_latents(folder: Path, generator: Generator, shape: tuple[int, ...], pairs: int = 2) -> None:
    """Write a latents set of random pairs; nothing if it is there.

    Args:
        folder: Folder to write.
        generator: Generator that will read it, with its autoencoder.
        shape: Shape (C, F, H, W) of a video's latents.
        pairs: Number of pairs.
    """
    if folder.exists():
        return
    labels = {"prompt": PROMPT, "labels": dict.fromkeys(("VQ", "MQ", "TA"), "A")}
    prompt = random_prompt(generator)
    with ShardWriter(folder, "latents", media="safetensors") as writer:
        writer.index.latents = {**generator.identity(), "of": "pairs"}
        for number in range(pairs):
            tensors = {side: torch.randn(shape) for side in "ab"} | prompt
            writer.write(f"p{number}", {"": safetensors.torch.save(tensors)}, labels)
        (writer.path / NULL).write_bytes(safetensors.torch.save(prompt))
        writer.index.tables[NULL] = sha256(writer.path / NULL)


def clip(frames: int, height: int, width: int, fps: int, seed: int = 0) -> bytes:
    """An mp4 of a bright disc that crosses a noisy background.

    Args:
        frames: Number of frames.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frame rate.
        seed: Seed of the background and of the disc's path.
    """
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 128, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    rows, columns = np.mgrid[:height, :width]
    start, end = rng.uniform(0, 1, (2, 2)) * (height, width)
    pictures = []
    for number in range(frames):
        y, x = start + (end - start) * number / max(frames - 1, 1)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < (height / 6) ** 2
        pictures.append(np.where(disc[..., None], np.uint8(230), ground))
    return encode(np.stack(pictures), fps)


def write_videos(folder: Path, kind: str, count: int, frames: int, height: int, width: int, fps: int) -> None:
    """Write a set of kind *pairs* or *videos* out of two clips; nothing if it is there.

    Args:
        folder: Folder to write.
        kind: Kind of the set.
        count: Number of samples.
        frames: Number of frames of a clip.
        height: Height of the clips, in pixels.
        width: Width of the clips, in pixels.
        fps: Frame rate of the clips.
    """
    if folder.exists():
        return
    clips = [clip(frames, height, width, fps, seed) for seed in range(2)]
    record = {"prompt": PROMPT} | ({"labels": dict.fromkeys(("VQ", "MQ", "TA"), "A")} if kind == "pairs" else {})
    with ShardWriter(folder, kind) as writer:
        for number in range(count):
            sides = dict(zip("ab", clips)) if kind == "pairs" else {"": clips[number % 2]}
            writer.write(f"v{number}", sides, record)
