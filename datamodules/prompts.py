"""Prompts to generate videos from: a CSV with a column ``prompt``, or a text file with one a line."""

from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from .. import VideoAlignError
from ..models.flow import draw_seed
from .parts import Parts
from .shards import Index
from .stream import at_least, dealt, in_turn, own_share
from .tables import read_text, sound_rows


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file, in order; each once."""
    name = f"prompts {path}"
    if Path(path).suffix.lower() == ".csv":
        lines = [row["prompt"] for _, row in sound_rows(path, ("prompt",), name, fill=True)]
    else:
        # Not splitlines: a prompt may hold one of Unicode's further separators of lines.
        lines = read_text(path, name).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise VideoAlignError(f"{name}: it holds no prompt")
    return prompts


class Prompts(L.LightningDataModule):
    """Prompts, each a number of times with seeds of its own, to be written as a *videos* set.

    Args:
        prompts: CSV with a column ``prompt``, or text file with one a line.
        out: Folder to make; an interrupted run goes on there.
        samples: Videos per prompt.
        batch_size: Videos per step.
        seed: Seed of all noise.
    """

    def __init__(self, prompts: str, out: str, samples: int = 1, batch_size: int = 1, seed: int = 0) -> None:
        super().__init__()
        at_least(1, samples=samples, batch_size=batch_size)
        self.prompts, self.out, self.samples, self.batch_size, self.seed = (
            read_prompts(prompts),
            Path(out),
            samples,
            batch_size,
            seed,
        )
        self.allowed_drops = 0

    def setup(self, stage: str) -> None:
        """Look at what is made already."""
        made = {
            "prompts": self.prompts,
            "samples": self.samples,
            "seed": self.seed,
            **self.trainer.lightning_module.making(),
        }
        self.parts = Parts(self.out, Index("videos"), made, len(self.prompts) * self.samples)

    def predict_dataloader(self) -> DataLoader:
        """This rank's batches of what is not made yet; a video's noise depends on (seed, prompt, number) alone."""
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
