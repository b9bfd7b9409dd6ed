"""The official layouts of VideoReward: what its authors released, and what their training script writes.

    model_config.json                        how the model was built, and the constants of its normalisation
    checkpoint-N/model.pth                   every tensor (the released form), or these two:
    checkpoint-N/adapter_model.safetensors   the adapters
    checkpoint-N/non_lora_state_dict.pth     every other tensor that trained, and the whole embedding

Their names are those of transformers 4.45 behind peft's prefix. The weights were trained with positions that count
tokens (the official forward passes no position ids), and with one row per reward token behind the tokenizer's own
ids. Nothing is unpickled but tensors, and every tensor is accounted for.
"""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import VideoAlignError
from .files import read_json
from .lora import LoRA
from .preference import DIMENSIONS
from .reward_folder import RECORD
from .sampling import FrameSampling
from .template import OFFICIAL_CONSTANT, Template
from .video_reward import Statistics, VideoReward

CONFIG = "model_config.json"
TEMPLATE_TYPE = "detailed_special"
"""The official name of the template with three reward tokens, the only one that gives three rewards in one row."""


def load_reward(
    folder: str | Path, backbone: str | Path | None = None, template: Template | None = None, step: int | None = None,
    **changes: Any,
) -> VideoReward:  # fmt: skip
    """A reward model in eval mode, from a folder of this package or from an official one.

    Args:
        folder: with ``reward.json`` (see :mod:`.reward_folder`) or ``model_config.json``.
        backbone: where the backbone is, if not where the folder says.
        template: the text around the video; official folders do not hold it. step: which official checkpoint; the
            latest if not given. changes: arguments of :class:`VideoReward` to change, such as ``dtype``.

    Raises:
        VideoAlignError: where the folder is of neither layout, or is not whole, or does not fit the backbone.
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        if template is not None or step is not None:
            raise VideoAlignError(
                f"{folder} holds its own template and one set of weights; --template, --official-repo and "
                "--checkpoint-step are for official checkpoints"
            )
        return VideoReward.from_pretrained(folder, backbone, **changes)
    if (folder / CONFIG).is_file():
        return load_official(folder, backbone, template, step, **changes)
    raise VideoAlignError(
        f"{folder} is no reward model: it holds neither {RECORD} (a folder of `videoalign fit`, `export` or `convert`) "
        f"nor {CONFIG} (the released VideoReward, or what the official script wrote)"
    )


def load_official(
    folder: str | Path, backbone: str | Path | None = None, template: Template | None = None, step: int | None = None,
    **changes: Any,
) -> VideoReward:  # fmt: skip
    """An official folder as a :class:`VideoReward` in eval mode; see :func:`load_reward`."""
    folder = Path(folder)
    config = _Config(folder / CONFIG)
    if template is None:
        raise VideoAlignError(
            f"{folder} was trained with the official text {TEMPLATE_TYPE!r}, which this package does not ship and which its "
            f"rewards depend on. Name a file with that text (--template FILE), or a clone of the official repository "
            f"(--official-repo DIR), whose prompt_template.py holds it as {OFFICIAL_CONSTANT}."
        )
    checkpoint = _checkpoint(folder, step)
    found = _tensors(checkpoint)
    settings = {**config.settings(), **changes}
    network = VideoReward(backbone or config.backbone, template, config.sampling(), **settings)
    _overlay(network, found, checkpoint)
    network.statistics = config.statistics()
    return network.eval()


class _Config:
    """``model_config.json`` in this package's terms."""

    def __init__(self, path: Path) -> None:
        self.path = path
        record = read_json(path, "an official reward model")
        try:
            self.data, self.model = dict(record["data_config"]), dict(record["model_config"])
            self.lora = dict(record["peft_lora_config"])
            self.constants = dict(record.get("inference_config") or {})
        except (TypeError, KeyError, ValueError) as error:
            raise VideoAlignError(f"{path} is no configuration of an official reward model (no {error})") from None
        known = {
            "data_config.eval_dim": (self.data.get("eval_dim"), list(DIMENSIONS)),
            "data_config.prompt_template_type": (self.data.get("prompt_template_type"), TEMPLATE_TYPE),
            "data_config.sample_type": (self.data.get("sample_type"), "uniform"),
            "model_config.use_special_tokens": (self.model.get("use_special_tokens"), True),
            "model_config.reward_token": (self.model.get("reward_token"), "special"),
        }
        if other := [f"{key} is {value!r}, not {ours!r}" for key, (value, ours) in known.items() if value != ours]:
            raise VideoAlignError(f"{path}: {'; '.join(other)}. Only models with three reward tokens are supported.")

    @property
    def backbone(self) -> str:
        """Hub id or folder."""
        name = self.model.get("model_name_or_path")
        if not isinstance(name, str) or not name:
            raise VideoAlignError(
                f"{self.path} names no backbone (model_config.model_name_or_path); name it with --backbone"
            )
        return name

    def sampling(self) -> FrameSampling:
        """Frames per video and pixels per frame; a number of frames goes before a rate, as in the official code."""
        count = self.data.get("num_frames")
        try:
            return FrameSampling(
                fps=None if count else float(self.data["fps"]), num_frames=count, max_pixels=int(self.data["max_frame_pixels"])
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(
                f"{self.path}: fps, num_frames and max_frame_pixels of data_config must be numbers ({error})"
            ) from None

    def settings(self) -> dict[str, Any]:
        """Arguments of :class:`VideoReward`."""
        lora, model = self.lora, self.model
        try:
            adapters = LoRA(
                rank=int(lora["lora_r"]), alpha=float(lora["lora_alpha"]), dropout=float(lora["lora_dropout"]),
                targets=list(lora.get("lora_target_modules") or ["all-linear"]),
            )  # fmt: skip
            return {
                "positions": "1d",
                "head_rows": int(model["output_dim"]),
                "language": "lora" if lora["lora_enable"] else "frozen" if model["freeze_llm"] else "full",
                "vision": "lora" if lora["vision_lora"] else "frozen" if model["freeze_vision_tower"] else "full",
                "train_merger": bool(model["tune_merger"]),
                "lora": adapters,
                "dtype": "float32" if model.get("torch_dtype") == "float32" else "bfloat16",
            }
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(f"{self.path} lacks a setting, or it is not of its kind: {error}") from None

    def statistics(self) -> Statistics:
        """The constants of normalisation; zeros and ones, with a warning, where the official script left them out."""
        if not self.constants:
            logging.getLogger(__name__).warning(
                "%s has no inference_config, so there is nothing to normalise rewards with: they stay raw", self.path
            )
            return Statistics()
        try:
            return Statistics(*([float(self.constants[f"{d}_{kind}"]) for d in DIMENSIONS] for kind in ("mean", "std")))
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(f"{self.path}: inference_config lacks {error} or it is no number") from None


def _checkpoint(folder: Path, step: int | None) -> Path:
    """The folder ``checkpoint-N``: of the given step, otherwise the latest."""
    steps = sorted(
        int(m[1]) for p in folder.iterdir() if p.is_dir() and (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    )
    if not steps:
        raise VideoAlignError(f"{folder} has no checkpoint-N folder beside {CONFIG}")
    if step is not None and step not in steps:
        raise VideoAlignError(f"{folder} has no checkpoint-{step}; there are: {', '.join(map(str, steps))}")
    return folder / f"checkpoint-{steps[-1] if step is None else step}"


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of either form, by this package's names."""
    whole, adapters, others = (
        checkpoint / n for n in ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth")
    )
    if whole.is_file():
        return _renamed(_load_pth(whole), whole)
    if missing := [path.name for path in (adapters, others) if not path.is_file()]:
        raise VideoAlignError(f"{checkpoint} has neither model.pth nor {' and '.join(missing)}")
    try:
        lora = load_file(adapters)
    except (OSError, SafetensorError) as error:
        raise VideoAlignError(f"{adapters} is damaged or no safetensors file ({error})") from None
    # peft leaves the adapter's name out of its files
    named = {re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", name): tensor for name, tensor in lora.items()}
    first, second = _renamed(_load_pth(others), others), _renamed(named, adapters)
    # peft may have saved the resized embedding in its own file too
    if differing := [n for n in first.keys() & second.keys() if not torch.equal(first[n], second[n])]:
        raise VideoAlignError(f"{checkpoint}: the two files hold different values for {sorted(differing)[:5]}")
    return first | second


def _load_pth(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise VideoAlignError(
            f"{path} holds more than tensors, or is damaged, and was not read: loading it would run code from it "
            f"({str(error).splitlines()[0][:160]}). Use a file from a source that you trust."
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise VideoAlignError(
            f"{path} cannot be read; it is damaged or was cut short ({str(error).splitlines()[0][:160]}). Download it again."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise VideoAlignError(f"{path} is no dictionary of tensors")
    return found


EMBEDDINGS = "backbone.language_model.embed_tokens"


def _renamed(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names of transformers 4.45, or of later ones, behind peft's prefix -> this package's names."""
    result = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("base_model.model.")
        if short == "lm_head.weight":  # the embedding again; a reward needs no vocabulary
            continue
        if short == "rm_head.weight":
            new = "head.weight"
        else:
            new = short.removeprefix("model.")
            new = new if new.startswith(("visual.", "language_model.")) else f"language_model.{new}"
            new = f"backbone.{new}"
        if new in result:
            raise VideoAlignError(f"{path}: two tensors would both be {new}, one of them {name}")
        result[new] = tensor
    return result


def _overlay(network: VideoReward, found: dict[str, Tensor], checkpoint: Path) -> None:
    """Put the checkpoint's tensors into the network; what trains must all be there."""
    embedding = found.pop(f"{EMBEDDINGS}.weight", None)
    if embedding is None:
        raise VideoAlignError(f"{checkpoint}: the token embedding is missing, which has the rows of the reward tokens")
    tokens = network.backbone.get_input_embeddings()
    ids = network.processor.reward_ids
    rows = max(len(network.processor.tokenizer), *(i + 1 for i in ids))
    if tuple(embedding.shape) != (rows, tokens.base.embedding_dim):
        raise VideoAlignError(
            f"{checkpoint}: the embedding is {tuple(embedding.shape)}, but backbone {network.backbone_name} with the three "
            f"reward tokens makes it {(rows, tokens.base.embedding_dim)}. Name the backbone that it was trained on with --backbone."
        )
    names = dict(network.named_parameters())
    base = names[f"{EMBEDDINGS}.base.weight"].detach().clone()  # (V, E); rows behind the tokenizer's are never read
    count = min(len(base), rows)
    base[:count] = embedding[:count].to(base.dtype)
    found |= {f"{EMBEDDINGS}.base.weight": base, f"{EMBEDDINGS}.rows": embedding[ids].float()}
    whole = (checkpoint / "model.pth").is_file()
    network.load_tensors(
        found, checkpoint, set(names) if whole else {*network.trained_names(), f"{EMBEDDINGS}.base.weight"}
    )
