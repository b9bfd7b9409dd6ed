"""Using models: `videoalign score`, `generate`, `convert` and `export`."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import yaml

from .. import VideoAlignError
from ..alignment.generate import Generate
from ..alignment.reward_model import RewardModel
from ..callbacks.checkpoint_io import read_checkpoint
from ..callbacks.progress import PredictProgress
from ..callbacks.stoppable import stoppable
from ..callbacks.write_parts import WriteParts
from ..datamodules.prompts import Prompts
from ..datamodules.stream import in_turn
from ..datamodules.tables import sound_rows
from ..datamodules.video_list import Listed, VideoList
from ..models.files import check_free, claims_out
from ..models.finite import require_finite
from ..models.locks import held
from ..models.official import load_reward
from ..models.preference import DIMENSIONS, OVERALL
from ..models.template import Template
from ..models.video_reward import VideoReward
from .lightning_cli import quiet


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a reward model comes from; see :func:`~videoalign.models.load_reward`."""

    model: str
    """Folder of this package, or an official one."""
    backbone: str | None = None
    """Where the backbone is, if not where the folder says."""
    template: str | None = None
    """File with the official text, for official folders."""
    official_repo: str | None = None
    """Or a clone of the official repository that holds it."""
    checkpoint_step: int | None = None
    """Which of an official folder's checkpoints; the latest if not given."""
    dtype: str | None = None
    """Of the backbone's weights, if not the folder's."""

    def load(self) -> VideoReward:
        """The network."""
        if not Path(self.model).is_dir():
            raise VideoAlignError(f"{self.model}: there is no such folder of a reward model")
        if self.template and self.official_repo:
            raise VideoAlignError("--template and --official-repo both name the template; give one of them")
        template = Template.from_repository(self.official_repo) if self.official_repo else None
        template = Template.load(self.template) if self.template else template
        changes = {"dtype": self.dtype} if self.dtype else {}
        return load_reward(self.model, self.backbone, template, self.checkpoint_step, **changes)


def predicting(device: str, callbacks: list[L.Callback], bar: bool, devices: int = 1) -> L.Trainer:
    """A trainer that predicts, and prints nothing of its own but a bar.

    Args:
        device: ``auto``, ``cpu`` or ``gpu``. devices: processes that share the work.
    """
    quiet()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what is printed are the results
    return stoppable(
        L.Trainer(
            accelerator=device,
            devices=devices,
            strategy="auto" if devices == 1 else "ddp",
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=callbacks,
            enable_progress_bar=bar,
        )
    )


def read_list(path: str) -> list[tuple[str, str]]:
    """(path, prompt) rows of a CSV with these two columns; paths are relative to the CSV's folder."""
    rows = sound_rows(path, ("path", "prompt"), f"--csv {path}")
    if short := [line for line, row in rows if not row["path"].strip() or not row["prompt"].strip()]:
        raise VideoAlignError(f"--csv {path}: lines {short[:5]} lack a path or a prompt")
    return [(str(Path(path).parent / row["path"]), row["prompt"]) for _, row in rows]


class _PrintRewards(L.Callback):
    """Prints a JSON line per video as soon as its batch is done, in the order of the list."""

    def __init__(self, videos: Sequence[tuple[str, str]], raw: bool) -> None:
        self.videos, self.raw, self.failed = videos, raw, 0

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if outputs is not None:
            require_finite(
                "the rewards",
                {self.videos[n][0]: row for n, row in zip(batch["numbers"], outputs)},
                "the model is broken",
            )
            rewards = outputs if self.raw else pl_module.network.normalise(outputs)
            for number, row in zip(batch["numbers"], rewards.tolist()):
                video, prompt = self.videos[number]
                line = {"video": video, "prompt": prompt, **dict(zip(DIMENSIONS, row)), OVERALL: sum(row)}
                print(json.dumps(line, ensure_ascii=False), flush=True)
        for _, reason in batch["dropped"]:
            print(f"videoalign: error: {reason}", file=sys.stderr)
        self.failed += len(batch["dropped"])


