"""The folder of a trained VideoReward, in safetensors and JSON.

    reward.json          settings, sampling, statistics, backbone; `format` and `version`; checksums (`sha256`)
    template.txt         the text around the video
    trained.safetensors  head, new embedding rows, and every other tensor that trained in full
    adapter/             LoRA weights in peft's format, if there are any
    processor/           tokenizer and preprocessing
    backbone/            a copy of the backbone, if it was asked for

Nothing in it is unpickled. The network itself is :class:`videoalign.models.VideoReward`.
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import VideoAlignError
from .checksums import check, checksums, digest
from .dimensions import DIMENSIONS
from .files import check_readable, new_folder, read_json, write_json
from .reward_statistics import Statistics

FORMAT, VERSION = "videoalign-reward", 1
RECORD = "reward.json"
"""Name of the file that marks a folder as a reward model."""
PARTS = (RECORD, "template.txt", "trained.safetensors", "adapter/", "processor/", "backbone/")
"""What such a folder consists of."""
_KEYS = ("settings", "sampling", "statistics", "backbone")
_PEFT = "base_model.model."


@dataclass
class RewardFolder:
    """The content of a reward model's folder.

    Attributes:
        settings: Settings of :class:`~videoalign.models.VideoReward`, as plain values.
        sampling: Settings of :class:`~videoalign.models.FrameSampling`, as plain values.
        statistics: Mean and standard deviation of the rewards; zeros and ones where they were never measured.
        template: Text around the video.
        backbone: Folder or hub id of the backbone; None where the folder contains it.
        backbone_revision: Commit of the backbone, where it is on the hub.
        owns_backbone: Whether the backbone in the folder differs from every other one, and so cannot be replaced.
        trained: Tensors that were trained, by the names of the network, adapters included.
    """

    settings: dict[str, Any]
    sampling: dict[str, Any]
    statistics: dict[str, list[float]]
    template: str
    backbone: str | None
    owns_backbone: bool
    trained: dict[str, Tensor]
    backbone_revision: str | None = None

    def save(self, folder: Path, processor: Any, adapter: LoraConfig | None, backbone: Any = None) -> None:
        """Write the folder. It replaces an earlier reward model of that name when it is whole.

        The same content gives the same bytes: sets are sorted.

        Args:
            folder: Folder to write.
            processor: Processor of transformers.
            adapter: Configuration of the adapters, as peft has it; None without adapters.
            backbone: Backbone to copy into the folder; None leaves it out.

        Raises:
            VideoAlignError: Where something other than a reward model exists there.
        """
        with new_folder(folder, replaces=RECORD) as out:
            save_file({n: t for n, t in self.trained.items() if ".lora_" not in n}, out / "trained.safetensors")
            if adapter:
                (out / "adapter").mkdir()
                loras = {n.removeprefix("backbone."): t for n, t in self.trained.items() if ".lora_" in n}
                weights = {_PEFT + name.replace(".default.", "."): tensor for name, tensor in loras.items()}
                save_file(weights, out / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
                ordered = copy.copy(adapter)  # peft would write its set of layers in an order that differs between runs
                ordered.target_modules = sorted(adapter.target_modules)
                ordered.save_pretrained(out / "adapter")
            processor.save_pretrained(out / "processor")
            (out / "template.txt").write_text(self.template + "\n", encoding="utf-8")
            if backbone is not None:
                backbone.save_pretrained(out / "backbone")
            record = {name: getattr(self, name) for name in (*_KEYS, "owns_backbone")}
            record |= {"backbone_revision": self.backbone_revision} if self.backbone_revision else {}
            record["sha256"] = {"files": checksums(out), **_numbers(record)}
            write_json(out / RECORD, {"format": FORMAT, "version": VERSION, "dimensions": DIMENSIONS, **record})

    @classmethod
    def load(cls, folder: Path) -> "RewardFolder":
        """Read the folder of a reward model.

        Args:
            folder: Folder to read.

        Raises:
            VideoAlignError: Where it is of another format, a file is missing or damaged, or weights or numbers are not
                those that were exported.
        """
        record = read_json(folder / RECORD, "a reward model's folder")
        if not isinstance(record, dict) or not record.keys() >= set(_KEYS):
            raise VideoAlignError(f"{folder / 'reward.json'} is not the record of a reward model")
        kinds = {"settings": dict, "sampling": dict, "statistics": dict, "backbone": str | None}
        if wrong := [name for name, kind in kinds.items() if not isinstance(record[name], kind)]:
            raise VideoAlignError(
                f"{folder / RECORD}: {', '.join(wrong)} are not what a reward model's record holds there. Export the "
                "model again."
            )
        if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
            raise VideoAlignError(
                f"{folder / 'reward.json'}: format {record.get('format')!r} version {record.get('version')!r} is not "
                f"{FORMAT} {VERSION}, which this release reads"
            )
        for name in ("template.txt", "processor", "trained.safetensors"):
            if not (folder / name).exists():
                raise VideoAlignError(f"{folder} is not whole: {name} is missing. Export the model again.")
        _check_sums(folder, record)
        trained = _load(folder / "trained.safetensors")
        parts = [record["settings"].get(part) for part in ("language", "vision")]
        if (folder / "adapter").exists() or "lora" in parts:
            for name, tensor in _load(folder / "adapter" / "adapter_model.safetensors").items():
                stem, _, last = name.removeprefix(_PEFT).rpartition(".")
                trained[f"backbone.{stem}.default.{last}"] = tensor
        try:
            template = (folder / "template.txt").read_text(encoding="utf-8").removesuffix("\n")
        except ValueError as error:
            raise VideoAlignError(f"{folder / 'template.txt'} is no text in UTF-8 ({error})") from None
        inside = folder / "backbone"
        backbone, revision = record["backbone"], record.get("backbone_revision")
        if inside.exists():
            backbone, revision = str(inside), None
        values = (record[name] for name in ("settings", "sampling", "statistics"))
        return cls(*values, template, backbone, bool(record.get("owns_backbone")), trained, revision)


def _numbers(record: dict[str, Any]) -> dict[str, str]:
    """Checksums of the record's numbers that rewards depend on. Other entries, such as the backbone, may be edited."""
    settings = record["settings"]
    lora = settings.get("lora") if isinstance(settings, dict) else None
    return {"sampling": digest(record["sampling"]), "lora": digest(lora), "statistics": digest(record["statistics"])}


def _check_sums(folder: Path, record: dict[str, Any]) -> None:
    """Compare weights and numbers with the checksums in the record; folders of earlier releases have none."""
    sums = record.get("sha256")
    if sums is None:
        return
    found = _numbers(record)
    if record["statistics"] == asdict(Statistics()):
        # whoever removed the statistics did not change rewards silently: every reader says that there are none
        found.pop("statistics")
    try:
        changed = [name for name, value in found.items() if sums[name] != value]
        files = dict(sums["files"])
    except (KeyError, TypeError, ValueError):
        raise VideoAlignError(f"{folder / RECORD}: sha256 does not hold checksums. Export the model again.") from None
    if changed:
        raise VideoAlignError(
            f"{folder / RECORD}: {', '.join(changed)} are not those that were exported (their checksum differs), so "
            "the rewards would be others. Copy or export the folder again."
        )
    check(folder, files, RECORD)


def _load(path: Path) -> dict[str, Tensor]:
    check_readable(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VideoAlignError(f"{path} is missing or damaged ({error}). Export the model again.") from None
