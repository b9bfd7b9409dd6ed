"""Wan 2.1 and 2.2 from an image and a prompt (Wan et al., 2025).

| pipeline | image | transformers |
|---|---|---|
| Wan 2.1, image to video | further channels, and CLIP's embeddings | one |
| Wan2.2-TI2V-5B | the first latent frame, its tokens at time 0 | one |
| Wan2.2-I2V-A14B | further channels | two experts |
"""

import torch
from PIL.Image import Image
from torch import Tensor, nn

from .family import Condition
from .wan import Wan


class WanImage(Wan):
    """Adapter for :class:`~diffusers.WanImageToVideoPipeline`: the image is 4 channels of a mask and 16 of latents."""

    class_name = "WanImageToVideoPipeline"
    further_parts = {"text_encoder": ("image_encoder",)}
    image, plain_pipeline = "required", False

    @property
    def embeds_images(self) -> bool:
        return self.config.image_dim is not None  # Wan 2.1's by CLIP

    def _inputs(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        if self.begins_with_image:
            return super()._inputs(x, t, condition)
        image = condition["image"].to(x)  # (B, 16, F, H, W)
        mask = torch.zeros_like(x[:, : self.ratios[0]])
        mask[:, :, 0] = 1
        return torch.cat([x, mask, image], 1), self.timesteps(t)

    def _image_frames(self, first: Tensor, num_frames: int) -> Tensor:
        grey = 0 if self.begins_with_image else num_frames - 1
        return nn.functional.pad(first, (0, 0, 0, 0, 0, grey))

    def _embed_images(self, images: list[Image]) -> Tensor | None:
        if not self.embeds_images:
            return None
        return self.pipeline.encode_image(images, self.require("image_encoder").device)
