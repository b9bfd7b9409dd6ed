"""Behind `videoalign plan`: an experiment parsed as `fit` parses it, and its module without weights."""

import argparse
import json
from pathlib import Path

import jsonargparse
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from .. import VideoAlignError
from ..alignment.footprint import AUTOCAST, Footprint, measure, without_storage
from ..alignment.training import Training
from ..models.checkpointing import Checkpointing
from ..models.files import write_text
from ..models.known_generators import configs_of
from ..models.whole import shapes_only
from . import lightning_cli
from .plan_table import About, record, table
from .planned_batch import Clip, batch_of, clip_of

PRECISIONS = ("32-true", "32", *AUTOCAST)
"""Precisions that are counted; training refuses others, but for float64."""


class _Shapes(lightning_cli.ExperimentCLI):
    """Parses an experiment, and makes its module without weights; neither trainer nor data."""

    def instantiate_classes(self) -> None:
        """Make the module that its settings name, or what is kept of them."""
        self.settings = self.config[self.subcommand]

    def module(self, checkpointing: Checkpointing) -> Training:
        """The experiment's module, on the meta device.

        Args:
            checkpointing: Whether activations are computed again in the backward pass, and which.
        """
        model = self.settings.model.clone()
        arguments = model.init_args
        if "generator" not in arguments or "gradient_checkpointing" not in arguments:
            raise VideoAlignError(
                f"plan counts trainings on latents, of a generator or a noisy reward; {model.class_path} reads videos, "
                "whose patches depend on their content"
            )
        arguments.gradient_checkpointing = checkpointing
        if "compile" in arguments:  # what a compiler fuses is not known before it ran
            arguments.compile = arguments.memory.compile = False
            _check_stored(arguments.memory)
        with configs_of(arguments.generator) as place, shapes_only():
            arguments.generator = place
            return self._parser(self.subcommand).instantiate(jsonargparse.Namespace(model=model)).model

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def plan(args: list[str], options: argparse.Namespace) -> None:
    """Print what an experiment needs, and write it to a file if one is asked for.

    Args:
        args: Arguments of `videoalign fit`, with its name.
        options: Options of the command itself.

    Raises:
        VideoAlignError: Where the experiment trains on something else than latents, or their shape is not known.
    """
    cli = lightning_cli.run(args, _Shapes)
    trainer, data = cli.settings.trainer, cli.settings.data.init_args
    if trainer.precision not in (None, *PRECISIONS):
        raise VideoAlignError(f"plan counts trainer.precision {', '.join(PRECISIONS)}, not {trainer.precision!r}")
    if "ContextParallel" in str(trainer.strategy):
        raise VideoAlignError(
            "plan does not count context parallelism: leave that overlay out. Of the activations that are printed then "
            "each GPU has about 1 / (ulysses_degree x ring_degree)"
        )
    micro_batches = trainer.accumulate_grad_batches or 1
    counted: dict[bool, Footprint] = {}
    own = cli.settings.model.init_args.get("gradient_checkpointing") or True
    for checkpointing in (own, False):
        module = cli.module(checkpointing)
        clip = clip_of(module, data.get("train"), options)
        try:
            with without_storage(module):
                counted[bool(checkpointing)] = measure(
                    module,
                    lambda clip=clip: batch_of(clip, data.batch_size, bool(data.get("reference"))),
                    precision=str(trainer.precision or "32-true"),
                    accumulated=micro_batches > 1,
                    foreach=trainer.accelerator != "cpu",
                )
        except DynamicOutputShapeException as error:
            raise VideoAlignError(
                f"plan counts on shapes alone, and those of {type(module.generator).__name__} depend on the content of "
                f"prompts ({error}): it cannot be planned"
            ) from None
    averaged = any(str(one.get("class_path", "")).endswith(".EMA") for one in trainer.callbacks or [])
    about = About(
        title=_title(cli, module, clip),
        gpus=options.gpus or _gpus(cli.settings),
        micro_batches=micro_batches,
        checkpointing=bool(cli.settings.model.init_args.gradient_checkpointing),
        average=counted[True].weights.trained * averaged,
    )
    print(table(about, counted))
    if options.json:
        write_text(Path(options.json), json.dumps(record(about, counted), indent=1) + "\n")


def _check_stored(memory: jsonargparse.Namespace) -> None:
    """Refuse weights in other forms than they are loaded in, which have no shapes before they are there."""
    for key in ("quantization", "layerwise_casting", "group_offload"):
        if memory.get(key):
            raise VideoAlignError(
                f"plan counts weights in model.dtype, not under model.memory.{key}; leave it out here, and subtract "
                "what it saves of the frozen weights"
            )


def _gpus(settings: jsonargparse.Namespace) -> int:
    """Number of the experiment's processes, 8 where it leaves them open."""
    devices, nodes = settings.trainer.devices, settings.trainer.num_nodes or 1
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices * nodes if isinstance(devices, int) and devices > 0 else 8


def _title(cli: _Shapes, module: Training, clip: Clip) -> tuple[str, ...]:
    """What is planned, in words."""
    settings, data = cli.settings, cli.settings.data.init_args
    trained = [p for p in module.parameters() if p.requires_grad]
    every = sum(p.numel() for p in module.parameters())
    lora = settings.model.init_args.get("lora")
    how = f"LoRA of rank {lora.rank}" if lora else "all weights"
    reference = ""
    if getattr(module, "needs_reference", False):
        reference = f", reference errors {'cached' if data.get('reference') else 'computed in the step'}"
    shape = " x ".join(map(str, clip.latents))
    return (
        f"{settings.model.class_path.rpartition('.')[2]} of {settings.model.init_args.generator}, {how}{reference}",
        f"{sum(p.numel() for p in trained) / 1e6:,.1f} M of {every / 1e6:,.1f} M parameters train, "
        f"precision {settings.trainer.precision or '32-true'}",
        f"latents {shape} ({clip.source}), {data.batch_size} x {clip.sides} videos in a micro-batch, "
        f"{settings.trainer.accumulate_grad_batches or 1} of them in a step",
    )
