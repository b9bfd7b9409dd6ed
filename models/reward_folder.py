"""A trained VideoReward as a folder of safetensors and JSON.

    reward.json          settings, sampling, statistics, backbone; `format` and `version`
    template.txt         the text around the video
    trained.safetensors  head, new embedding rows, and every other tensor that trained in full
    adapter/             LoRA weights in peft's format, where there are any
    processor/           tokenizer and preprocessing
    backbone/            the model they stand on, where it was asked to travel along

Nothing in it is unpickled. Every tensor is accounted for when it is loaded.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import VideoAlignError
from .files import new_folder, read_json, write_json
from .lora import LoRA
from .preference import DIMENSIONS
from .sampling import FrameSampling
from .template import Template
from .video_reward import Statistics, VideoReward, load_backbone

FORMAT, VERSION = "videoalign-reward", 1
_PEFT = "base_model.model."


def save_reward(
    network: VideoReward, folder: Path, state: dict[str, Tensor] | None = None, backbone: bool = False
) -> None:
    """Write the folder; it replaces an earlier one of that name when whole.

    Args:
        state: full tensors by name, where the network's own are sharded. backbone: copy the backbone along.
    """
    state = network.state_dict() if state is None else state
    trained = {name: state[name].detach().cpu().contiguous() for name in network.trained_names()}
    adapter = {_PEFT + name.removeprefix("backbone.").replace(".default.", "."): tensor
               for name, tensor in trained.items() if ".lora_" in name}  # fmt: skip
    with new_folder(folder, overwrite=True) as out:
        save_file({n: t for n, t in trained.items() if ".lora_" not in n}, out / "trained.safetensors")
        if adapter:
            (out / "adapter").mkdir()
            save_file(adapter, out / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
            network.backbone.peft_lora_config.save_pretrained(out / "adapter")
        network.processor.huggingface.save_pretrained(out / "processor")
        (out / "template.txt").write_text(network.processor.template.text + "\n", encoding="utf-8")
        if backbone:
            load_backbone_whole(network.backbone_name).save_pretrained(out / "backbone")
        write_json(out / "reward.json", {
            "format": FORMAT,
            "version": VERSION,
            "dimensions": DIMENSIONS,
            "backbone": None if backbone else network.backbone_name,
            "settings": network.settings,
            "sampling": network.processor.sampling.to_dict(),
            "statistics": {"mean": network.statistics.mean, "std": network.statistics.std},
        })  # fmt: skip


def load_backbone_whole(backbone: str | Path) -> torch.nn.Module:
    """The untouched backbone as transformers saves it, for a copy."""
    from transformers import AutoModelForImageTextToText

    load_backbone(backbone)  # the checks and their messages
    return AutoModelForImageTextToText.from_pretrained(backbone)


def load_reward(folder: Path, backbone: str | Path | None = None, **changes: object) -> VideoReward:
    """Load a folder written by :func:`save_reward`.

    Args:
        backbone: where the backbone is now, if not where it was. changes: settings of :class:`VideoReward` to change,
            such as ``attention``, ``dtype`` or ``gradient_checkpointing``.

    Raises:
        VideoAlignError: where a file is missing or a tensor is missing, unexpected or misshapen.
    """
    what = "a reward model's folder"
    record = read_json(folder / "reward.json", what)
    if not isinstance(record, dict) or record.keys() < {"settings", "sampling", "statistics", "backbone"}:
        raise VideoAlignError(f"{folder / 'reward.json'} is not the record of a reward model")
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise VideoAlignError(f"{folder / 'reward.json'}: format {record.get('format')!r} version {record.get('version')!r} "
                              f"is not {FORMAT} {VERSION}, which this release reads")  # fmt: skip
    for name in ("template.txt", "processor", "trained.safetensors"):
        if not (folder / name).exists():
            raise VideoAlignError(f"{folder} is not whole: {name} is missing. Export the model again.")
    inside = folder / "backbone"
    backbone = backbone or (inside if inside.exists() else record["backbone"])
    settings = {**record["settings"], **changes}
    network = VideoReward(
        backbone,
        template=Template(
            (folder / "template.txt").read_text(encoding="utf-8").rstrip("\n"), str(folder / "template.txt")
        ),
        sampling=FrameSampling(**record["sampling"]),
        processor=folder / "processor",
        **{**settings, "lora": LoRA(**settings["lora"])},
    )
    _load_trained(network, folder)
    network.statistics = Statistics(**record["statistics"])
    return network.eval()


def _load_trained(network: VideoReward, folder: Path) -> None:
    """Copy the folder's tensors into the network; every one of both must meet."""
    found = _load(folder / "trained.safetensors")
    if any(".lora_" in name for name in network.trained_names()):
        for name, tensor in _load(folder / "adapter" / "adapter_model.safetensors").items():
            stem, _, last = name.removeprefix(_PEFT).rpartition(".")
            found[f"backbone.{stem}.default.{last}"] = tensor
    want = {name: p for name, p in network.named_parameters() if p.requires_grad}
    problems = [f"missing {n}" for n in want.keys() - found.keys()] + [
        f"unexpected {n}" for n in found.keys() - want.keys()
    ]
    problems += [f"{n} is {tuple(found[n].shape)}, not {tuple(want[n].shape)}"
                 for n in want.keys() & found.keys() if found[n].shape != want[n].shape]  # fmt: skip
    if problems:
        shown = "; ".join(sorted(problems)[:10])
        raise VideoAlignError(
            f"{folder}: {len(problems)} tensors do not fit backbone {network.backbone_name}: {shown}. "
            "Was it trained on another backbone? Name the right one with --backbone."
        )
    with torch.no_grad():
        for name, parameter in want.items():
            parameter.copy_(found[name])


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VideoAlignError(f"{path} is missing or damaged ({error}). Export the model again.") from None
