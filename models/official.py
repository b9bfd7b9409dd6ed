"""The official file layouts of VideoReward: the released one, and the one that the official training script writes.

    model_config.json                        settings of the model, and the constants of its normalisation
    checkpoint-N/model.pth                   every tensor (the released form), or these two:
    checkpoint-N/adapter_model.safetensors   the adapters
    checkpoint-N/non_lora_state_dict.pth     every other tensor that trained, and the whole embedding

Tensors have the names of transformers 4.45 with peft's prefix. The weights were trained with positions that count
tokens (the official forward passes no position ids), and with one row per reward token after the tokenizer's own ids.
Only tensors are unpickled, and every tensor is accounted for.
"""

import hashlib
import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import VideoAlignError
from .dimensions import DIMENSIONS
from .files import check_readable, read_json
from .finite import require_weights
from .frame_sampling import FrameSampling
from .hub import folders_of, resolved
from .lora import LoRA
from .reward_folder import PARTS, RECORD
from .template import OFFICIAL_CONSTANT, Template
from .video_reward import Statistics, VideoReward

CONFIG = "model_config.json"
"""Name of the file that marks a folder as an official reward model."""
WEIGHTS = ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth")
"""Files of a checkpoint: all tensors; or the adapters, and all others."""
OFFICIAL = (CONFIG, *(f"checkpoint-*/{name}" for name in WEIGHTS))
"""What an official folder consists of; its optimizer's states are not needed."""
TEMPLATE_TYPE = "detailed_special"
"""Official name of the template with three reward tokens, the only one that gives three rewards."""
TEMPLATE_SHA256 = "9a66657a4a2337fc861a651d1606a8439de13c62befc88cd01ed527ca7c44def"
"""SHA-256 of the official template in this package's notation."""
LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""Linear layers of the language model, which the official script adapts unless it excludes them by parts of names."""


def load_reward(
    folder: str | Path,
    backbone: str | Path | None = None,
    template: Template | None = None,
    step: int | None = None,
    **changes: Any,
) -> VideoReward:
    """Load a reward model in eval mode, from a folder of this package or from an official one.

    Args:
        folder: Folder or hub id, with ``reward.json`` (see :mod:`.reward_folder`) or ``model_config.json``.
        backbone: Folder or hub id of the backbone, if it is not where the folder says.
        template: Text around the video; needed for official folders, which do not hold it.
        step: Step of the official checkpoint; the latest one if not given.
        changes: Arguments of :class:`VideoReward` to change, such as ``dtype``.

    Raises:
        VideoAlignError: Where the folder is of neither layout, is not whole, or does not fit the backbone.
    """
    found = resolved(folder, "folder of a reward model", parts=(*PARTS, *OFFICIAL), now=(RECORD, CONFIG))
    if (found / RECORD).is_file():
        if template is not None or step is not None:
            raise VideoAlignError(
                f"{folder} holds its own template and one set of weights; --template, --official-repo and "
                "--checkpoint-step are for official checkpoints"
            )
        return VideoReward.from_pretrained(folder, backbone, **changes)
    if (found / CONFIG).is_file():
        return load_official(folder, backbone, template, step, **changes)
    raise VideoAlignError(
        f"{folder} is no reward model: it holds neither {RECORD} (a folder of `videoalign fit`, `export` or `convert`) "
        f"nor {CONFIG} (the released VideoReward, or what the official script wrote)"
    )


def open_reward(
    folder: str | Path,
    backbone: str | Path | None = None,
    template: str | Path | None = None,
    official_repo: str | Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
) -> VideoReward:
    """Load a reward model as a command line or a YAML file describes it, in eval mode.

    Args:
        folder: Folder or hub id of a reward model, of this package or an official one.
        backbone: Folder or hub id of the backbone, if it is not where the folder says.
        template: Text file with the official template; for official folders only.
        official_repo: Clone of the official repository to read the template from; for official folders only.
        step: Step of the checkpoint; the latest one if not given. For official folders only.
        dtype: Dtype of the backbone's frozen weights; the folder's if not given.

    Raises:
        VideoAlignError: Where the template is given twice, or :func:`load_reward` refuses the folder.
    """
    if template and official_repo:
        raise VideoAlignError("--template and --official-repo both name the template; give one of them")
    text = Template.from_repository(official_repo) if official_repo else None
    text = Template.load(template) if template else text
    return load_reward(folder, backbone, text, step, **({"dtype": dtype} if dtype else {}))


def load_official(
    folder: str | Path,
    backbone: str | Path | None = None,
    template: Template | None = None,
    step: int | None = None,
    **changes: Any,
) -> VideoReward:
    """Load an official folder as a :class:`VideoReward` in eval mode.

    Args:
        folder: Folder or hub id, with ``model_config.json``.
        backbone: Folder or hub id of the backbone, if it is not where the folder says.
        template: Text around the video, which the folder does not hold.
        step: Step of the checkpoint; the latest one if not given.
        changes: Arguments of :class:`VideoReward` to change, such as ``dtype``.

    Raises:
        VideoAlignError: Where there is no template, the folder is not whole, or it does not fit the backbone.
    """
    config = _Config(resolved(folder, "folder of a reward model", parts=OFFICIAL, now=(CONFIG,)) / CONFIG)
    if template is None:
        raise VideoAlignError(
            f"{folder} was trained with the official text {TEMPLATE_TYPE!r}, which this package does not ship and "
            "which its rewards depend on. Name a file with that text (--template FILE), or a clone of the official "
            f"repository (--official-repo DIR), whose prompt_template.py holds it as {OFFICIAL_CONSTANT}."
        )
    if not template.separate:
        raise VideoAlignError(
            f"template {template.name!r} has one shared reward token, but {folder} was trained with three"
        )
    checkpoint = _checkpoint(folder, step)
    found = _tensors(checkpoint)
    require_weights(str(checkpoint), found, "download it again, or take an earlier checkpoint")
    settings = {**config.settings(), **changes}
    network = VideoReward(backbone or config.backbone, template, config.sampling(), **settings)
    _overlay(network, found, checkpoint)
    network.statistics = config.statistics()
    if hashlib.sha256(template.text.encode()).hexdigest() != TEMPLATE_SHA256:
        logging.getLogger(__name__).warning(
            "note: the text of %s is not the official one word for word, so the rewards are not the official ones",
            template.name,
        )
    return network.eval()


class _Config:
    """The settings of ``model_config.json`` in the terms of this package."""

    def __init__(self, path: Path) -> None:
        self.path = path
        record = read_json(path, "an official reward model")
        try:
            self.data, self.model = dict(record["data_config"]), dict(record["model_config"])
            self.lora = dict(record["peft_lora_config"])
            self.constants = dict(record.get("inference_config") or {})
        except (TypeError, KeyError, ValueError) as error:
            raise VideoAlignError(
                f"{path} is no configuration of an official reward model ({type(error).__name__}: {error})"
            ) from None
        known = {
            "data_config.eval_dim": (self.data.get("eval_dim"), list(DIMENSIONS)),
            "data_config.prompt_template_type": (self.data.get("prompt_template_type"), TEMPLATE_TYPE),
            "data_config.sample_type": (self.data.get("sample_type"), "uniform"),
            "model_config.use_special_tokens": (self.model.get("use_special_tokens"), True),
            "model_config.reward_token": (self.model.get("reward_token"), "special"),
            "peft_lora_config.vision_lora": (self.lora.get("vision_lora"), False),
            "peft_lora_config.use_rslora": (self.lora.get("use_rslora", False), False),
            "peft_lora_config.num_lora_modules": (self.lora.get("num_lora_modules", -1), -1),
        }
        if other := [f"{key} is {value!r}, not {ours!r}" for key, (value, ours) in known.items() if value != ours]:
            raise VideoAlignError(f"{path}: {'; '.join(other)}. Only models of the released kind are supported.")

    @property
    def backbone(self) -> str:
        """Hub id or folder of the backbone."""
        name = self.model.get("model_name_or_path")
        if not isinstance(name, str) or not name:
            raise VideoAlignError(
                f"{self.path} names no backbone (model_config.model_name_or_path); name it with --backbone"
            )
        return name

    def sampling(self) -> FrameSampling:
        """Settings of the frames; a number of frames has priority over a rate, as in the official code."""
        try:
            count = int(self.data["num_frames"]) if self.data.get("num_frames") else None
            rate = None if count else float(self.data["fps"])
            return FrameSampling(fps=rate, num_frames=count, max_pixels=int(self.data["max_frame_pixels"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise VideoAlignError(
                f"{self.path}: fps, num_frames and max_frame_pixels of data_config must be numbers ({error})"
            ) from None
        except VideoAlignError as error:
            raise VideoAlignError(f"{self.path}, data_config: {error}") from None

    def settings(self) -> dict[str, Any]:
        """Arguments of :class:`VideoReward` that the file states."""
        lora, model = self.lora, self.model
        try:
            adapters = LoRA(
                rank=int(lora["lora_r"]),
                alpha=float(lora["lora_alpha"]),
                dropout=float(lora["lora_dropout"]),
                targets=[
                    n.split(".")[1]
                    for n in LAYERS
                    if not any(part in f"layers.{n}" for part in lora["lora_namespan_exclude"])
                ],
            )
            if model["output_dim"] not in (1, 3):
                raise ValueError(f"model_config.output_dim is {model['output_dim']}, not 1 or 3")
            return {
                "positions": "1d",
                "head_rows": model["output_dim"],
                "language": "lora" if lora["lora_enable"] else "frozen" if model["freeze_llm"] else "full",
                "vision": "frozen" if model["freeze_vision_tower"] else "full",
                "train_merger": bool(model["tune_merger"]),
                "lora": adapters,
                "dtype": "float32" if model.get("torch_dtype") == "float32" else "bfloat16",
            }
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(
                f"{self.path} lacks a setting, or one is not of its kind ({type(error).__name__}: {error})"
            ) from None

    def statistics(self) -> Statistics:
        """Constants of the normalisation; zeros and ones, with a warning, where the official script left them out."""
        if not self.constants:
            logging.getLogger(__name__).warning(
                "%s has no inference_config, so there is nothing to normalise rewards with: they stay raw", self.path
            )
            return Statistics()
        try:
            mean, std = ([float(self.constants[f"{d}_{kind}"]) for d in DIMENSIONS] for kind in ("mean", "std"))
            return Statistics(mean, std).check(f"{self.path}, inference_config")
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(
                f"{self.path}: inference_config lacks a number ({type(error).__name__}: {error})"
            ) from None


def _checkpoint(folder: str | Path, step: int | None) -> Path:
    """Find the folder ``checkpoint-N`` of a step, or of the latest one; on the hub only that one is fetched."""
    steps = {int(m[1]): name for name in folders_of(folder) if (m := re.fullmatch(r"checkpoint-(\d+)", name))}
    if not steps:
        raise VideoAlignError(f"{folder} has no checkpoint-N folder beside {CONFIG}")
    if step is not None and step not in steps:
        raise VideoAlignError(f"{folder} has no checkpoint-{step}; there are: {', '.join(map(str, sorted(steps)))}")
    name = steps[max(steps) if step is None else step]
    parts = (CONFIG, *(f"{name}/{file}" for file in WEIGHTS))
    return resolved(folder, "folder of a reward model", parts=parts) / name


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Read the tensors of either form, by the names of this package."""
    whole, adapters, others = (checkpoint / name for name in WEIGHTS)
    if whole.is_file():
        return _renamed(_load_pth(whole), whole)
    if missing := [path.name for path in (adapters, others) if not path.is_file()]:
        raise VideoAlignError(f"{checkpoint} has neither model.pth nor {' and '.join(missing)}")
    check_readable(adapters)
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
    check_readable(path)
    whole = zipfile.is_zipfile(path)  # files of old torch versions are no archives, and cannot be mapped
    with open(path, "rb") as file:
        head = file.read(2)
    if not head or (head == b"PK" and not whole):
        raise VideoAlignError(f"{path} was cut short ({path.stat().st_size} bytes are there). Download it again.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise VideoAlignError(
                f"{path} holds {named[1]}, which is no tensor; loading it would run code of whoever made the file, so "
                "it was not read. Use a file from a source that you trust."
            ) from None
        raise VideoAlignError(f"{path} is damaged, or no file of torch. Download it again.") from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError) as error:
        raise VideoAlignError(
            f"{path} is damaged, or no file of torch ({str(error).splitlines()[0][:120]}). Download it again."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise VideoAlignError(f"{path} is no dictionary of tensors by name")
    return found


EMBEDDINGS = "backbone.language_model.embed_tokens"
"""Name of the token embedding in :class:`VideoReward`."""


def _renamed(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert names of transformers 4.45 or later, with peft's prefix, to the names of this package."""
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
    """Copy the checkpoint's tensors into the network; every tensor that trains must be there."""
    embedding = found.pop(f"{EMBEDDINGS}.weight", None)
    if embedding is None:
        raise VideoAlignError(f"{checkpoint}: the token embedding is missing, which has the rows of the reward tokens")
    tokens = network.backbone.get_input_embeddings()
    ids = network.processor.reward_ids
    rows = max(len(network.processor.tokenizer), *(i + 1 for i in ids))
    if tuple(embedding.shape) != (rows, tokens.base.embedding_dim):
        raise VideoAlignError(
            f"{checkpoint}: the embedding is {tuple(embedding.shape)}, but backbone {network.backbone_name} with the "
            f"three reward tokens makes it {(rows, tokens.base.embedding_dim)}. Name the backbone that it was trained "
            "on with --backbone."
        )
    names = dict(network.named_parameters())
    base = names[f"{EMBEDDINGS}.base.weight"].detach().clone()  # (V, E); rows after the tokenizer's are never read
    words = [i for i in range(min(len(base), rows)) if i not in ids]
    base[words] = embedding[words].to(base.dtype)
    head = found.get("head.weight")
    if head is not None and len(head) != len(network.head.weight):
        stated = f"{CONFIG} says {len(network.head.weight)} (model_config.output_dim)"
        raise VideoAlignError(f"{checkpoint}: the reward head has {len(head)} rows, but {stated}")
    found |= {f"{EMBEDDINGS}.base.weight": base, f"{EMBEDDINGS}.rows": embedding[ids].float()}
    whole = (checkpoint / "model.pth").is_file()
    expected = set(names) if whole else {*network.trained_names(), f"{EMBEDDINGS}.base.weight"}
    network.load_tensors(found, checkpoint, expected)
