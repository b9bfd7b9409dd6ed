"""A dress rehearsal at real size, on a CPU: a released generator's transformer with random weights trains for a step.

    python benchmarks/real_size.py FOLDER [--name Wan-AI/Wan2.2-TI2V-5B-Diffusers] [--frames 1] [--side 64]

Writes the transformer in bf16 as sharded safetensors, tensor by tensor; loads it through ``load_generator``, takes one
LoRA-DPO step on a small clip by ``Trainer.fit``, and exports. Prints the peak memory of every stage beside what must be
held then. Real tokenizers and text encoders are out of reach here: prompts are random embeddings of the real width. The
autoencoder has the real latents and small layers; a step does not call it. Wan's families only.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread

import lightning as L
import torch
from random_weights import SHARD, write_generator, write_latents

from videoalign.alignment import FlowDPO
from videoalign.callbacks import ExportGenerator
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.generator_folder import load_generator
from videoalign.models.live_memory import size_of
from videoalign.models.lora import LoRA
from videoalign.models.whole import shapes_only

GIB = 2**30
SMALL = {"base_dim": 16, "decoder_base_dim": 16}
"""Layers of the autoencoder."""


def resident(*kinds: str) -> float:
    """Memory of this process in GiB, of some of the system's kinds: ``RssAnon``, ``RssFile``."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[kind].split()[0]) for kind in kinds) / 2**20


@contextmanager
def stage(name: str, held: float = 0.0) -> Iterator[None]:
    """Print the peak memory of a stage beside what must be held during it, in GiB.

    Pages of files that are mapped (weights that are loaded in the dtype of their file) are counted apart: the system
    can drop them at any time and read them again.

    Args:
        name: Name of the stage.
        held: Bytes that must be held at its end, beside what the process had at its beginning.
    """
    kinds = ("RssAnon", "RssFile")
    before, done = {kind: resident(kind) for kind in kinds}, Event()
    seen = {"both": 0.0, **dict.fromkeys(kinds, 0.0)}

    def look() -> None:
        now = {kind: resident(kind) - before[kind] for kind in kinds}
        for kind, value in {**now, "both": sum(now.values())}.items():
            seen[kind] = max(seen[kind], value)

    def watch() -> None:
        while not done.wait(0.02):
            look()

    watcher, started = Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        look()
        seconds = time.perf_counter() - started
        print(
            f"{name:30}{seconds:6.0f} s   needs {held / GIB:6.2f}   peak {seen['both']:6.2f} "
            f"(own {seen['RssAnon']:6.2f}, mapped {seen['RssFile']:6.2f}) GiB",
            flush=True,
        )


def main() -> None:
    """Take all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write; it holds the weights afterwards")
    parser.add_argument("--name", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="released generator of Wan's")
    parser.add_argument("--frames", type=int, default=1, help="frames of the clip")
    parser.add_argument("--side", type=int, default=64, help="height and width of the clip")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the frozen weights")
    options = parser.parse_args()
    weights = options.folder / "generator"
    if not weights.exists():
        with stage("write random weights", SHARD):
            write_generator(weights, options.name, SMALL)
    with shapes_only():
        shapes = load_generator(weights, options.dtype, ("transformer", "vae"))
    frozen = size_of([*shapes.parameters(), *shapes.buffers()])
    with stage("load_generator", frozen):
        generator = load_generator(weights, options.dtype, ("transformer", "vae"))
    del generator
    lora = LoRA(targets=["to_q", "to_k", "to_v", "to_out.0"])
    with shapes_only():
        module = FlowDPO(generator=str(weights), dtype=options.dtype, lora=lora)
    adapters = size_of(module.trained().values())
    with stage("FlowDPO with adapters", frozen + adapters):
        module = FlowDPO(
            generator=str(weights),
            dtype=options.dtype,
            lora=lora,
            gradient_checkpointing=True,
            optimizer=partial(torch.optim.AdamW, lr=1e-5),
        )
    shape = module.generator.latent_shape(options.frames, options.side, options.side)
    pairs = options.folder / "latents"
    write_latents(pairs, module.generator, shape)
    data = LatentPairs(str(pairs), batch_size=1, workers=0, min_margin=None)
    export = ExportGenerator(str(options.folder / "export"))
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=options.folder,
    )
    with stage(f"one step, latents {shape}", 3 * adapters):
        trainer.fit(module, data)
    trainer.callbacks.append(export)
    with stage("export", 0):
        export.on_fit_end(trainer, module)
    with stage("fingerprint", 0):
        module.reference_made()
    print(f"loss {float(trainer.callback_metrics['train/loss']):.4f}, which is ln 2 at the first step")


if __name__ == "__main__":
    main()
