r"""Reward on noisy latents, :math:`r(x_t, y, t)`, which steers sampling in Flow-NRG (VideoAlign, section 4.4).

The paper reuses "a few early layers" of the generator and discloses no more. This package copies the first ``blocks``
of the generator's own transformer and calls them as the generator does, so that time and prompt enter as in its
training. The tokens after some of the blocks are pooled, and a small head conditioned on time gives VQ, MQ and TA.

Legend: B samples, L tokens, E width of the transformer, D dimensions, K learned queries.
"""

import contextlib
import math
from dataclasses import asdict, dataclass
from functools import cached_property
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
from .hub import resolved
from .lora import LoRA, add_lora, merge_lora
from .norms import keep_dtype_in_norms
from .reward_statistics import Statistics

RECORD, FORMAT, VERSION = "noisy_reward.json", "videoalign-noisy-reward", 1


@dataclass(frozen=True, kw_only=True)
class NoisyRewardShape:
    """Architecture of the reward on noisy latents, which the paper leaves open."""

    blocks: int = 8
    """Number of the transformer's first blocks that are copied, at least 1."""
    taps: tuple[int, ...] = ()
    """Numbers of the blocks after which tokens are read, counted from 1, up to ``blocks``; empty reads after the last
    one."""
    pooling: Literal["mean", "attention"] = "mean"
    """Pooling of tokens: their ``mean``, or ``attention`` of learned queries to them."""
    queries: int = 4
    """Number of learned queries under ``pooling: attention``, at least 1."""
    hidden: int = 256
    """Width of the pooled state and of the head, at least 1."""

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.queries < 1 or self.hidden < 1:
            raise VideoAlignError(f"shape: blocks, queries and hidden must be at least 1, got {self}")
        if wrong := [tap for tap in self.taps if not 1 <= tap <= self.blocks]:
            raise VideoAlignError(f"shape.taps {wrong} are not among the {self.blocks} copied blocks, counted from 1")
        if self.pooling not in ("mean", "attention"):
            raise VideoAlignError(f"shape.pooling {self.pooling!r} is unknown; choose mean or attention")


