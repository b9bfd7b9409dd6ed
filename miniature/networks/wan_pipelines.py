"""Miniature pipelines of Wan 2.1 and 2.2, text to video and image to video.

Their autoencoders have 4 frames and 8 x 8 pixels per latent (16 channels), or 16 x 16 pixels (24 channels; TI2V-5B).
"""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from .pipeline_shape import WIDTH, Shape, t5_config, t5_tokenizer, vision_config

HUB_SHIFT = 3.0
"""Shift that diffusers' converter writes for every Wan 2.2, whatever its authors sample with."""
EIGHT = {"z_dim": 16, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "scale_factor_spatial": 8}
"""Size of an autoencoder of 8 x 8 pixels per latent."""
SIXTEEN = {"z_dim": 24, "dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]}
SIXTEEN |= {"scale_factor_spatial": 16}
"""Size of an autoencoder of 16 x 16 pixels per latent."""


def _vae(size: dict) -> AutoencoderKLWan:
    z = size["z_dim"]
    return AutoencoderKLWan(
        base_dim=16,
        num_res_blocks=1,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        latents_mean=torch.linspace(-0.2, 0.2, z).tolist(),
        latents_std=torch.linspace(0.8, 1.2, z).tolist(),
        **size,
    )


def _transformer(shape: Shape, channels: int, more: int = 0, **options: int) -> WanTransformer3DModel:
    """A transformer; ``more`` is the number of channels that an image adds to its input."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=channels + more,
        out_channels=channels,
        text_dim=WIDTH,
        freq_dim=64,
        ffn_dim=3 * shape.hidden,
        rope_max_seq_len=64,
        **shape.attention,
        **options,
    )


def _euler(shape: Shape) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shape.shift or 1.0)


def _unipc(shape: Shape) -> UniPCMultistepScheduler:
    shift = shape.shift or HUB_SHIFT
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _text(shape: Shape) -> dict:
    """Tokenizer and text encoder by their names in a pipeline."""
    tokenizer = t5_tokenizer(shape)
    encoder = UMT5EncoderModel(UMT5Config(**t5_config(len(tokenizer))))
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def wan(shape: Shape) -> WanPipeline:
    """A pipeline of Wan 2.1's kind.

    Args:
        shape: Size of the pipeline.
    """
    parts = {"vae": _vae(EIGHT), "transformer": _transformer(shape, 16)}
    return WanPipeline(**parts, **_text(shape), scheduler=_euler(shape))


def wan_image(shape: Shape) -> WanImageToVideoPipeline:
    """A pipeline of Wan 2.1 I2V's kind, whose transformer also reads CLIP's embedding of the image.

    Args:
        shape: Size of the pipeline.
    """
    transformer = _transformer(shape, 16, 20, image_dim=WIDTH, added_kv_proj_dim=shape.hidden)
    return WanImageToVideoPipeline(
        vae=_vae(EIGHT),
        transformer=transformer,
        **_text(shape),
        image_encoder=CLIPVisionModel(CLIPVisionConfig(**vision_config(32, 8))),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        scheduler=_euler(shape),
    )


def _dense(shape: Shape, kind: type) -> WanPipeline | WanImageToVideoPipeline:
    """A pipeline of Wan2.2-TI2V-5B's kind, which is the same for text and for images to begin with."""
    parts = {"vae": _vae(SIXTEEN), "transformer": _transformer(shape, SIXTEEN["z_dim"])}
    return kind(**parts, **_text(shape), scheduler=_unipc(shape), expand_timesteps=True)


def _experts(shape: Shape, kind: type, more: int, boundary: float) -> WanPipeline | WanImageToVideoPipeline:
    """A pipeline of Wan2.2-A14B's kind: two transformers of random weights of their own."""
    experts = {name: _transformer(shape, 16, more) for name in ("transformer", "transformer_2")}
    return kind(vae=_vae(EIGHT), **experts, **_text(shape), scheduler=_unipc(shape), boundary_ratio=boundary)


WAN = {
    "wan": wan,
    "wan-i2v": wan_image,
    "wan22-5b": partial(_dense, kind=WanPipeline),
    "wan22-5b-i2v": partial(_dense, kind=WanImageToVideoPipeline),
    "wan22-a14b": partial(_experts, kind=WanPipeline, more=0, boundary=0.875),
    "wan22-a14b-i2v": partial(_experts, kind=WanImageToVideoPipeline, more=20, boundary=0.9),
}
"""Functions that make a pipeline of a size, by family."""
