"""Prompts to generate videos from: a CSV with a column ``prompt``, or a text file with one prompt a line."""

from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from .. import VideoAlignError
from ..models.flow import draw_seed
from .contracts import DescribesSamples, require
from .parts import Parts
from .shards import Index
from .stream import at_least, dealt, in_turn, own_share
from .tables import read_text, sound_rows


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a CSV or text file, in order and without repetitions."""
    name = f"prompts {path}"
    if Path(path).suffix.lower() == ".csv":
        lines = [row["prompt"] for _, row in sound_rows(path, ("prompt",), name, fill=True)]
    else:
        # splitlines would also split at Unicode's further line separators, which a prompt may hold
        lines = read_text(path, name).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise VideoAlignError(f"{name}: it holds no prompt")
    return prompts


class Prompts(L.LightningDataModule):
    """Prompts to sample videos from, which are written as a *videos* set; each sample has a seed of its own.

    Args:
        prompts: CSV with a column ``prompt``, or text file with one prompt a line.
        out: Folder to write; an interrupted run goes on there.
        samples: Number of videos per prompt.
        batch_size: Videos per rank and step.
        seed: Seed of all noise.
    """

    def __init__(self, prompts: str, out: str, samples: int = 1, batch_size: int = 1, seed: int = 0) -> None:
        super().__init__()
        at_least(1, samples=samples, batch_size=batch_size)
        self.prompts, self.out = read_prompts(prompts), Path(out)
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.allowed_drops = 0

    def setup(self, stage: str) -> None:
        """Open the set, and the videos that an interrupted run has written."""
        described = require(self.trainer.lightning_module, DescribesSamples, type(self).__name__).making()
        making = {"prompts": self.prompts, "samples": self.samples, "seed": self.seed, **described}
        self.parts = Parts(self.out, Index("videos"), making, len(self.prompts) * self.samples)

    def all_prompts(self) -> list[str]:
        """Texts of the prompts."""
        return self.prompts

    def predict_dataloader(self) -> DataLoader:
        """This rank's batches of the videos that are not written yet.

        The noise of a video depends on (seed, prompt, number) alone.
        """
        items = [
            {"key": f"{i:05d}-{n:03d}", "prompt": prompt, "seed": draw_seed(self.seed, prompt, n)}
            for i, prompt in enumerate(self.prompts)
            for n in range(self.samples)
        ]
        written = self.parts.done()
        done = {number for number, item in enumerate(items) if item["key"] in written}
        share = own_share(in_turn(len(items), self.batch_size), self.trainer, done)
        return dealt([_columns([items[number] for number in batch]) for batch in share], 0)


def _columns(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {name + "s": [item[name] for item in items] for name in ("key", "prompt", "seed")} | {"dropped": []}
