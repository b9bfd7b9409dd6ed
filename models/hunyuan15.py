"""HunyuanVideo 1.5: videos from prompts, or from an image and a prompt (Tencent, 2025).

A prompt has two parts: states of a Qwen2.5-VL, without its template's, and a ByT5's of quoted words (``prompt_2``).
"""

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input
from PIL.Image import Image
from torch import Tensor, nn

from .. import VideoAlignError
from .family import Condition, Encoded
from .generator import Generator


class HunyuanVideo15(Generator):
    """Adapter for diffusers' :class:`~diffusers.HunyuanVideo15Pipeline`. Masks hide the padding of prompts."""

    class_name = "HunyuanVideo15Pipeline"
    blocks = "transformer_blocks"
    max_tokens = 1000
    side = 16
    further_parts = {"text_encoder": ("text_encoder_2",)}
    plain_pipeline = False

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        if self.config.use_meanflow:
            raise VideoAlignError("a distilled HunyuanVideo 1.5 (use_meanflow) gives mean velocities, not the flow's")
        if self.pipeline.tokenizer is not None:
            most = self.pipeline.tokenizer.model_max_length - self.pipeline.prompt_template_encode_start_idx
            self.max_tokens = self.pipeline.tokenizer_max_length = min(type(self).max_tokens, most)
        if self.vae is not None:
            self.vae.enable_slicing()  # one video at a time: its attention's mask does not fit several
            self.vae.enable_tiling()  # 121 frames of 480 x 848 take 141 GiB as a whole, 23 in tiles (fp32, counted)

    @property
    def ratios(self) -> tuple[int, int]:
        return self.structure["vae"].temporal_compression_ratio, self.structure["vae"].spatial_compression_ratio

    def prompt_shapes(self) -> dict[str, tuple[int, int]]:
        quoted = (self.pipeline.tokenizer_2_max_length, self.config.text_embed_2_dim)
        return {"prompt": (self.max_tokens, self.config.text_embed_dim), "prompt_2": quoted}

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean 0, and the inverse of the autoencoder's scaling factor, (1, 1, 1, 1, 1) each."""
        mean = torch.zeros(1, 1, 1, 1, 1, device=self.vae.device)
        return mean, mean + 1 / self.vae.config.scaling_factor

    def normalised(self, latents: Tensor) -> Tensor:
        return latents * self.vae.config.scaling_factor

    def adaptable(self, layer: str, blocks: int | None = None) -> bool:
        """Whether a layer takes part: nothing reads what the last block makes of the prompt."""
        unread = ("add_q_proj", "norm_added_q", "to_add_out", "ff_context")
        last = f".{(blocks or self.config.num_layers) - 1}."
        return not (last in layer and any(word in layer for word in unread))

    def token_counts(self, prompts: list[str]) -> list[int]:
        """Number of tokens of each prompt in the chat template, without the template's beginning."""
        pipeline, chats = self.pipeline, format_text_input(prompts, self.pipeline.system_message)
        found = pipeline.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
        return [len(ids) - pipeline.prompt_template_encode_start_idx for ids in found.input_ids]

    def _embed(self, prompts: list[str], lengths: list[int]) -> list[Encoded]:
        found = self.pipeline.encode_prompt(prompts, device=self.text_encoder.device, batch_size=len(prompts))
        return [{"prompt": one[read.bool()], "prompt_2": two[quoted.bool()]} for one, read, two, quoted in zip(*found)]

    def schedule(self, scheduler: SchedulerMixin, steps: int, x: Tensor) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1], device=x.device)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        net = transformer or self.transformer
        given, mask, kind = torch.zeros_like(x), torch.zeros_like(x[:, :1]), net.dtype
        if "image" in condition:
            given[:, :, :1], mask[:, :, :1] = condition["image"], 1
        nothing = x.new_zeros(len(x), self.pipeline.vision_num_semantic_tokens, net.config.image_embed_dim)
        return net(
            torch.cat([x, given, mask], 1).to(kind),
            self.timesteps(t).to(kind),  # its layers cannot take a time of another dtype than their own
            condition["prompt"].to(kind),
            condition["prompt_mask"],
            encoder_hidden_states_2=condition["prompt_2"].to(kind),
            encoder_attention_mask_2=condition["prompt_2_mask"],
            image_embeds=condition.get("image_embeds", nothing).to(kind),
            return_dict=False,
        )[0].float()


class HunyuanVideo15Image(HunyuanVideo15):
    """Adapter for :class:`~diffusers.HunyuanVideo15ImageToVideoPipeline`."""

    class_name = "HunyuanVideo15ImageToVideoPipeline"
    further_parts = {"text_encoder": ("text_encoder_2", "image_encoder")}
    image, embeds_images = "required", True

    def _embed_images(self, images: list[Image]) -> Tensor:
        encoder = self.require("image_encoder")
        return self.pipeline._get_image_embeds(encoder, self.pipeline.feature_extractor, images, encoder.device)
