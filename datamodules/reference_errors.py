"""Cached errors of the reference, computed once at fixed draws of noise and time; training then needs one forward less.

The cache is a folder of ``reference.json`` (keys, number of draws, settings) and ``reference.safetensors`` (errors
(K, M, S) of M samples in the order on disk, seeds (K, M)). Epoch e of a training uses draw e modulo K.
"""

from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader

from .. import VideoAlignError
from ..models.files import check_free, check_readable, new_folder, read_json, write_json
from ..models.flow import draw_seed
from ..models.locks import Hold
from ..models.number_checks import at_least
from .contracts import HasGenerator, require
from .latent_files import OF, check_images, conditions_of, load_latents
from .shards import ShardSet
from .stores import together
from .stream import dealt, in_turn, own_share

RECORD, TENSORS = "reference.json", "reference.safetensors"


class ReferenceErrors:
    """The cache of one training set; a call with key and epoch gives the seed and the errors.

    Args:
        path: Folder of the cache.
        data: Checksum (sha256) of the index of the latents.
        made: Settings with which the training itself would compute the errors.

    Raises:
        VideoAlignError: If the folder holds no cache, or one of other latents or settings.
    """

    def __init__(self, path: str | Path, data: str, made: dict[str, Any]) -> None:
        record = read_json(Path(path) / RECORD, "a folder of reference errors")
        want = {"data": data, **made}
        check_readable(Path(path) / TENSORS)
        try:
            tensors = safetensors.torch.load_file(Path(path) / TENSORS)
            self.errors, self.seeds, keys, have = tensors["errors"], tensors["seeds"], record["keys"], record["made"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise VideoAlignError(f"{path} holds no reference errors ({error})") from None
        if different := sorted(k for k in want if have.get(k) != want[k]):
            raise VideoAlignError(
                f"{path}: reference errors were computed with other {', '.join(different)} than this training has; "
                "compute them anew"
            )
        self.place = {key: i for i, key in enumerate(keys)}

    def __call__(self, key: str, epoch: int) -> tuple[int, Tensor]:
        """Seed of noise and time, and errors (S,) of the sides in the order on disk."""
        k, i = epoch % len(self.errors), self.place[key]
        return int(self.seeds[k, i]), self.errors[k, i]


class ReferenceDraws(L.LightningDataModule):
    """Every sample of a *latents* set at every draw of noise and time.

    Args:
        data: Folder of the set.
        out: Folder to write.
        draws: Number of draws per sample; a training of more epochs begins again with the first.
        batch_size: Samples per rank and step.
        workers: Processes per rank that read.
        seed: Seed of noise and times.
    """

    def __init__(
        self, data: str, out: str, draws: int = 1, batch_size: int = 8, workers: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        at_least(1, "data.", draws=draws, batch_size=batch_size)
        at_least(0, "data.", workers=workers)
        self._hold = Hold()
        self.data, self.out, self.draws = data, Path(out), draws
        self.batch_size, self.workers, self.seed = batch_size, workers, seed

    def setup(self, stage: str) -> None:
        """Open the set, and refuse latents of another generator or an output that is in the way."""
        generator = require(self.trainer.lightning_module, HasGenerator, type(self).__name__).generator
        self._hold.take(self.out)
        check_free(self.out, RECORD)
        shards = ShardSet(self.data, "latents")
        identity, stored = generator.identity(), shards.index.latents or {}
        if any(stored.get(k) != v for k, v in identity.items()):
            raise VideoAlignError(f"{self.data} holds latents of another generator")
        check_images(stored, generator.image, self.data)
        self.sides, self.contents = OF[stored["of"]], list(shards.contents())
        self.made = {"data": shards.digest}
        self.items = [(number, k) for k in range(self.draws) for number in range(len(self.contents))]

    def seed_of(self, number: int, k: int) -> int:
        """Seed of noise and time.

        Args:
            number: Number of the sample in the set.
            k: Number of the draw.
        """
        return draw_seed(self.seed, k, self.contents[number].key)

    def predict_dataloader(self) -> DataLoader:
        """This rank's batches of (sample, draw)."""
        share = own_share(in_turn(len(self.items), self.batch_size), self.trainer)
        share = [[self.items[number] for number in batch] for batch in share]
        return dealt(_Draws(self, share), self.workers)

    def save(self, errors: dict[tuple[int, int], list[float]], made: dict[str, Any]) -> None:
        """Write the cache.

        Args:
            errors: Errors (S,) by (sample, draw).
            made: Settings that they depend on besides the latents.
        """
        numbers, draws = range(len(self.contents)), range(self.draws)
        table = torch.tensor([[errors[n, k] for n in numbers] for k in draws])  # (K, M, S)
        seeds = torch.tensor([[self.seed_of(n, k) for n in numbers] for k in draws])
        record = {"keys": [c.key for c in self.contents], "draws": self.draws, "made": {**self.made, **made}}
        with new_folder(self.out, replaces=RECORD) as out:
            safetensors.torch.save_file({"errors": table, "seeds": seeds}, out / TENSORS)
            write_json(out / RECORD, record)
        self._hold.drop()


class _Draws:
    """Map-style dataset of batches of (sample, draw).

    Args:
        data: DataModule that the samples belong to.
        batches: Numbers of sample and draw of each batch.
    """

    def __init__(self, data: ReferenceDraws, batches: list[list[tuple[int, int]]]) -> None:
        self.contents, self.sides, self.batches = data.contents, data.sides, batches
        self.seeds = [[data.seed_of(*item) for item in batch] for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.batches[index]:
            return {"items": []}
        contents = [self.contents[number] for number, _ in self.batches[index]]
        media = together(lambda content: content.read("safetensors"), contents)
        samples = [load_latents(one, content.name) for one, content in zip(media, contents)]
        latents = [torch.stack([sample[side] for side in self.sides]) for sample in samples]
        return {
            "items": self.batches[index],
            "latents": torch.stack(latents, 1).float(),  # (S, N, C, F, H, W)
            "conditions": [conditions_of(sample) for sample in samples],
            "seeds": torch.tensor(self.seeds[index]),
        }
