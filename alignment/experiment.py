"""`videoalign fit|validate|test|predict`: the Lightning CLI over YAML experiments."""

import logging
import sys
import warnings
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import jsonargparse
import lightning as L
import transformers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

# Imported so that short class names work in YAML files.
from .. import VideoAlignError, alignment, callbacks, datamodules  # noqa: F401
from ..callbacks.progress import LogProgress
from ..callbacks.stopping import stoppable
from ..callbacks.tensorboard import writer_of
from ..datamodules import captions, clips, encode_list, latents, pairs, prompts, reference  # noqa: F401

# An interpolation such as ${data.init_args.batch_size} means the same in every subcommand and follows overrides.
jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


_NOISE = (
    "LightningCLI's args parameter",
    ".*treespec, LeafSpec",  # Lightning's own use of a deprecated call
    r"Found \d+ module\(s\) in eval mode",  # what is frozen stays so
    "Your `IterableDataset` has `__len__` defined",  # ours is right: every worker has its own range
)
"""Warnings that ask nothing of the user."""


class SaveConfig(SaveConfigCallback):
    """The merged configuration as ``config.yaml`` in the run's folder and as text in TensorBoard."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Without a logger there is no folder of the run, and the current one is not ours to write into."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """On the first rank only."""
        if writer := writer_of(trainer):
            text = self.parser.dump(self.config, skip_none=False)
            writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)


LONGEST = 1500
"""Characters of a message; some hold the whole configuration."""


class _Parser(LightningArgumentParser):
    """Says what is wrong with a configuration without a page of usage before it."""

    def error(self, message: str, exception: Exception | None = None) -> NoReturn:
        raise VideoAlignError(message if len(message) <= LONGEST else f"{message[:LONGEST]} ...") from exception


class ExperimentCLI(LightningCLI):
    """Lightning's CLI with this project's defaults."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The top parser; subcommands use the same class."""
        kwargs.setdefault("dump_header", [])
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=jsonargparse.ActionConfigFile, help="YAML file; may be given repeatedly"
        )
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that ends at the next step when a signal asks for it."""
        return stoppable(super().instantiate_trainer(**kwargs))

    def _parse_ckpt_path(self) -> None:
        """What YAML and command line say holds; Lightning would let a checkpoint's values override them silently."""


def quiet() -> None:
    """Leave out bars, tips and warnings that ask nothing of the user."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def packaged(path: str) -> str:
    """A path like ``experiments/...yaml`` that is not in the current folder, found in the installed package."""
    if not Path(path).exists() and path.startswith("experiments/"):
        with as_file(files("videoalign") / path) as inside:
            if inside.exists():
                return str(inside)
    return path


def call(function: Callable[..., Any], args: list[str]) -> None:
    """Call a function with arguments from YAML files and the command line, as `fit` takes its."""
    quiet()
    args = [packaged(a) if before in ("-c", "--config") else a for before, a in zip(["", *args], args)]
    parser = _Parser(parser_mode="omegaconf+", description=function.__doc__.splitlines()[0])
    parser.add_argument(
        "-c", "--config", action=jsonargparse.ActionConfigFile, help="YAML file; may be given repeatedly"
    )
    parser.add_function_arguments(function)
    settings = parser.instantiate_classes(parser.parse_args(args))
    settings.pop("config")
    function(**settings.as_dict())


def run(args: list[str]) -> LightningCLI:
    """Run one subcommand; ``args`` as on the command line.

    Returns:
        The CLI object, with ``trainer``, ``model`` and ``datamodule``.
    """
    quiet()
    args = [packaged(a) if before in ("-c", "--config") else a for before, a in zip(["", *args], args)]
    return ExperimentCLI(
        L.LightningModule,
        L.LightningDataModule,
        args=args,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={} if sys.stderr.isatty() else {"callbacks": [LogProgress()]},
        save_config_callback=SaveConfig,
        parser_kwargs={"parser_mode": "omegaconf+"},
    )
