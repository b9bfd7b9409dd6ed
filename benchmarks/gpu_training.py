"""Rows that run a shipped recipe as `videoalign fit` or `predict` runs it: training, cached references, encoding.

The recipe is parsed by the suite's own command line. What is changed is what the machine decides: one device of any
kind in place of eight GPUs, no logger, no export at the end, and as many micro-batches as are timed.
"""

import shutil
from typing import Any

import torch
from gpu_flops import Part, flow_parts, reward_parts, summary, wan, wan_tokens
from gpu_place import Place
from gpu_rows import ATTENTION, clip_of
from gpu_timing import StepTimes, device, peak_gib
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from videoalign import VideoAlignError
from videoalign.commands import lightning_cli

ONE_DEVICE = (
    "--trainer.accelerator=auto",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
BARE = ("--trainer.callbacks=[]", "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0")


class _Timed(lightning_cli.ExperimentCLI):
    """Runs an experiment with a callback that times its batches."""

    watch: StepTimes

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the recipe's trainer, and let it be watched."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self.watch)
        return trainer


def run(command: str, recipes: list[str], options: list[str], watch: StepTimes) -> lightning_cli.LightningCLI:
    """Run recipes with some options changed.

    Args:
        command: ``fit`` or ``predict``.
        recipes: The recipes' files, as they follow each other behind ``--config``.
        options: Options of the command line.
        watch: Callback that times the batches.
    """
    files = [word for recipe in recipes for word in ("--config", f"experiments/{recipe}.yaml")]
    kind = type("_Timed", (_Timed,), {"watch": watch})
    try:
        return lightning_cli.run([command, *files, *ONE_DEVICE, *options], kind)
    except ValueError as error:  # a module that cannot be made, in the parser's words
        raise VideoAlignError(lightning_cli.condensed(str(error))) from error


# --- generators ---------------------------------------------------------------------------------------------------


def flow(
    place: Place,
    recipes: list[str],
    generator: str,
    batches: int = 6,
    frames: int | None = None,
    options: list[str] = [],  # noqa: B006  never changed
    cached: bool = False,
    trace: bool = False,
) -> dict[str, Any]:
    """Time the micro-batches of a recipe that trains a generator on latents.

    Args:
        place: Where models and sets are.
        recipes: The recipes' files.
        generator: Name of the generator.
        batches: Number of micro-batches; the first one is not counted.
        frames: Number of frames of a video, if it is not the recipe's.
        options: Options that differ from the recipe.
        cached: Whether the reference's errors come from a cache, which the row ``reference`` has written.
        trace: Whether one more micro-batch is traced.
    """
    clip = clip_of(generator, place.toy, frames)
    watch = StepTimes(trace=place.folder / "trace.json.gz" if trace else None)
    given = [f"--model.generator={place.generator(generator)}", f"--data.train={place.latents(generator, clip)}"]
    given += [f"--data.reference={reference_folder(place, generator)}"] if cached else []
    count = f"--trainer.limit_train_batches={batches + bool(trace)}"
    cli = run("fit", recipes, [*given, *BARE, count, *options], watch)
    module, shape = cli.model, tuple(watch.batch["latents"].shape[2:])
    sides = watch.batch["latents"].shape[0] if module.sides is None else len(module.sides)
    videos = sides * watch.batch["latents"].shape[1]
    again = checkpointing(module.policy)
    live = module.needs_reference and not cached
    parts = flow_parts(module, shape, videos, live, again, ATTENTION in options)
    return {
        **watch.result(),
        **_measured(cli, parts),
        "tokens": wan_tokens(module.policy, shape) * videos,
        "token": "video tokens",
        "what": f"micro-batch, latents {' x '.join(map(str, shape))}, {videos} videos",
        "checkpointing": again,
    }


def checkpointing(network: nn.Module) -> bool:
    """Whether a network of diffusers or transformers computes activations again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def _measured(cli: lightning_cli.LightningCLI, parts: list[Part]) -> dict[str, Any]:
    """What every training row has beside its times."""
    loss = cli.trainer.callback_metrics.get("train/loss")
    return {
        "flops": summary(parts),
        "peak_gib": peak_gib(),
        "loss": None if loss is None else float(loss),
        "precision": str(cli.trainer.precision),
    }


def reference_folder(place: Place, generator: str) -> str:
    """Folder of cached reference errors."""
    return str(place.folder / f"{generator}_reference")


def reference(place: Place, generator: str) -> dict[str, Any]:
    """Time the reference's errors of pairs, which is a forward pass alone; the row ``dpo_cached`` reads them.

    Args:
        place: Where models and sets are.
        generator: Name of the generator.
    """
    out, watch = reference_folder(place, generator), StepTimes()
    shutil.rmtree(out, ignore_errors=True)
    data = place.latents(generator, clip_of(generator, place.toy))
    options = [f"--model.generator={place.generator(generator)}", f"--data.data={data}", f"--data.out={out}"]
    cli = run("predict", ["reference/wan"], options, watch)
    shape, videos = tuple(watch.batch["latents"].shape[2:]), 2
    one = wan(cli.model.policy, shape, cli.model.generator.max_tokens, videos)
    parts = [Part("weights", one["weights"]), Part("attention", one["attention"])]
    return {
        **watch.result(),
        **_measured(cli, parts),
        "tokens": wan_tokens(cli.model.policy, shape) * videos,
        "token": "video tokens",
        "what": f"forward pass of a pair, latents {' x '.join(map(str, shape))}",
    }


def encode(place: Place, generator: str, videos: int = 6) -> dict[str, Any]:
    """Time the encoding of videos by a generator's autoencoder, with its recipe.

    Operations are counted by torch's formulas in one more pass.

    Args:
        place: Where models and sets are.
        generator: Name of the generator.
        videos: Number of videos; the first one is not counted.
    """
    out, clip, watch = place.folder / "encoded", clip_of(generator, place.toy), StepTimes()
    shutil.rmtree(out, ignore_errors=True)
    size = {"num_frames": clip.frames, "height": clip.height, "width": clip.width}
    given = [f"--data.data={place.videos('videos', videos)}", f"--data.out={out}"]
    given += [f"--data.clip.{name}={value}" for name, value in size.items()] if place.toy else []
    cli = run("predict", ["encode/wan"], [f"--model.generator={place.generator(generator)}", *given], watch)
    shutil.rmtree(out, ignore_errors=True)
    peak, model = peak_gib(), cli.model.to(device())
    video = torch.randint(0, 256, (1, clip.frames, 3, clip.height, clip.width), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        model.generator.encode_video(video)
    parts = [Part("autoencoder, by torch's formulas", float(counter.get_total_flops()))]
    return {
        **watch.result(),
        **_measured(cli, parts),
        "peak_gib": peak,
        "tokens": clip.frames,
        "token": "frames",
        "what": f"video of {clip.frames} frames, {clip.height} x {clip.width}",
    }


# --- reward model -------------------------------------------------------------------------------------------------


def reward(
    place: Place,
    recipes: list[str],
    batches: int = 8,
    options: list[str] = [],  # noqa: B006  never changed
) -> dict[str, Any]:
    """Time the micro-batches of a recipe that trains a reward model on videos.

    Args:
        place: Where models and sets are.
        recipes: The recipes' files.
        batches: Number of micro-batches; the first two are not counted.
        options: Options that differ from the recipe.
    """
    watch = StepTimes(warmup=2)
    given = [f"--model.network.backbone={place.backbone()}", f"--data.train={place.videos('pairs', batches)}"]
    given += ["--model.network.sampling.min_pixels=0"] if place.toy else []
    cli = run("fit", recipes, [*given, *BARE, f"--trainer.limit_train_batches={batches}", *options], watch)
    network, inputs = cli.model.network, watch.batch["inputs"]
    again = checkpointing(network.backbone)
    rows, length = inputs["input_ids"].shape
    return {
        **watch.result(),
        **_measured(cli, reward_parts(network, inputs, True, again)),
        "tokens": rows * length,
        "token": "language tokens",
        "what": f"micro-batch, {rows} videos, {length} tokens and {len(inputs['pixel_patches']) // rows} patches each",
        "checkpointing": again,
    }
