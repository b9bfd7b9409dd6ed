"""Rewards of video files, printed as JSON lines: what `videoalign score` does."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from .. import VideoAlignError
from ..alignment.reward_model import RewardModel
from ..datamodules.tables import sound_rows
from ..datamodules.video_list import Listed
from ..models.dimensions import DIMENSIONS, OVERALL
from ..models.finite import require_finite
from .predicting import alone
from .reward_judge import RewardJudge


def read_list(path: str) -> list[Listed]:
    """Videos of a CSV with the columns path and prompt, and perhaps image; paths are relative to the CSV's folder."""
    rows = sound_rows(path, ("path", "prompt"), f"--csv {path}", optional=("image",))
    if short := [line for line, row in rows if not row["path"].strip() or not row["prompt"].strip()]:
        raise VideoAlignError(f"--csv {path}: lines {short[:5]} lack a path or a prompt")
    place = Path(path).parent
    images = [str(place / image) if (image := row.get("image", "").strip()) else "" for _, row in rows]
    return [_listed(str(place / row["path"].strip()), row["prompt"], image) for (_, row), image in zip(rows, images)]


def _listed(path: str, prompt: str, image: str = "") -> Listed:
    return Listed(path, prompt, path, picture=image)


class _PrintRewards(L.Callback):
    """Prints a JSON line per video as soon as its batch is done, in the order of the list."""

    def __init__(self, videos: Sequence[Listed], raw: bool) -> None:
        self.videos, self.raw, self.failed = videos, raw, 0

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: RewardModel,
        outputs: Tensor | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is not None:
            named = {self.videos[n].path: row for n, row in zip(batch["numbers"], outputs)}
            require_finite("the rewards", named, "the model is broken")
            rewards = outputs if self.raw else pl_module.network.normalise(outputs)
            for number, row in zip(batch["numbers"], rewards.tolist()):
                video = self.videos[number]
                line = {"video": video.path, "prompt": video.prompt, **dict(zip(DIMENSIONS, row)), OVERALL: sum(row)}
                print(json.dumps(line, ensure_ascii=False), flush=True)
        for _, reason in batch["dropped"]:
            print(f"videoalign: error: {reason}", file=sys.stderr)
        self.failed += len(batch["dropped"])


def score(
    judge: RewardJudge,
    videos: Sequence[str],
    prompts: Sequence[str],
    list_file: str | None,
    raw: bool,
    images: Sequence[str] = (),
) -> int:
    """Print a JSON line per video: video, prompt, VQ, MQ, TA, Overall (their sum).

    Args:
        judge: The reward model that scores.
        videos: Paths of videos.
        prompts: Prompts of the videos, one for each.
        list_file: CSV with the columns path and prompt (and image), of further videos.
        raw: Leave out normalisation.
        images: Paths of the images that the videos begin with, one for each; empty for none.

    Returns:
        Exit status: 1 where a video could not be read; the others are printed all the same.
    """
    alone("score")
    if len(videos) != len(prompts):
        raise VideoAlignError(
            f"there are {len(videos)} --video and {len(prompts)} --prompt; give one prompt for each video"
        )
    if images and len(images) != len(videos):
        raise VideoAlignError(f"there are {len(videos)} --video and {len(images)} --image; give one for each video")
    given = map(_listed, videos, prompts, images or [""] * len(videos))
    items = [*given, *(read_list(list_file) if list_file else [])]
    if not items:
        raise VideoAlignError("nothing to score: give --video and --prompt, or --csv")
    for what, paths in (("videos", [item.path for item in items]), ("images", [item.picture for item in items])):
        if missing := [path for path in paths if path and not Path(path).is_file()]:
            raise VideoAlignError(f"{len(missing)} {what} are not there: {', '.join(missing[:5])}")
    if empty := [item.path for item in items if not item.prompt.strip()]:
        raise VideoAlignError(f"{len(empty)} videos have no prompt: {', '.join(empty[:5])}")
    if not (raw or judge.network.has_statistics):
        print(
            f"videoalign: note: {judge.model} has no statistics of its rewards, so these are raw and their sum weighs "
            "the dimensions as they come; train or validate it with held-out pairs (data.val) to normalise them",
            file=sys.stderr,
        )
    printer = _PrintRewards(items, raw)
    judge.score_files(items, printer)
    return int(printer.failed > 0)
