"""Miniature pipelines of HunyuanVideo 1.5, text to video and image to video: 4 frames and 16 x 16 pixels per latent."""

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2TokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from .pipeline_shape import WIDTH, Shape, byte_level, t5_config, vision_config

PREFIX = 108
"""Number of tokens before a prompt, which the pipeline cuts away: the length of Qwen's system message."""
CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{% for i in range(" + str(PREFIX) + ") %}<|im_start|>{% endfor %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
"""A chat template that puts the same number of tokens before each prompt as Qwen's does, and one after it."""
LATENTS = 8
"""Channels of a latent."""


def _qwen(shape: Shape) -> dict:
    """Tokenizer and text encoder by their names in a pipeline."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=byte_level(shape, special), additional_special_tokens=special[1:], chat_template=CHAT
    )
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = PREFIX + shape.max_tokens if shape.max_tokens else tokenizer.model_max_length
    half = WIDTH // 4 // 2
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2, 1, 1]},
        bos_token_id=None,
        eos_token_id=None,
    )
    return {"tokenizer": tokenizer, "text_encoder": Qwen2_5_VLTextModel(config)}


def _byt5() -> dict:
    """Tokenizer and encoder of quoted words by their names in a pipeline."""
    tokenizer = ByT5Tokenizer()
    return {"tokenizer_2": tokenizer, "text_encoder_2": T5EncoderModel(T5Config(**t5_config(len(tokenizer))))}


def _siglip() -> dict:
    """Preprocessing and encoder of images by their names in a pipeline."""
    return {
        "image_encoder": SiglipVisionModel(SiglipVisionConfig(**vision_config(32, 8))),
        "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32}),
    }


def _vae() -> AutoencoderKLHunyuanVideo15:
    channels = (8, 8, 16, 16, 16)
    return AutoencoderKLHunyuanVideo15(latent_channels=LATENTS, block_out_channels=channels, layers_per_block=1)


def _transformer(shape: Shape, task: str) -> HunyuanVideo15Transformer3DModel:
    head = shape.hidden // shape.heads
    side = 2 * (head // 6)
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENTS + 1,
        out_channels=LATENTS,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=(head - 2 * side, side, side),
        target_size=32,
        task_type=task,
        **shape.attention,
    )


def _text(shape: Shape, task: str = "t2v") -> dict:
    """The parts of a text-to-video pipeline by their names."""
    return {
        "vae": _vae(),
        "transformer": _transformer(shape, task),
        **_qwen(shape),
        **_byt5(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shape.shift or 1.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def hunyuan15(shape: Shape) -> HunyuanVideo15Pipeline:
    """A pipeline of HunyuanVideo 1.5's text-to-video kind.

    Args:
        shape: Size of the pipeline.
    """
    return HunyuanVideo15Pipeline(**_text(shape))


def hunyuan15_image(shape: Shape) -> HunyuanVideo15ImageToVideoPipeline:
    """A pipeline of HunyuanVideo 1.5's image-to-video kind.

    Args:
        shape: Size of the pipeline.
    """
    return HunyuanVideo15ImageToVideoPipeline(**_text(shape, "i2v"), **_siglip())


HUNYUAN = {"hunyuan15": hunyuan15, "hunyuan15-i2v": hunyuan15_image}
"""Functions that make a pipeline of a size, by family."""
