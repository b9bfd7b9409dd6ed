"""Functions that several test files share."""

import ast
import gc
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from videoalign.cli import main
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.latents import NULL
from videoalign.datamodules.shards import ShardWriter, sha256
from videoalign.datamodules.video import encode
from videoalign.miniature.world.rendered_sets import WorldSize, write_world
from videoalign.miniature.world.sprites import FRAMES, SIZE

QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_checkpointing": False,
}  # fmt: skip
"""Options of a trainer that says nothing and leaves nothing behind."""
SMALLEST = {"train": 1, "val": 1, "benchmark_videos": 8, "benchmark_pairs": 3, "captions": 1}
FEW_TOKENS = 64
"""Tokens that most miniature generators here pad prompts to; of a family's own number nearly all would be padding."""
CLIP = ClipSize(num_frames=FRAMES, height=SIZE, width=SIZE)
"""The miniature world's clips at their own size."""


# --- commands -------------------------------------------------------------------------------------


def call(*args) -> int:
    """Exit status of a command."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def flags(**values) -> list[str]:
    """Options of a command line: ``num_frames=9`` is ``--num-frames=9``."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def json_lines(capsys) -> list[dict]:
    """The JSON lines that were printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def strict_json(path: Path):
    """A file's JSON; the NaN that Python would let pass is refused."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# --- tensors --------------------------------------------------------------------------------------


def randn(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def doubles(*shape, seed=0) -> torch.Tensor:
    """Normal numbers in double precision."""
    return randn(*shape, seed=seed, dtype=torch.float64)


def same_tensors(found: dict, want: dict) -> bool:
    """Whether two dictionaries hold the same tensors by name."""
    return found.keys() == want.keys() and all(torch.equal(found[name], value) for name, value in want.items())


# --- files ----------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the content of files, None for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {name: content for name, content in tree(folder).items() if content is not None}


def plain_clip(shade: int, frames: int = 9, height: int = 32, width: int = 32, fps: int = 8) -> bytes:
    """An mp4 of one grey."""
    return encode(np.full((frames, height, width, 3), shade, np.uint8), fps)


def noise_clip(seed: int, frames: int, height: int = 32, width: int = 32, fps: int = 8) -> bytes:
    """An mp4 of random pixels."""
    return encode(np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8), fps)


def write_latents(out, identity, shape, record, count=8, of="pairs", tensors=lambda i, made: made, **index) -> str:
    """Write a latents set with random content.

    Args:
        out: Folder of the set.
        identity: What the latents depend on, from ``generator.identity()``.
        shape: Shape of each video's latents.
        record: Record of a sample by its number.
        count: Number of samples.
        of: "pairs" or "videos".
        tensors: May change the tensors of a sample.
        index: Further entries of the index.
    """
    sides = {"pairs": ("a", "b"), "videos": ("video",)}[of]
    with ShardWriter(out, "latents", media="safetensors", per_shard=3) as writer:
        writer.index.latents = {**identity, "of": of, **index}
        for i in range(count):
            made = {side: randn(*shape, seed=100 * i + s) for s, side in enumerate(sides)}
            made["prompt"] = randn(3 + i % 3, 32, seed=100 * i + 50)
            writer.write(f"k{i}", {"": safetensors.torch.save(tensors(i, made))}, record(i))
        (writer.path / NULL).write_bytes(safetensors.torch.save({"prompt": randn(1, 32)}))
        writer.index.tables[NULL] = sha256(writer.path / NULL)
    return str(out)


def clips_world(out, clips=48, seed=5):
    """Write the smallest miniature world with so many clips; returns its folder."""
    for _ in write_world(out, WorldSize(**SMALLEST, clips=clips), seed):
        pass
    return out


def syntax(file):
    """The syntax tree of a Python file.

    No garbage is collected meanwhile: Python 3.11 refuses to build a tree when a destructor runs Python code in between
    ("AST constructor recursion depth mismatch").
    """
    gc.disable()
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    finally:
        gc.enable()
