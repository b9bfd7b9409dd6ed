"""Miniature pipelines of LTX-Video, text to video and image to video: 4 frames and 8 x 8 pixels per latent."""

from functools import partial

from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from .pipeline_shape import WIDTH, Shape, t5_config, t5_tokenizer


def _ltx(shape: Shape, kind: type) -> LTXPipeline | LTXImageToVideoPipeline:
    tokenizer = t5_tokenizer(shape)
    vae = AutoencoderKLLTXVideo(
        latent_channels=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        decoder_block_out_channels=(16, 32, 32),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False),
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3,
        patch_size=2,
        downsample_type=("conv",) * 3,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        cross_attention_dim=shape.hidden,
        caption_channels=WIDTH,
        **shape.attention,
    )
    encoder = T5EncoderModel(T5Config(**t5_config(len(tokenizer))))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shape.shift or 1.0)
    return kind(scheduler, vae, encoder, tokenizer, transformer)


LTX = {"ltx": partial(_ltx, kind=LTXPipeline), "ltx-i2v": partial(_ltx, kind=LTXImageToVideoPipeline)}
"""Functions that make a pipeline of a size, by family."""
