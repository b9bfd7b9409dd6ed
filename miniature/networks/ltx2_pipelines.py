"""Miniature pipelines of LTX-2, text to video and image to video, with all their audio parts.

One latent of the video autoencoder stands for 4 frames and 8 x 8 pixels.
"""

import math
from functools import partial

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from .pipeline_shape import WIDTH, Shape, fast_tokenizer, vision_config

MAX_TOKENS = 1024
"""Number of tokens that prompts of LTX-2 are padded to."""
DEPTH = 2
"""Layers of the text encoder."""
AUDIO = 16
"""Channels of a packed audio latent: 4 channels times 4 bins."""


def _tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text, as Gemma's does."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = fast_tokenizer(shape, special, "<bos> $A")
    tokenizer.padding_side, tokenizer.model_max_length = "left", shape.max_tokens or MAX_TOKENS
    return tokenizer


def _text_encoder(vocabulary: int) -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": MAX_TOKENS,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision_config(32, 8), mm_tokens_per_image=4)
    )


def _connectors(tokens: int) -> LTX2TextConnectors:
    """Connectors whose registers fill prompts of any power of two, or of any other number of tokens, evenly."""
    options = {}
    for name in ("video_connector", "audio_connector"):
        size = {"num_attention_heads": 4, "attention_head_dim": WIDTH // 4, "num_layers": 1}
        size |= {"num_learnable_registers": math.gcd(tokens, 8)}
        options |= {f"{name}_{key}": value for key, value in size.items()}
    return LTX2TextConnectors(caption_channels=WIDTH, text_proj_in_factor=DEPTH + 1, **options)


def _vae() -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video(
        latent_channels=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("LTX2VideoDownBlock3D",) * 3,
        decoder_block_out_channels=(16, 32),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal",) * 3,
        upsample_type=("spatiotemporal",) * 2,
        upsample_residual=(True,) * 2,
        upsample_factor=(2,) * 2,
        patch_size=2,
    )


def _transformer(shape: Shape) -> LTX2VideoTransformer3DModel:
    audio = {"audio_num_attention_heads": shape.heads, "audio_attention_head_dim": 8}
    return LTX2VideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        cross_attention_dim=shape.hidden,
        vae_scale_factors=(4, 8, 8),
        audio_in_channels=AUDIO,
        audio_out_channels=AUDIO,
        audio_cross_attention_dim=8 * shape.heads,
        caption_channels=WIDTH,
        **shape.attention,
        **audio,
    )


def _audio() -> dict:
    """Autoencoder and vocoder of the audio by their names in a pipeline."""
    bins = {"base_channels": AUDIO, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 16}
    upsampling = {"upsample_kernel_sizes": [16, 15], "upsample_factors": [8, 5], "hidden_channels": 16}
    resnets = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]]}
    return {
        "audio_vae": AutoencoderKLLTX2Audio(**bins),
        "vocoder": LTX2Vocoder(in_channels=32, **upsampling, **resnets, output_sampling_rate=4000),
    }


def _scheduler(shape: Shape) -> FlowMatchEulerDiscreteScheduler:
    """The sampler of LTX-2, whose shift depends on the number of tokens; a stated shift makes it one of every size."""
    own = {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    }
    return FlowMatchEulerDiscreteScheduler(**(own if shape.shift is None else {"shift": shape.shift}))


def _ltx2(shape: Shape, kind: type) -> LTX2Pipeline | LTX2ImageToVideoPipeline:
    tokenizer = _tokenizer(shape)
    return kind(
        vae=_vae(),
        transformer=_transformer(shape),
        tokenizer=tokenizer,
        text_encoder=_text_encoder(len(tokenizer)),
        connectors=_connectors(tokenizer.model_max_length),
        **_audio(),
        scheduler=_scheduler(shape),
    )


LTX2 = {"ltx2": partial(_ltx2, kind=LTX2Pipeline), "ltx2-i2v": partial(_ltx2, kind=LTX2ImageToVideoPipeline)}
"""Functions that make a pipeline of a size, by family."""
