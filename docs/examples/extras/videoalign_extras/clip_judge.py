"""A judge without training: CLIP's similarity of frames and prompt, of neighbouring frames, and sharpness."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.video import decode
from videoalign.models.files import write_json
from videoalign.models.frame_sampling import FrameSampling


class ClipJudge:
    """Rates videos by a CLIP model.

    Args:
        model: Folder or hub id of a CLIP model.
        frames: Frames of a video that are looked at.
    """

    def __init__(self, model: str, frames: int = 8) -> None:
        self.model = model
        self.sampling = FrameSampling(fps=None, num_frames=frames, min_pixels=0, max_pixels=448 * 448)

    @property
    def name(self) -> str:
        return f"CLIP {self.model}"

    @cached_property
    def parts(self):
        """The network and what prepares its inputs, loaded when the first video is rated."""
        load = (CLIPModel, AutoTokenizer, AutoImageProcessor)
        return tuple(kind.from_pretrained(self.model) for kind in load)

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Any video of any prompt can be rated."""

    def rate_set(self, videos: ShardSet, keys: Sequence[str], folder: Path) -> dict[str, Tensor]:
        """A tensor (N,) under VQ, MQ and TA; what is rated already is read from ``folder``."""
        kept = folder / "ratings.json"
        ratings = json.loads(kept.read_text()) if kept.exists() else {}
        for content in videos.contents():
            if content.key in set(keys) - ratings.keys():
                frames = decode(content.read("mp4"), self.sampling, 2, content.name)  # (T, 3, H, W), uint8
                ratings[content.key] = self._rate(frames, content.record["prompt"])
                write_json(kept, ratings)
        return {d: torch.tensor([ratings[key][d] for key in keys]) for d in ("VQ", "MQ", "TA")}

    @torch.no_grad()
    def _rate(self, frames, prompt):
        network, tokenizer, images = self.parts
        text = tokenizer(prompt, truncation=True, return_tensors="pt")
        found = network(**text, **images(list(frames), return_tensors="pt"))
        looks = torch.nn.functional.normalize(found.image_embeds, dim=1)
        grey = frames.float().mean(1) / 255
        return {
            "VQ": float((grey.diff(dim=1)[..., 1:] ** 2 + grey.diff(dim=2)[:, 1:] ** 2).mean().sqrt()),
            "MQ": float((looks[1:] * looks[:-1]).sum(1).mean()),
            "TA": float((looks @ torch.nn.functional.normalize(found.text_embeds, dim=1).T).mean()),
        }
