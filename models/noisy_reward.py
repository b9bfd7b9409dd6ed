r"""Reward on noisy latents, :math:`r(x_t, y, t)`: what steers sampling in Flow-NRG (VideoAlign, section 4.4).

The paper reuses "a few early layers" of the generator and discloses no more. Here: the first ``blocks`` of the
generator's own transformer, called as the generator calls it (so time and prompt enter as they did in its training);
the tokens behind some of them are pooled, and a small head that knows the time gives VQ, MQ and TA.

Legend: B samples, L tokens, E width of the transformer, D dimensions, K learned queries.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import VideoAlignError
from .checksums import check, checksums, digest
from .dimensions import DIMENSIONS
from .files import check_readable, new_folder, read_json, write_json
from .fingerprint import fingerprint
from .finite import NOT_WRITTEN, require_finite
from .generator import Condition, Generator
from .lora import LoRA, add_lora, merge_lora
from .reward_statistics import Statistics

RECORD, FORMAT, VERSION = "noisy_reward.json", "videoalign-noisy-reward", 1


@dataclass(frozen=True, kw_only=True)
class NoisyRewardShape:
    """Its architecture, which the paper leaves open."""

    blocks: int = 8
    """First blocks of the transformer that are copied."""
    taps: tuple[int, ...] = ()
    """Blocks behind which tokens are read, counted from 1; the last copied one if empty."""
    pooling: Literal["mean", "attention"] = "mean"
    """Mean over all tokens, or learned queries that attend to them."""
    queries: int = 4
    """Of attention pooling."""
    hidden: int = 256
    """Width of the head."""

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.queries < 1 or self.hidden < 1:
            raise VideoAlignError(f"shape: blocks, queries and hidden must be at least 1, got {self}")
        if wrong := [tap for tap in self.taps if not 1 <= tap <= self.blocks]:
            raise VideoAlignError(f"shape.taps {wrong} are not among the {self.blocks} copied blocks, counted from 1")
        if self.pooling not in ("mean", "attention"):
            raise VideoAlignError(f"shape.pooling {self.pooling!r} is unknown; choose mean or attention")


class Pool(nn.Module):
    """Tokens (B, L, E) -> (B, hidden)."""

    def __init__(self, width: int, shape: NoisyRewardShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = None
        if shape.pooling == "attention":
            self.queries = nn.Parameter(torch.randn(shape.queries, width) * width**-0.5)
            self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width * (shape.queries if shape.pooling == "attention" else 1), shape.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = self.norm(tokens.float())
        if self.queries is None:
            return self.out(x.mean(1))
        weights = torch.softmax(self.queries @ self.key(x).transpose(1, 2) * x.shape[-1] ** -0.5, -1)  # (B, K, L)
        return self.out((weights @ self.value(x)).flatten(1))


class NoisyReward(nn.Module):
    """Rewards (B, D) of noisy latents.

    Args:
        generator: whose first blocks are copied; it is left as it is. shape: see :class:`NoisyRewardShape`.
    """

    record = RECORD

    def __init__(self, generator: Generator, shape: NoisyRewardShape | None = None) -> None:
        super().__init__()
        self.shape = shape or NoisyRewardShape()
        blocks = getattr(generator.transformer, generator.blocks)
        if self.shape.blocks > len(blocks):
            raise VideoAlignError(f"shape.blocks is {self.shape.blocks}, but the generator has {len(blocks)} blocks")
        object.__setattr__(self, "generator", generator)  # how the family calls a transformer; no parameter of ours
        # rounded, so that a generator is itself in any precision
        weights = {name: p.detach().to(torch.bfloat16) for name, p in base_parameters(generator.transformer).items()}
        self.identity = {**generator.identity(), "transformer": fingerprint(weights)}
        self.statistics = Statistics()
        taps = self.shape.taps or (self.shape.blocks,)
        self.trunk = truncated(generator, max(taps)).requires_grad_(True)
        for behind in (self.trunk.norm_out, self.trunk.proj_out):  # they make the velocity, which nobody reads
            behind.requires_grad_(False)
        self.trunk.scale_shift_table.requires_grad_(False)
        width = generator.transformer.config.num_attention_heads * generator.transformer.config.attention_head_dim
        self.pools = nn.ModuleList(Pool(width, self.shape) for _ in taps)
        hidden = self.shape.hidden
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.head = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, len(DIMENSIONS), bias=False)
        )
        self.lora: LoRA | None = None
        self._read: list[Tensor] | None = None  # tokens, while a forward pass goes on
        for tap in taps:
            getattr(self.trunk, generator.blocks)[tap - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, args: tuple, out: Tensor) -> None:
        if self._read is not None:  # not when checkpointed activations are computed again
            self._read.append(out)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw rewards (B, D), fp32, of latents x (B, C, F, H, W) at times t (B,)."""
        self._read = []
        try:
            self.generator.velocity(x, t, condition, self.trunk)  # the velocity of so few blocks is of no use
            tokens = self._read
        finally:
            self._read = None
        with torch.autocast(x.device.type, enabled=False):  # bf16 rewards would make ties that nobody predicted
            pooled = torch.stack([pool(one.float()) for pool, one in zip(self.pools, tokens)]).mean(0)  # (B, hidden)
            scale, shift = self.time(time_features(t)).chunk(2, -1)
            return self.head(pooled * (1 + scale) + shift)

    def normalise(self, rewards: Tensor) -> Tensor:
        """Raw rewards (..., D) as z-scores of held-out latents, noised to the times that they are validated at."""
        mean, std = torch.tensor(
            [self.statistics.mean, self.statistics.std], device=rewards.device, dtype=rewards.dtype
        )
        return (rewards - mean) / std

    def adapt(self, lora: LoRA) -> None:
        """Train adapters on the copied blocks instead of their weights; a saved folder holds them folded in."""
        self.trunk.requires_grad_(False)
        add_lora(self.trunk, lora, [self.generator.blocks])
        self.lora = lora

    # --- folders ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights, shape, statistics and checksums; an earlier noisy reward of that name is replaced when whole.

        Args:
            folder: Folder to write.
            state: Full tensors by name, where the network's own are sharded.

        Raises:
            VideoAlignError: where a weight is not finite; nothing is written then.
        """
        state = self.state_dict() if state is None else state
        state = merge_lora(state, self.lora) if self.lora else state
        require_finite(f"weights for {folder}", state, NOT_WRITTEN)
        numbers = {"shape": asdict(self.shape), "statistics": asdict(self.statistics.exported(folder))}
        with new_folder(folder, replaces=RECORD) as out:
            save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, out / "model.safetensors")
            write_json(
                out / RECORD,
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "dimensions": DIMENSIONS,
                    "generator": self.identity,
                    **numbers,
                    "sha256": {"files": checksums(out), "numbers": digest(numbers)},
                },
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, generator: Generator) -> "NoisyReward":
        """Load a folder for the generator that it was made from, in eval mode.

        Raises:
            VideoAlignError: where it is of another generator or other dimensions, is not whole, or is not what was exported.
        """
        folder = Path(folder)
        record = read_json(folder / RECORD, "a noisy reward's folder")
        try:
            if (record["format"], record["version"]) != (FORMAT, VERSION):
                raise VideoAlignError(f"{folder / RECORD} is not of the format that this release reads")
            if tuple(record["dimensions"]) != DIMENSIONS:
                raise VideoAlignError(f"{folder}: rewards are {record['dimensions']}, not {list(DIMENSIONS)}")
            shape = NoisyRewardShape(**{**record["shape"], "taps": tuple(record["shape"]["taps"])})
            statistics, identity = Statistics(**record["statistics"]), record["generator"]
            numbers, sums = digest({"shape": record["shape"], "statistics": record["statistics"]}), record.get("sha256")
        except (KeyError, TypeError) as error:
            raise VideoAlignError(f"{folder / RECORD} is not the record of a noisy reward ({error})") from None
        _check_sums(folder, sums, numbers)
        reward = cls(generator, shape)
        if different := sorted(k for k in reward.identity if identity.get(k) != reward.identity[k]):
            raise VideoAlignError(
                f"{folder} belongs to another generator ({', '.join(different)} of its own): it reads that one's noisy latents, no others"
            )
        reward._load_weights(folder / "model.safetensors")
        reward.statistics = statistics.check(str(folder))
        return reward.eval().requires_grad_(False)

    def _load_weights(self, path: Path) -> None:
        """Copy a file's tensors; each of both must meet the other, in fp32 and finite."""
        check_readable(path)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise VideoAlignError(
                f"{path} is missing or damaged ({str(error).splitlines()[0]}). Export it again."
            ) from None
        own = self.state_dict()
        problems = [f"missing {name}" for name in own.keys() - found.keys()]
        problems += [f"unexpected {name}" for name in found.keys() - own.keys()]
        problems += [
            f"{name} is {found[name].dtype} {tuple(found[name].shape)}, not {own[name].dtype} {tuple(own[name].shape)}"
            for name in own.keys() & found.keys()
            if (found[name].shape, found[name].dtype) != (own[name].shape, own[name].dtype)
        ]
        if problems:
            raise VideoAlignError(
                f"{path}: {len(problems)} tensors do not fit the shape in {RECORD}: {'; '.join(sorted(problems)[:5])}. Export it again."
            )
        require_finite(f"the weights in {path}", found, "export an earlier checkpoint")
        self.load_state_dict(found)


