"""Functions that several test files share."""

import torch

from videoalign.datamodules.encode_list import ClipSize
from videoalign.miniature.world.rendered_sets import WorldSize, write_world
from videoalign.miniature.world.sprites import FRAMES, SIZE

SMALLEST = {"train": 1, "val": 1, "benchmark_videos": 8, "benchmark_pairs": 3, "captions": 1}
QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_checkpointing": False,
}  # fmt: skip
CLIP = ClipSize(num_frames=FRAMES, height=SIZE, width=SIZE)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(found, want):
    return found.keys() == want.keys() and all(torch.equal(found[name], value) for name, value in want.items())


def clips_world(out, clips=48, seed=5):
    for _ in write_world(out, WorldSize(**SMALLEST, clips=clips), seed):
        pass
    return out
