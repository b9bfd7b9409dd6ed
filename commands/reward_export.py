"""Folders of reward models: `videoalign convert` writes an official model as one, `videoalign export` a checkpoint."""

import sys
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from torch import Tensor

from .. import VideoAlignError
from ..alignment.reward_model import RewardModel
from ..callbacks.checkpoint_io import read_checkpoint
from ..models.files import claims_out
from ..models.hub import at_commit
from ..models.video_reward import VideoReward
from .config_files import configs_in
from .reward_judge import RewardJudge


@claims_out
def convert(judge: RewardJudge, out: str, with_backbone: bool) -> None:
    """Write a reward model, official or not, as a folder of this package; its rewards stay the same.

    Args:
        judge: The reward model to convert.
        out: Folder to make.
        with_backbone: Copy the backbone into the folder.
    """
    network = judge.network
    network.save_pretrained(out, backbone=with_backbone)
    if network.owns_backbone and not with_backbone:
        print(
            f"note: frozen tensors of {judge.model} differ from those of {network.backbone_name}, so {out}/backbone "
            "holds the backbone that it stands on",
            file=sys.stderr,
        )


@claims_out
def export(checkpoint: str, out: str, with_backbone: bool, backbone: str | None = None) -> None:
    """Write the folder of a Lightning checkpoint's reward model.

    Args:
        checkpoint: ``.ckpt`` file of a run whose folder holds ``config.yaml``.
        out: Folder to make.
        with_backbone: Copy the backbone into the folder.
        backbone: Folder or hub id of the backbone, if it is not where it was at training.
    """
    path = Path(checkpoint)
    configs = next((found for parent in path.resolve().parents if (found := configs_in(parent))), [])
    if not path.is_file() or not configs:
        raise VideoAlignError(
            f"--checkpoint {checkpoint}: there is no such file with a config.yaml in a folder above it"
        )
    described, saved = _described(configs[-1]), read_checkpoint(path)
    if "config" in saved:
        described = next((_described(one) for one in configs if one.name == saved["config"]), described)
    elif len(configs) > 1:
        print(f"note: the checkpoint does not name its configuration; {configs[-1]} is read", file=sys.stderr)
    if "reward_statistics" not in saved:
        raise VideoAlignError(f"--checkpoint {checkpoint} is not of a run that trained a reward model")
    network = _network(described, backbone, saved.get("backbone_revision"))
    model = RewardModel(network)
    model.on_load_checkpoint(saved)
    model.load_state_dict(saved["state_dict"] | _average(saved), strict=False)
    if model._measured_at != saved["global_step"]:
        print(
            f"note: the statistics for normalisation are those of step {model._measured_at}, the weights those of step "
            f"{saved['global_step']}: the checkpoint was written before that step's validation",
            file=sys.stderr,
        )
    model.network.save_pretrained(out, backbone=with_backbone)


def _average(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The average of the weights, where a callback kept one: the run validates it, measures it and exports it."""
    states = saved.get("callbacks", {}).values()
    found = next((s["average"] for s in states if isinstance(s, dict) and {"average", "steps"} <= s.keys()), {})
    if found:
        print("note: the average of the weights (EMA) is exported, as by the run itself", file=sys.stderr)
    return found


def _described(config: Path) -> dict[str, Any]:
    """The network of a run's configuration, as ``class_path`` and ``init_args``."""
    settings = yaml.safe_load(config.read_text())
    try:
        network = settings["model"]["init_args"]["network"]
        return {**network, "init_args": dict(network["init_args"])}
    except (TypeError, KeyError, ValueError):
        raise VideoAlignError(f"{config} is not the configuration of a run that trained a reward model") from None


def _network(network: dict[str, Any], backbone: str | None, revision: str | None) -> VideoReward:
    """The network that a run's configuration describes, with another backbone where one is named.

    Args:
        network: Its ``class_path`` and ``init_args``.
        backbone: Folder or hub id of another backbone.
        revision: Commit of the run's own backbone, where that is on the hub.
    """
    arguments = network["init_args"]
    own = arguments.get("backbone")
    if backbone or own:
        arguments["backbone"] = backbone or at_commit(own, revision)
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(VideoReward, "network")
    built = parser.instantiate_classes(parser.parse_object({"network": network})).network
    if not backbone and own and revision:
        built.backbone_name = own  # as it was named, without the commit
    return built
