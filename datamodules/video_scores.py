"""A reward model as a reward of generated videos: frames are sampled and resized as those of files are."""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from ..models.number_checks import at_least, positive
from ..models.official import open_reward
from ..models.video_reward import VideoReward
from .video import resample


class VideoRewardScores:
    """A reward model's VQ, MQ and TA of decoded videos.

    Rewards are those of `videoalign score` for the same frames in a file without loss.

    Args:
        model: Folder or hub id (ORG/NAME@REVISION) of a reward model, of this package or an official one.
        fps: Frame rate of the videos, in frames per second, above 0: the one at which the generator makes them.
        backbone: Folder or hub id of the backbone, if it is not where the model's folder says.
        template: Text file with the official template; for official folders only.
        official_repo: Clone of the official repository to read the template from; for official folders only.
        checkpoint_step: Step of the checkpoint; the latest by default. For official folders only.
        dtype: Dtype of the backbone's weights, such as bfloat16; by default the folder's.
        batch_size: Number of videos that are computed at once, at least 1.
        raw: Whether rewards stay raw; otherwise they are z-scores by the statistics of the model's folder.
        device: Device to compute on, such as ``cuda:1``; the run's own if not given.
    """

    needs: Literal["videos", "latents"] = "videos"

    def __init__(
        self,
        model: str,
        fps: float,
        backbone: str | None = None,
        template: str | None = None,
        official_repo: str | None = None,
        checkpoint_step: int | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        batch_size: int = 8,
        raw: bool = False,
        device: str | None = None,
    ) -> None:
        at_least(1, f"reward model {model}: ", batch_size=batch_size)
        positive(f"reward model {model}: ", fps=fps)
        self.model, self.video_fps, self.batch_size, self.raw = model, fps, batch_size, raw
        self._source = (backbone, template, official_repo, checkpoint_step, dtype)
        try:
            self.device = torch.device(device) if device else None
        except RuntimeError as error:
            raise VideoAlignError(f"device {device!r} of reward model {model}: {str(error).splitlines()[0]}") from None
        self._place = self.device or torch.device("cpu")
        self.features: Tensor | None = None
        """States (B, K E) at the reward tokens of the latest videos, which the head reads."""
        self._states: list[Tensor] = []

    @property
    def name(self) -> str:
        """The model's folder."""
        return f"reward model {self.model}"

    @cached_property
    def network(self) -> VideoReward:
        """The network, loaded when it is first needed."""
        network = open_reward(self.model, *self._source)
        if network.processor.template.image:
            raise VideoAlignError(f"{self.name} is shown the image that a video begins with, and here there is none")
        network.head.register_forward_pre_hook(self._keep)
        return network.requires_grad_(False).to(self._place)

    def _keep(self, head: nn.Module, states: tuple[Tensor]) -> None:
        """Keep what the head reads."""
        self._states.append(states[0].detach().float().flatten(1).cpu())

    def check(self, prompts: Sequence[str]) -> None:
        """Load the model.

        Args:
            prompts: Prompts of all samples that there will be.

        Raises:
            VideoAlignError: Where the model is damaged, was never measured on held-out pairs (unless ``raw``), or a
                prompt is too long.
        """
        if (place := self.device) is not None and place.type not in ("cpu", "meta"):
            own = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == place.type
            there = torch.accelerator.device_count() if own else 0
            if (place.index or 0) >= there:
                raise VideoAlignError(
                    f"{self.name}: device is {place}, and this machine has {there} of that kind; leave it out to "
                    "compute where the run does"
                )
        if not self.raw:
            self.network.need_statistics(self.model)
        for prompt in dict.fromkeys(prompts):
            self.network.processor.prompt_ids(prompt)

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rate videos.

        Args:
            videos: Videos (B, T, 3, H, W), uint8.
            prompts: Prompt of each video.

        Returns:
            Rewards (B,) under VQ, MQ and TA.

        Raises:
            VideoAlignError: Where videos are too short or too narrow for the model, or a prompt is too long.
        """
        if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[2] != 3:
            raise VideoAlignError(f"videos are {videos.dtype} {tuple(videos.shape)}, not uint8 (B, T, 3, H, W)")
        network, rewards = self.network, []
        self._states.clear()
        processor = network.processor
        for start in range(0, len(videos), self.batch_size):
            # on the CPU, where the frames of files are resized too
            some = enumerate(videos[start : start + self.batch_size].cpu(), start + 1)
            frames = [resample(v, self.video_fps, processor.sampling, processor.factor, f"video {n}") for n, v in some]
            inputs = processor(frames, prompts[start : start + self.batch_size])
            with torch.no_grad(), torch.autocast(self._place.type, enabled=False):
                rewards.append(network(**{name: part.to(self._place) for name, part in inputs.items()}).cpu())
        found, self.features = torch.cat(rewards), torch.cat(self._states)
        return dict(zip(DIMENSIONS, (found if self.raw else network.normalise(found)).unbind(1)))

    def place(self, device: torch.device | None) -> None:
        """Move the network.

        Args:
            device: Device that the run computes on; None moves the network to the main memory.
        """
        self._place = torch.device("cpu") if device is None else self.device or device
        if "network" in vars(self):
            self.network.to(self._place)
