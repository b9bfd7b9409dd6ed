"""The files of a trained VideoReward: safetensors and JSON.

    reward.json          settings, sampling, statistics, backbone; `format` and `version`
    template.txt         the text around the video
    trained.safetensors  head, new embedding rows, and every other tensor that trained in full
    adapter/             LoRA weights in peft's format, where there are any
    processor/           tokenizer and preprocessing
    backbone/            the model they stand on, where it was asked to travel along

Nothing in it is unpickled. The network itself is :class:`videoalign.models.VideoReward`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import VideoAlignError
from .files import check_readable, new_folder, read_json, write_json
from .preference import DIMENSIONS

FORMAT, VERSION = "videoalign-reward", 1
RECORD = "reward.json"
_KEYS = ("settings", "sampling", "statistics", "backbone")
_PEFT = "base_model.model."


@dataclass
class RewardFolder:
    """What such a folder holds.

    Attributes:
        settings: of VideoReward, as plain values. sampling: of its frames. statistics: mean and std of its rewards.
        template: the text. backbone: folder or hub id; None where it travels along.
        owns_backbone: the backbone inside is not just a copy, there is no other like it.
        trained: tensors by the network's own names, adapters included.
    """

    settings: dict[str, Any]
    sampling: dict[str, Any]
    statistics: dict[str, list[float]]
    template: str
    backbone: str | None
    owns_backbone: bool
    trained: dict[str, Tensor]

    def save(self, folder: Path, processor: Any, adapter: LoraConfig | None, backbone: Any = None) -> None:
        """Write the folder; it replaces an earlier reward model of that name when whole.

        Args:
            processor: transformers' own. adapter: peft's configuration. backbone: a model to copy along.
        """
        with new_folder(folder, replaces=RECORD) as out:
            save_file({n: t for n, t in self.trained.items() if ".lora_" not in n}, out / "trained.safetensors")
            if adapter:
                (out / "adapter").mkdir()
                weights = {_PEFT + name.removeprefix("backbone.").replace(".default.", "."): tensor
                           for name, tensor in self.trained.items() if ".lora_" in name}  # fmt: skip
                save_file(weights, out / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
                adapter.save_pretrained(out / "adapter")
            processor.save_pretrained(out / "processor")
            (out / "template.txt").write_text(self.template + "\n", encoding="utf-8")
            if backbone is not None:
                backbone.save_pretrained(out / "backbone")
            record = {name: getattr(self, name) for name in (*_KEYS, "owns_backbone")}
            write_json(out / RECORD, {"format": FORMAT, "version": VERSION, "dimensions": DIMENSIONS, **record})

    @classmethod
    def load(cls, folder: Path) -> "RewardFolder":
        """Read a folder.

        Raises:
            VideoAlignError: where it is of another format, or a file is missing or damaged.
        """
        record = read_json(folder / RECORD, "a reward model's folder")
        if not isinstance(record, dict) or not record.keys() >= set(_KEYS):
            raise VideoAlignError(f"{folder / 'reward.json'} is not the record of a reward model")
        if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
            raise VideoAlignError(
                f"{folder / 'reward.json'}: format {record.get('format')!r} version {record.get('version')!r} is not "
                f"{FORMAT} {VERSION}, which this release reads"
            )
        for name in ("template.txt", "processor", "trained.safetensors"):
            if not (folder / name).exists():
                raise VideoAlignError(f"{folder} is not whole: {name} is missing. Export the model again.")
        trained = _load(folder / "trained.safetensors")
        if (folder / "adapter").exists() or "lora" in (
            record["settings"].get("language"),
            record["settings"].get("vision"),
        ):
            for name, tensor in _load(folder / "adapter" / "adapter_model.safetensors").items():
                stem, _, last = name.removeprefix(_PEFT).rpartition(".")
                trained[f"backbone.{stem}.default.{last}"] = tensor
        template = (folder / "template.txt").read_text(encoding="utf-8").removesuffix("\n")
        inside = folder / "backbone"
        backbone = str(inside) if inside.exists() else record["backbone"]
        return cls(
            record["settings"],
            record["sampling"],
            record["statistics"],
            template,
            backbone,
            bool(record.get("owns_backbone")),
            trained,
        )


def _load(path: Path) -> dict[str, Tensor]:
    check_readable(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VideoAlignError(f"{path} is missing or damaged ({error}). Export the model again.") from None
