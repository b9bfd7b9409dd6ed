"""`videoalign fit|validate|test|predict`: the Lightning CLI over YAML experiments."""

import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import lightning as L
import yaml
from jsonargparse import SUPPRESS
from jsonargparse._optionals import get_omegaconf_loader
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

# Imported so that short class names work in YAML files.
from .. import VideoAlignError, alignment, callbacks, datamodules, stopping  # noqa: F401
from ..callbacks.checkpoint_io import whole_checkpoints
from ..callbacks.parts_summary import PartsSummary
from ..callbacks.progress import Progress
from ..callbacks.run_folder import folder_of, own_folders
from ..callbacks.run_media import media_of
from ..callbacks.stoppable import stoppable
from ..datamodules import encode_list, latents, pairs, prompts, reference_errors  # noqa: F401
from ..models.files import write_text
from ..models.yaml_text import check_yaml, too_large
from ..redaction import redacted_tree
from .config_faults import FLAGS, Group, explained, group_of, unknown
from .config_files import configured, put_behind
from .devices import supported
from .logger_errors import explained_loggers
from .newest_checkpoint import check_exists, resolved
from .quiet import quiet
from .run_end import RunEnd
from .settings import read_settings

# An interpolation such as ${data.init_args.batch_size} means the same in every subcommand and follows overrides.
jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
# The docstrings below the fields of dataclasses are their help texts.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class SaveConfig(SaveConfigCallback):
    """The merged configuration as ``config.yaml`` in the run's folder, and in every logger."""

    written: str | None = None
    """Name of the file that this run has written, on the first process."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save it. Without a logger there is no folder of the run, and the current one is not ours to write into.

        Lightning would write to the folder of all runs where a logger names no other, and refuse the second run.
        """
        folder = folder_of(trainer)  # collective
        if self.already_saved or folder is None:
            return
        self.already_saved = True
        if trainer.is_global_zero:
            text = self.parser.dump(redacted_tree(self.config), skip_none=False)
            path = _unused(folder / self.config_filename)
            write_text(path, text)
            self.written = path.name
            media_of(trainer).document(self.config_filename, text)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name the configuration, of which a folder may hold several; the first process writes checkpoints."""
        if self.written:
            checkpoint["config"] = self.written


def _unused(path: Path) -> Path:
    """The path, or one with a number behind its name: a run that goes on in its folder keeps both configurations."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


_SAID_ANYWAY = ("Does not validate against", "Subtypes:", "Errors:", "Given value type")
"""Lines of jsonargparse that the others make clear."""
LONGEST = 1500
"""Characters of a message; some hold the whole configuration."""


_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1e-9,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
}
"""Least values of the trainer's numbers that Lightning does not check."""


_NAMES = {
    "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
    "strategy": ["auto", *StrategyRegistry.available_strategies()],
    "profiler": ["simple", "advanced", "pytorch", "xla"],
}
"""Words that the trainer knows; it would refuse others only when the model is there."""


class _Parser(LightningArgumentParser):
    """Says what is wrong with a configuration without a page of usage before it."""

    def error(self, message: str, exception: Exception | None = None) -> NoReturn:
        raise VideoAlignError(condensed(message)) from exception