def _check_sums(folder: Path, sums: Any, numbers: str) -> None:
    """Compare weights and numbers with the record's checksums; folders of earlier releases have none."""
    if sums is None:
        return
    if not isinstance(sums, dict) or not isinstance(sums.get("files"), dict) or sums.get("numbers") != numbers:
        raise VideoAlignError(
            f"{folder / RECORD}: shape and statistics are not those that were exported (their checksum differs); copy or export the "
            "folder again"
        )
    check(folder, sums["files"], RECORD)


def base_parameters(transformer: nn.Module) -> dict[str, Tensor]:
    """Its parameters without adapters."""
    return {name: p for name, p in transformer.named_parameters() if ".lora_" not in name}


def truncated(generator: Generator, blocks: int) -> nn.Module:
    """A copy of the generator's transformer with its first blocks only, and no adapters."""
    whole = generator.transformer
    config = dict(whole.config) | {"num_layers": blocks}
    trunk = type(whole).from_config(config)
    names = trunk.state_dict().keys()
    state = {name.replace(".base_layer.", "."): t for name, t in whole.state_dict().items() if ".lora_" not in name}
    trunk.load_state_dict({name: state[name] for name in names})
    return trunk.float()


def time_features(t: Tensor, count: int = 64) -> Tensor:
    """Sines and cosines (B, count) of times (B,)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), count // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
