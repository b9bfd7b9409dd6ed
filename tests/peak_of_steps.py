"""Trains a generator for two steps of each case, and prints the peak of the second one beside the planned one, in MiB.

Argument: a folder for generator and latents. A process of its own, whose memory nothing else takes.
"""

import ctypes
import gc
import json
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch

from helpers import QUIET, write_latents
from videoalign.alignment import FlowDPO, FlowSFT
from videoalign.alignment.footprint import measure, without_storage
from videoalign.commands.planned_batch import Clip, batch_of
from videoalign.datamodules.latents import LatentPairs
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA
from videoalign.models.whole import shapes_only

SHAPE = (16, 5, 24, 24)
ATTENTION = LoRA(targets=["to_q", "to_k", "to_v", "to_out.0"])
CASES = (
    (FlowSFT, ATTENTION, True, False),
    (FlowSFT, None, False, False),
    (FlowDPO, ATTENTION, False, False),
    (FlowDPO, None, True, False),
    (FlowDPO, ATTENTION, True, True),
    (FlowDPO, None, False, True),
)
"""Algorithm, adapters, whether activations are computed again, whether the reference's errors are cached."""


def resident(key: str) -> float:
    """Memory of this process in MiB: VmRSS now, VmHWM at its highest since :class:`Second` reset it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) / 1024


class Second(L.Callback):
    """Takes the peak of the second optimizer step."""

    def on_train_batch_start(self, trainer, module, batch, number):
        if trainer.global_step == 1:
            trim()
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_end(self, *rest):
        self.peak = resident("VmHWM")


class Cached(L.Callback):
    """Gives batches the reference's errors, as a cache does."""

    def on_train_batch_start(self, trainer, module, batch, number):
        batch["reference"] = torch.ones_like(batch["reference"])


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def case(folder: Path, kind: type, lora: LoRA | None, checkpointing: bool, cached: bool, accumulated: int) -> dict:
    options = {
        "generator": str(folder / "generator"),
        "lora": lora,
        "gradient_checkpointing": checkpointing,
        "optimizer": partial(torch.optim.AdamW, lr=1e-5),
        "parts": ["transformer", "vae"],
    }
    with shapes_only():
        module = kind(**options)
    sides = 1 + max(kind.sides)
    with without_storage(module):
        clip = Clip(SHAPE, sides, {"prompt": (12, 32)}, "")
        batch = partial(batch_of, clip, 1, cached)
        planned = measure(module, batch, accumulated=accumulated > 1, foreach=False)
    del module
    trim()
    before, second = resident("VmRSS"), Second()
    data = LatentPairs(str(folder / "latents"), batch_size=1, workers=0, min_margin=None)
    settings = {**QUIET, "max_steps": 2, "limit_val_batches": 0, "accumulate_grad_batches": accumulated}
    trainer = L.Trainer(**settings, callbacks=[second, *([Cached()] if cached else [])])
    trainer.fit(kind(**options), data)
    return {"planned": planned.peak() / 2**20, "measured": second.peak - before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    make_generator(folder / "generator", hidden=256, layers=4)
    identity = load_generator(folder / "generator").identity()
    labels = {"prompt": "a", "labels": dict.fromkeys(("VQ", "MQ", "TA"), "A")}
    write_latents(folder / "latents", identity, SHAPE, lambda i: labels, 4)
    case(folder, FlowSFT, ATTENTION, False, False, 1)  # what the first training of a process loads stays in its memory
    for kind, lora, checkpointing, cached in CASES:
        found = case(folder, kind, lora, checkpointing, cached, accumulated=2 if checkpointing else 1)
        name = (
            f"{kind.__name__} {'lora' if lora else 'whole'} {'again' if checkpointing else 'kept'}{' cached' * cached}"
        )
        print(json.dumps({"case": name, **found}), flush=True)