class Pool(nn.Module):
    """Pooling of a block's tokens to one state per sample.

    Args:
        width: Width E of the tokens.
        shape: Architecture, which says how tokens are pooled.
    """

    def __init__(self, width: int, shape: NoisyRewardShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = None
        if shape.pooling == "attention":
            self.queries = nn.Parameter(torch.randn(shape.queries, width) * width**-0.5)
            self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width * (shape.queries if shape.pooling == "attention" else 1), shape.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens (B, L, E) to states (B, hidden)."""
        x = self.norm(tokens.float())
        if self.queries is None:
            return self.out(x.mean(1))
        weights = torch.softmax(self.queries @ self.key(x).transpose(1, 2) * x.shape[-1] ** -0.5, -1)  # (B, K, L)
        return self.out((weights @ self.value(x)).flatten(1))


class NoisyReward(nn.Module):
    """Reward model on noisy latents: it gives VQ, MQ and TA of latents at any time t (VideoAlign, section 4.4).

    Args:
        generator: Generator whose first blocks are copied; it is not changed.
        shape: Architecture; the default one if not given.
        expert: Which of two experts' blocks are copied; those of the generator's ``transformer`` if not given.

    Raises:
        VideoAlignError: Where the generator has fewer blocks than ``shape.blocks``, or the expert was not loaded.
    """

    record = RECORD
    """Name of the file that marks a folder as a reward on noisy latents."""

    def __init__(self, generator: Generator, shape: NoisyRewardShape | None = None, expert: str | None = None) -> None:
        super().__init__()
        self.shape = shape or NoisyRewardShape()
        expert = expert or generator.expert
        whole = generator.require("transformer") if expert == generator.expert else generator.other
        if whole is None:
            raise VideoAlignError(f"the noisy reward reads the blocks of the {expert} expert, which was not loaded")
        blocks = getattr(whole, generator.blocks)
        if self.shape.blocks > len(blocks):
            raise VideoAlignError(f"shape.blocks is {self.shape.blocks}, but the generator has {len(blocks)} blocks")
        object.__setattr__(self, "generator", generator)  # no submodule: it only calls the copied transformer
        self.expert = expert
        self.statistics = Statistics()
        taps = self.shape.taps or (self.shape.blocks,)
        self.trunk = truncated(generator, whole, max(taps)).requires_grad_(True)
        for name, parameter in self.trunk.named_parameters():  # what is behind the blocks gives a velocity, unused here
            if name.startswith(tuple(generator.behind)) or not generator.adaptable(name, max(taps)):
                parameter.requires_grad_(False)
        width = generator.config.num_attention_heads * generator.config.attention_head_dim
        self.pools = nn.ModuleList(Pool(width, self.shape) for _ in taps)
        hidden = self.shape.hidden
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.head = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, len(DIMENSIONS), bias=False)
        )
        self.lora: LoRA | None = None
        self._read: list[Tensor] | None = None  # tokens that are read during a forward pass
        for tap in taps:
            getattr(self.trunk, generator.blocks)[tap - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, args: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        if self._read is not None:  # not when checkpointed activations are computed again
            self._read.append(out[0] if isinstance(out, tuple) else out)  # of several streams the video's is the first

    @cached_property
    def identity(self) -> dict[str, str]:
        """What the generator is known by: its own identity, and a digest of the transformer that was copied."""
        whole = self.generator.transformer if self.expert == self.generator.expert else self.generator.other
        # rounded, so that the same generator has the same fingerprint in any precision
        found = {**self.generator.identity(), "transformer": fingerprint(base_parameters(whole), torch.bfloat16)}
        return found | ({"expert": self.expert} if self.expert else {})

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw rewards (B, D), fp32.

        Args:
            x: Noisy latents (B, C, F, H, W).
            t: Times (B,) in [0, 1].
            condition: Prompts, and images, of the batch.
        """
        self._read = []
        try:
            with self._precision(x.device.type):
                self.generator.velocity(x, t, condition, self.trunk)  # the velocity of so few blocks is of no use
            tokens = self._read
        finally:
            self._read = None
        with torch.autocast(x.device.type, enabled=False):  # bf16 rewards would make ties that nobody predicted
            pooled = torch.stack([pool(one.float()) for pool, one in zip(self.pools, tokens)]).mean(0)  # (B, hidden)
            scale, shift = self.time(time_features(t)).chunk(2, -1)
            return self.head(pooled * (1 + scale) + shift)

    def _precision(self, device: str) -> contextlib.AbstractContextManager:
        """Beside a generator in bfloat16 frozen blocks compute in it too, as they did in a training in bf16-mixed."""
        sampling = self.generator.transformer if self.expert == self.generator.expert else self.generator.other
        frozen = not any(parameter.requires_grad for parameter in self.trunk.parameters())
        if frozen and sampling is not None and sampling.dtype == torch.bfloat16:
            return torch.autocast(device, torch.bfloat16)
        return contextlib.nullcontext()

    def need_statistics(self, where: str) -> None:
        """Refuse a reward without statistics, before its dimensions are weighed against each other.

        Args:
            where: Folder of the reward, for the message.

        Raises:
            VideoAlignError: Where the rewards were never measured on held-out pairs.
        """
        if self.statistics == Statistics():
            raise VideoAlignError(
                f"{where} has no statistics of its rewards, so its dimensions cannot be weighed against each other, "
                "and strengths and targets have no unit; train it with held-out pairs (data.val)"
            )

    def normalise(self, rewards: Tensor) -> Tensor:
        """Z-scores of raw rewards (..., D), by the statistics of held-out latents at the times of the validation."""
        both = [self.statistics.mean, self.statistics.std]
        mean, std = torch.tensor(both, device=rewards.device, dtype=rewards.dtype)
        return (rewards - mean) / std

    def adapt(self, lora: LoRA) -> None:
        """Train adapters on the copied blocks instead of their weights. A saved folder holds merged weights.

        Args:
            lora: Settings of the adapters.
        """
        self.trunk.requires_grad_(False)
        blocks = len(getattr(self.trunk, self.generator.blocks))
        unread = [name for name, _ in self.trunk.named_modules() if not self.generator.adaptable(name, blocks)]
        add_lora(self.trunk, lora, [self.generator.blocks], unread)
        self.lora = lora

    # --- folders ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights, shape, statistics and checksums. An earlier reward on noisy latents of that name is replaced.

        Args:
            folder: Folder to write.
            state: Full tensors by name, where the network's own are sharded.

        Raises:
            VideoAlignError: Where a weight is not finite; nothing is written then.
        """
        state = self.state_dict() if state is None else state
        state = merge_lora(state, self.lora) if self.lora else state
        require_finite(f"weights for {folder}", state, NOT_WRITTEN)
        numbers = {"shape": asdict(self.shape), "statistics": asdict(self.statistics.exported(folder))}
        with new_folder(folder, replaces=RECORD) as out:
            save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, out / "model.safetensors")
            record = {
                "format": FORMAT,
                "version": VERSION,
                "dimensions": DIMENSIONS,
                "generator": self.identity,
                **numbers,
            }
            write_json(out / RECORD, {**record, "sha256": {"files": checksums(out), "numbers": digest(numbers)}})

    @classmethod
    def from_pretrained(cls, folder: str | Path, generator: Generator) -> "NoisyReward":
        """Load a folder of :meth:`save_pretrained`, in eval mode and frozen.

        Args:
            folder: Folder or hub id to load.
            generator: Generator that the reward was trained for.

        Raises:
            VideoAlignError: Where the folder is of another generator or other dimensions, is not whole, or is not the
                one that was exported.
        """
        folder, record = record_of(folder)
        try:
            if (record["format"], record["version"]) != (FORMAT, VERSION):
                raise VideoAlignError(f"{folder / RECORD} is not of the format that this release reads")
            if tuple(record["dimensions"]) != DIMENSIONS:
                raise VideoAlignError(f"{folder}: rewards are {record['dimensions']}, not {list(DIMENSIONS)}")
            shape = NoisyRewardShape(**{**record["shape"], "taps": tuple(record["shape"]["taps"])})
            statistics, identity = Statistics(**record["statistics"]), dict(record["generator"])
            numbers, sums = digest({"shape": record["shape"], "statistics": record["statistics"]}), record.get("sha256")
        except (KeyError, TypeError) as error:
            raise VideoAlignError(f"{folder / RECORD} is not the record of a noisy reward ({error})") from None
        _check_sums(folder, sums, numbers)
        reward = cls(generator, shape, identity.get("expert"))
        if different := sorted(k for k in reward.identity if identity.get(k) != reward.identity[k]):
            raise VideoAlignError(
                f"{folder} belongs to another generator ({', '.join(different)} of its own): it reads that one's noisy "
                "latents, no others"
            )
        reward._load_weights(folder / "model.safetensors")
        reward.statistics = statistics.check(str(folder))
        return reward.eval().requires_grad_(False)

    def _load_weights(self, path: Path) -> None:
        """Copy the tensors of a file, which must have the network's names, shapes and dtypes, and finite values."""
        check_readable(path)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise VideoAlignError(f"{path} is missing or damaged ({why}). Export it again.") from None
        kinds = (self.state_dict(), found)
        want, held = ({n: f"{t.dtype} {tuple(t.shape)}" for n, t in kind.items()} for kind in kinds)
        problems = [f"missing {name}" for name in want.keys() - held.keys()]
        problems += [f"unexpected {name}" for name in held.keys() - want.keys()]
        both = want.keys() & held.keys()
        problems += [f"{name} is {held[name]}, not {want[name]}" for name in both if held[name] != want[name]]
        if problems:
            raise VideoAlignError(
                f"{path}: {len(problems)} tensors do not fit the shape in {RECORD}: {'; '.join(sorted(problems)[:5])}. "
                "Export it again."
            )
        require_finite(f"the weights in {path}", found, "export an earlier checkpoint")
        self.load_state_dict(found)


def record_of(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a noisy reward on this machine, and what its record says.

    Args:
        folder: Folder or hub id.

    Raises:
        VideoAlignError: Where there is no such folder, or no record in it.
    """
    folder = resolved(folder, "folder of a noisy reward", parts=(RECORD, "model.safetensors"))
    return folder, read_json(folder / RECORD, "a noisy reward's folder")


def _check_sums(folder: Path, sums: Any, numbers: str) -> None:
    """Compare weights and numbers with the checksums in the record; folders of earlier releases have none."""
    if sums is None:
        return
    if not isinstance(sums, dict) or not isinstance(sums.get("files"), dict) or sums.get("numbers") != numbers:
        raise VideoAlignError(
            f"{folder / RECORD}: shape and statistics are not those that were exported (their checksum differs); copy "
            "or export the folder again"
        )
    check(folder, sums["files"], RECORD)


def base_parameters(transformer: nn.Module) -> dict[str, Tensor]:
    """Parameters of a transformer by name, without those of adapters."""
    return {name: p for name, p in transformer.named_parameters() if ".lora_" not in name}


def truncated(generator: Generator, whole: nn.Module, blocks: int) -> nn.Module:
    """Copy a transformer with only its first blocks and without adapters, in fp32.

    Args:
        generator: Generator that the transformer is of.
        whole: Transformer that is copied.
        blocks: Number of blocks to keep.
    """
    with whole.device:  # on the meta device too, where shapes are all there is
        trunk = type(whole).from_config(generator.truncated(blocks))
    names = trunk.state_dict().keys()
    state = {name.replace(".base_layer.", "."): t for name, t in whole.state_dict().items() if ".lora_" not in name}
    trunk.load_state_dict({name: state[name] for name in names})
    keep_dtype_in_norms(trunk)
    return trunk.float()


def time_features(t: Tensor, count: int = 64) -> Tensor:
    """Sines and cosines of times, at frequencies from 1 to 1000.

    Args:
        t: Times (B,) in [0, 1].
        count: Number of features, even.

    Returns:
        Features (B, count).
    """
    frequencies = torch.exp(torch.linspace(0, math.log(1000), count // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