def condensed(message: str) -> str:
    """A parser's page of text as one sentence: the key, what it takes, and what it got."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    said = [line for line in dict.fromkeys(lines) if line and not line.startswith(_SAID_ANYWAY)]
    if lacking := re.search("arguments are required: (.*)", message):
        names = ", ".join(re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in lacking[1].split(", "))
        return f"{names} must be set: in a file behind --config, or as options"
    if unlike := re.search(r"^(.*?): Import path (\S+) does not implement protocol (\w+)", message, re.MULTILINE):
        where, name, protocol = unlike.groups()
        return f"{where.strip(' -')}: {name} has a method whose arguments or types are not those of {protocol}"
    text = re.sub(r'^Parser key "([^"]+)":;? ', r"\1: ", "; ".join(said))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


@contextlib.contextmanager
def explaining(args: list[str], keys: Group) -> Iterator[None]:
    """Say which key, in which file and line, makes the parser refuse a configuration.

    Args:
        args: Arguments behind the command's name.
        keys: Keys that the command takes.
    """
    try:
        yield
    except Exception as error:  # whatever a library raises for a value that it did not expect
        if message := explained(args, keys, str(error) if isinstance(error, VideoAlignError) else ""):
            raise VideoAlignError(message) from None
        raise
    if fault := next(unknown(read_settings(args, FLAGS), keys), None):
        raise VideoAlignError(str(fault))


def _load_checked(text: str) -> Any:
    """YAML as jsonargparse reads it, behind a look at its size: also of values and of files that values name."""
    if len(text) > 200 or any(mark in text for mark in "&*$\n"):
        check_yaml(text, "a value of the configuration")
    return _load(text)


_load = get_omegaconf_loader("omegaconf+")
jsonargparse.set_loader("omegaconf+", _load_checked, exceptions=(yaml.YAMLError,))


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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run shows is arranged in one place, whatever recipe it has."""
        parser.add_lightning_class_args(callbacks.Dashboard, "dashboard")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Numbers that no 64 bits hold fail anywhere, or count for ever."""
        try:
            with explaining(args[1:], self.keys_of(args[0])):
                super().parse_arguments(parser, args)
        except VideoAlignError as error:
            raise VideoAlignError(f"{error}{put_behind(args)}") from error
        check_exists(self.config[args[0]].get("ckpt_path"))
        if key := too_large(self.config.as_dict()):
            raise VideoAlignError(f"{key.partition('.')[2]}: this number does not fit into 64 bits; make it smaller")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """The end of a run shows what was measured; Lightning's table of it is left to those who ask for it."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if "verbose" in self._subcommand_method_arguments[subcommand]:
            parser.set_defaults({"verbose": False})
        return parser

    def keys_of(self, command: str) -> Group:
        """The keys that a command takes."""
        keys = group_of(self._subcommand_parsers[command], f"videoalign {command} --help-all")
        keys.kinds["trainer"].names = _NAMES
        return keys

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make a trainer that stops at the next step after a signal, with its own folder and whole checkpoints.

        Raises:
            VideoAlignError: For numbers that Lightning takes, and then divides by or never comes to.
        """
        settings = self._get(self.config_init, "trainer", default={})
        for name in ("max_epochs", "max_steps"):
            if settings.get(name) == 0 and self.subcommand == "fit":
                raise VideoAlignError(f"trainer.{name} is 0, so nothing would be trained; -1 sets no limit")
        for name, least in _LEAST.items():
            value = settings.get(name)
            if isinstance(value, int | float) and not value >= least:
                wanted = f"at least {least}" if isinstance(least, int) else "above 0"
                raise VideoAlignError(f"trainer.{name} must be {wanted}, got {value}")
        self.end = RunEnd()
        self.trainer_defaults["callbacks"] = [self.end, *self._shown()]
        trainer = supported(super().instantiate_trainer(**kwargs))
        return stoppable(own_folders(whole_checkpoints(trainer)))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "ckpt_path": resolved(kwargs.get("ckpt_path"), self.trainer, subcommand)}

    def _shown(self) -> list[L.Callback]:
        """Progress and the summary of the model, in place of Lightning's, unless YAML turns them off or has its own."""
        settings = self._get(self.config_init, "trainer", default={})
        own = settings.get("callbacks") or []
        wanted = {"enable_progress_bar": (ProgressBar, Progress), "enable_model_summary": (ModelSummary, PartsSummary)}
        return [
            kind()
            for option, (base, kind) in wanted.items()
            if settings.get(option) is not False and not any(isinstance(one, base) for one in own)
        ]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, and print what there is to know at the end, also of a run that is stopped."""
        done = False
        try:
            super()._run_subcommand(subcommand)
            done = True
        finally:
            stopped = isinstance(sys.exc_info()[1], stopping.Stopped)
            if self.trainer.is_global_zero and self.end.began is not None and (done or stopped):
                with contextlib.suppress(OSError) if stopped else contextlib.nullcontext():
                    print(self.end.block(self.trainer, done), flush=True)

    def _parse_ckpt_path(self) -> None:
        """What YAML and command line say holds; Lightning would let a checkpoint's values override them silently."""


def call(function: Callable[..., Any], args: list[str], replaced: Mapping[str, str] | None = None) -> None:
    """Call a function with arguments from YAML files and the command line, as `fit` takes its.

    Args:
        function: Function whose docstring and annotations describe the arguments.
        args: Arguments as on the command line.
        replaced: Keys of earlier releases that are refused, and what replaced them.
    """
    quiet()
    args = configured(args)
    parser = _Parser(parser_mode="omegaconf+", allow_abbrev=False, description=function.__doc__.splitlines()[0])
    parser.add_argument(
        "-c", "--config", action=jsonargparse.ActionConfigFile, help="YAML file; may be given repeatedly"
    )
    parser.add_function_arguments(function)
    for key, text in (replaced or {}).items():
        refuse = partial(_refuse, key, text)
        parser.add_argument(f"--{key}", type=refuse, default=SUPPRESS, help=SUPPRESS)
    with explaining(args, group_of(parser, f"videoalign {function.__name__} --help")):
        parsed = parser.parse_args(args)
    settings = parser.instantiate_classes(parsed)
    settings.pop("config")
    function(**settings.as_dict())


def _refuse(key: str, text: str, value: str) -> NoReturn:
    """The type of a key that was replaced: no value is right."""
    raise VideoAlignError(f"{key}: {text}")


def run(args: list[str], kind: type[ExperimentCLI] = ExperimentCLI) -> LightningCLI:
    """Run one subcommand.

    Args:
        args: Arguments as on the command line.
        kind: Class of the CLI; another one may stop behind the parsing.

    Returns:
        The CLI object, with ``trainer``, ``model`` and ``datamodule``.
    """
    quiet()
    args = configured(args)
    every = kind.subcommands()  # the parser of one command takes a second, those of all of them four
    kind = type(kind.__name__, (kind,), {"subcommands": staticmethod(lambda: {args[0]: every[args[0]]})})
    with explained_loggers():
        return kind(
            L.LightningModule,
            L.LightningDataModule,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
        )
