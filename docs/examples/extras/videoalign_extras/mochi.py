"""Mochi 1 (text to video) for videoalign: a family whose transformer counts time the other way round."""

import torch
from diffusers import MochiPipeline

from videoalign.models.generator import Generator


class Mochi(Generator):
    """Adapter for diffusers' MochiPipeline.

    Its transformer takes 1 - t (0 is noise, 1 is data) and predicts data minus noise; a mask hides what follows after a
    prompt's end. Guidance by a noisy reward hooks into schedulers that count as ours do, so it is not for this family.
    """

    class_name = "MochiPipeline"  # what model_index.json calls the pipeline
    blocks = "transformer_blocks"  # the transformer's attribute that holds its blocks
    max_tokens = 256  # longest prompt in training
    side = 16  # height and width are multiples of this: 8 by the autoencoder, 2 by the patches

    @staticmethod
    def pipeline_class():
        return MochiPipeline

    @staticmethod
    def check(index, path):
        """Every Mochi pipeline works; a family raises VideoAlignError here for folders that work in another way."""

    @property
    def ratios(self):
        return self.pipeline.vae_temporal_scale_factor, self.pipeline.vae_spatial_scale_factor

    @property
    def text_width(self):
        return self.transformer.config.text_embed_dim

    def moments(self):
        """Mean and deviation of the autoencoder's latents, (1, C, 1, 1, 1) each."""
        config = self.vae.config
        both = torch.tensor([config.latents_mean, config.latents_std], device=self.vae.device)
        mean, std = both.view(2, 1, -1, 1, 1, 1)
        return mean, std / config.scaling_factor

    def encoded(self, found):
        return {"embeds": found[0], "mask": found[1].long()}

    def velocity(self, x, t, condition, transformer=None):
        """Our convention: t = 1 is noise, and the velocity is noise minus data."""
        net = transformer or self.transformer
        embeds = condition["embeds"].to(net.dtype)
        towards_data = net(x.to(net.dtype), embeds, 1000 * (1 - t), condition["mask"].bool(), return_dict=False)[0]
        return -towards_data.float()

    def _denoise(self, condition, null, noise, **options):
        """The pipeline's call, from our noise to latents."""
        time, space = self.ratios
        _, _, frames, height, width = noise.shape
        empty = {}
        if null:
            empty = {"negative_prompt_embeds": null["embeds"], "negative_prompt_attention_mask": null["mask"].bool()}
        return self.pipeline(
            prompt_embeds=condition["embeds"],
            prompt_attention_mask=condition["mask"].bool(),
            latents=noise,
            output_type="latent",
            num_frames=(frames - 1) * time + 1,
            height=height * space,
            width=width * space,
            **empty,
            **options,
        ).frames