def score(
    source: Source,
    videos: Sequence[str],
    prompts: Sequence[str],
    list_file: str | None,
    raw: bool,
    batch_size: int,
    workers: int,
    device: str,
) -> int:
    """Print a JSON line per video: video, prompt, VQ, MQ, TA, Overall (their sum).

    Args:
        source: Where the model comes from.
        videos: Paths of videos.
        prompts: As many prompts.
        list_file: CSV with the columns path and prompt, in their place.
        raw: Leave out normalisation.
        batch_size: Videos at once.
        workers: Processes that decode.
        device: ``auto``, ``cpu`` or ``gpu``.

    Returns:
        Exit status: 1 where a video could not be read; the others are printed all the same.
    """
    if len(videos) != len(prompts):
        raise VideoAlignError(
            f"there are {len(videos)} --video and {len(prompts)} --prompt; give one prompt for each video"
        )
    items = [*zip(videos, prompts), *(read_list(list_file) if list_file else [])]
    if not items:
        raise VideoAlignError("nothing to score: give --video and --prompt, or --csv")
    if missing := [path for path, _ in items if not Path(path).is_file()]:
        raise VideoAlignError(f"{len(missing)} videos are not there: {', '.join(missing[:5])}")
    if empty := [path for path, prompt in items if not prompt.strip()]:
        raise VideoAlignError(f"{len(empty)} videos have no prompt: {', '.join(empty[:5])}")
    printer = _PrintRewards(items, raw)
    trainer = predicting(device, [printer], len(items) > batch_size and sys.stderr.isatty())
    videos = VideoList([Listed(path, prompt, path) for path, prompt in items], in_turn(len(items), batch_size), workers)
    network = source.load()
    if not (raw or network.has_statistics):
        print(
            f"videoalign: note: {source.model} has no statistics of its rewards, so these are raw and their sum weighs the dimensions as "
            "they come; train or validate it with held-out pairs (data.val) to normalise them",
            file=sys.stderr,
        )
    trainer.predict(RewardModel(network), videos, return_predictions=False)
    return int(printer.failed > 0)


def generate(model: dict[str, Any], data: dict[str, Any], device: str, devices: int) -> None:
    """Sample videos: a predict run of :class:`.generate.Generate` over :class:`~videoalign.datamodules.prompts.Prompts`.

    Args:
        model, data: their arguments. devices: processes that share the work.
    """
    with held(data["out"]):
        check_free(data["out"])
        prompts = Prompts(**data)
        trainer = predicting(device, [PredictProgress(), WriteParts()], sys.stderr.isatty(), devices)
        trainer.predict(Generate(**model), prompts, return_predictions=False)


@claims_out
def convert(source: Source, out: str, with_backbone: bool) -> None:
    """Write a reward model, official or not, as a folder of this package; its rewards stay the same.

    Args:
        source: of the model. out: folder to make. with_backbone: copy the backbone along.
    """
    network = source.load()
    network.save_pretrained(out, backbone=with_backbone)
    if network.owns_backbone and not with_backbone:
        print(
            f"note: frozen tensors of {source.model} differ from those of {network.backbone_name}, so {out}/backbone holds "
            "the backbone that it stands on",
            file=sys.stderr,
        )


@claims_out
def export(checkpoint: str, out: str, with_backbone: bool, backbone: str | None = None) -> None:
    """Write the folder of a Lightning checkpoint's reward model.

    Args:
        checkpoint: ``.ckpt`` file of a run whose folder holds ``config.yaml``. out: folder to make.
        with_backbone: copy the backbone along. backbone: where it is, if not where it was.
    """
    path = Path(checkpoint)
    config = next((p / "config.yaml" for p in path.resolve().parents if (p / "config.yaml").exists()), None)
    if not path.is_file() or config is None:
        raise VideoAlignError(
            f"--checkpoint {checkpoint}: there is no such file with a config.yaml in a folder above it"
        )
    settings = yaml.safe_load(config.read_text())
    network = _network(settings, config, backbone)
    saved = read_checkpoint(path)
    if "reward_statistics" not in saved:
        raise VideoAlignError(f"--checkpoint {checkpoint} is not of a run that trained a reward model")
    model = RewardModel(network)
    model.on_load_checkpoint(saved)
    model.load_state_dict(saved["state_dict"], strict=False)
    if model._measured_at != saved["global_step"]:
        print(
            f"note: the statistics for normalisation are those of step {model._measured_at}, the weights those of step "
            f"{saved['global_step']}: the checkpoint was written before that step's validation",
            file=sys.stderr,
        )
    model.network.save_pretrained(out, backbone=with_backbone)


def _network(settings: Any, config: Path, backbone: str | None) -> VideoReward:
    """The network of a run's configuration."""
    try:
        network = settings["model"]["init_args"]["network"]
    except (TypeError, KeyError):
        raise VideoAlignError(f"{config} is not the configuration of a run that trained a reward model") from None
    if backbone:
        network["init_args"]["backbone"] = backbone
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(VideoReward, "network")
    return parser.instantiate_classes(parser.parse_object({"network": network})).network
