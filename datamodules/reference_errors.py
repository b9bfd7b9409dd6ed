"""Cached errors of the reference: computed once at fixed draws of noise and time, so that training needs no second forward.

A folder: ``reference.json`` (keys, draws, law of the times, what it was computed with) and ``reference.safetensors``
(errors (K, M, S) of M samples in the order on disk, seeds (K, M)). Epoch e of a training uses draw e modulo K.
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
from .latent_files import OF, load_latents
from .shards import ShardSet, sha256
from .stream import at_least, dealt, in_turn, own_share

RECORD, TENSORS = "reference.json", "reference.safetensors"


class ReferenceErrors:
    """The cache, opened for a training; ``(key, epoch)`` gives the seed and the (S,) errors in the order on disk.

    Args:
        path: the folder. data: sha256 of the latents' index. made: what the training would compute the errors with.
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
                f"{path}: reference errors were computed with other {', '.join(different)} than this training has; compute them anew"
            )
        self.place = {key: i for i, key in enumerate(keys)}

    def __call__(self, key: str, epoch: int) -> tuple[int, Tensor]:
        """Seed of noise and time, and errors (S,)."""
        k, i = epoch % len(self.errors), self.place[key]
        return int(self.seeds[k, i]), self.errors[k, i]


class ReferenceDraws(L.LightningDataModule):
    """Every sample of a latents set at every draw.

    Args:
        data: folder of the set. out: folder to make. draws: K; a training of more epochs begins again with the first.
        batch_size: samples per step. workers: processes per rank. seed: of noise and times.
    """

    def __init__(
        self, data: str, out: str, draws: int = 1, batch_size: int = 8, workers: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        at_least(1, draws=draws, batch_size=batch_size)
        at_least(0, workers=workers)
        self._hold = Hold()
        self.data, self.out, self.draws, self.batch_size, self.workers, self.seed = (
            data,
            Path(out),
            draws,
            batch_size,
            workers,
            seed,
        )

    def setup(self, stage: str) -> None:
        """Open the set, see that it is this generator's, and that nothing is in the way of the result."""
        self._hold.take(self.out)
        check_free(self.out, RECORD)
        shards = ShardSet(self.data, "latents")
        identity, made = self.trainer.lightning_module.generator.identity(), shards.index.latents or {}
        if any(made.get(k) != v for k, v in identity.items()):
            raise VideoAlignError(f"{self.data} holds latents of another generator")
        self.sides, self.contents = OF[made["of"]], list(shards.contents())
        self.made = {"data": sha256(shards.path / "index.json")}
        self.items = [(number, k) for k in range(self.draws) for number in range(len(self.contents))]

    def seed_of(self, number: int, k: int) -> int:
        """Of a sample's draw."""
        return draw_seed(self.seed, k, self.contents[number].key)

    def predict_dataloader(self) -> DataLoader:
        """This rank's batches."""
        share = own_share(in_turn(len(self.items), self.batch_size), self.trainer)
        share = [[self.items[number] for number in batch] for batch in share]
        return dealt(_Draws(self, share), self.workers)

    def save(self, errors: dict[tuple[int, int], list[float]], made: dict[str, Any]) -> None:
        """Write the folder; ``errors`` by (sample, draw)."""
        table = torch.tensor(
            [[errors[n, k] for n in range(len(self.contents))] for k in range(self.draws)]
        )  # (K, M, S)
        seeds = torch.tensor([[self.seed_of(n, k) for n in range(len(self.contents))] for k in range(self.draws)])
        with new_folder(self.out, replaces=RECORD) as out:
            safetensors.torch.save_file({"errors": table, "seeds": seeds}, out / TENSORS)
            write_json(
                out / RECORD,
                {"keys": [c.key for c in self.contents], "draws": self.draws, "made": {**self.made, **made}},
            )
        self._hold.drop()


class _Draws:
    """Map-style view of batches of (sample, draw)."""

    def __init__(self, data: ReferenceDraws, batches: list[list[tuple[int, int]]]) -> None:
        self.contents, self.sides, self.batches = data.contents, data.sides, batches
        self.seeds = [[data.seed_of(*item) for item in batch] for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.batches[index]:
            return {"items": []}
        contents = [self.contents[number] for number, _ in self.batches[index]]
        samples = [load_latents(content.read("safetensors"), content.name) for content in contents]
        return {
            "items": self.batches[index],
            "latents": torch.stack(
                [torch.stack([s[side] for side in self.sides]) for s in samples], 1
            ).float(),  # (S, N, ...)
            "prompts": [sample["prompt"] for sample in samples],
            "seeds": torch.tensor(self.seeds[index]),
        }
