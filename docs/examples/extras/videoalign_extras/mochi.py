"""Mochi 1 (text to video) for videoalign: a family whose transformer counts time the other way round."""

import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

from videoalign.models.generator import Generator


class Mochi(Generator):
    """Adapter for diffusers' MochiPipeline.

    Its transformer takes 1 - t (0 is noise, 1 is data) and predicts data minus noise; a mask hides what follows after a
    prompt's end. `guided()` cannot steer the pipeline itself, which counts its times as its transformer does.
    """

    class_name = "MochiPipeline"  # what model_index.json calls the pipeline
    blocks = "transformer_blocks"  # the transformer's attribute that holds its blocks
    max_tokens = 256  # longest prompt in training
    plain_pipeline = False
    side = 16  # height and width are multiples of this: 8 by the autoencoder, 2 by the patches

    def __init__(self, pipeline, *args, **options):
        """The pipeline's scheduler goes from 0 to 1; with this setting it goes from 1 to 0, as ours do."""
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, invert_sigmas=False)
        super().__init__(pipeline, *args, **options)

    @property
    def ratios(self):
        return self.pipeline.vae_temporal_scale_factor, self.pipeline.vae_spatial_scale_factor

    def schedule(self, scheduler, steps, x):
        """Time steps as the pipeline sets them."""
        scheduler.set_timesteps(sigmas=linear_quadratic_schedule(steps, 0.025), device=x.device)

    @property
    def text_width(self):
        return self.config.text_embed_dim

    def moments(self):
        """Mean and deviation of the autoencoder's latents, (1, C, 1, 1, 1) each."""
        config = self.vae.config
        both = torch.tensor([config.latents_mean, config.latents_std], device=self.vae.device)
        mean, std = both.view(2, 1, -1, 1, 1, 1)
        return mean, std / config.scaling_factor

    def velocity(self, x, t, condition, transformer=None):
        """Our convention: t = 1 is noise, and the velocity is noise minus data."""
        net = transformer or self.transformer
        embeds, mask = condition["prompt"].to(net.dtype), condition["prompt_mask"].bool()
        towards_data = net(x.to(net.dtype), embeds, 1000 * (1 - t), mask, return_dict=False)[0]
        return -towards_data.float()
