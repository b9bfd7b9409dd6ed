"""Single videos with prompts, from files: what `videoalign score` reads."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from .. import VideoAlignError
from ..models.processor import RewardProcessor
from .stream import Dropped
from .video import decode


def _load(processor: RewardProcessor, item: tuple[int, str, str]) -> tuple[int, Any, str]:
    """Number, frames (or why there are none) and prompt."""
    number, path, prompt = item
    try:
        processor.prompt_ids(prompt)
        return number, decode(Path(path), processor.sampling, processor.factor, path), prompt
    except VideoAlignError as error:
        return number, Dropped(path, str(error)), prompt


class _Decoded:
    """Map-style view of a list, decoded in the worker that asks."""

    def __init__(self, items: Sequence[tuple[int, str, str]], load: Any) -> None:
        self.items, self.load = items, load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, Any, str]:
        return self.load(self.items[index])


def _collate(processor: RewardProcessor, items: Sequence[tuple[int, Any, str]]) -> dict[str, Any]:
    sound = [item for item in items if not isinstance(item[1], Dropped)]
    batch: dict[str, Any] = {
        "numbers": [number for number, _, _ in sound],
        "dropped": [(number, value.reason) for number, value, _ in items if isinstance(value, Dropped)],
    }
    if sound:
        batch["inputs"] = processor([video for _, video, _ in sound], [prompt for _, _, prompt in sound])
    return batch


class VideoList(L.LightningDataModule):
    """Videos to predict rewards for, in the given order.

    Args:
        videos: paths and prompts. batch_size: videos per step. workers: processes that decode.
    """

    def __init__(self, videos: Sequence[tuple[str, str]], batch_size: int = 8, workers: int = 2) -> None:
        super().__init__()
        self.videos, self.batch_size, self.workers = list(videos), batch_size, workers

    def predict_dataloader(self) -> DataLoader:
        """Batches with ``numbers`` of the videos in the list, and those that could not be read under ``dropped``."""
        processor = self.trainer.lightning_module.processor
        items = [(number, path, prompt) for number, (path, prompt) in enumerate(self.videos)]
        workers = min(self.workers, len(items) // self.batch_size)
        data = _Decoded(items, partial(_load, processor))
        return DataLoader(
            data, batch_size=self.batch_size, num_workers=workers, collate_fn=partial(_collate, processor)
        )
