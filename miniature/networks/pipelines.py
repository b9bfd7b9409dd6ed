"""Miniature text-to-video pipelines: random weights in diffusers' own format, for laptops, tests and the demo.

They are ordinary pipeline folders of the real architectures: the code that loads them is the code that loads real ones.
"""

from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from ... import VideoAlignError
from ...models.files import new_folder

CORPUS = ["a red circle moves left to right", "a blue square moves top to bottom", "a video of the same scene"]


def _tokenizer(corpus: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that ends every text, as T5's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_generator(
    folder: str | Path,
    family: Literal["wan", "ltx"] = "wan",
    corpus: list[str] | None = None,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocabulary: int = 400,
    max_tokens: int | None = None,
    shift: float = 1.0,
    seed: int = 0,
) -> None:
    """Write a small random pipeline: text encoder, autoencoder, transformer and scheduler.

    One latent of its autoencoder stands for 4 frames and 8 x 8 pixels.

    Args:
        folder: Folder to write.
        family: Architecture of the pipeline: ``wan`` or ``ltx``.
        corpus: Texts whose words the tokenizer should know.
        hidden: Width of the transformer.
        layers: Depth of the transformer.
        heads: Attention heads of the transformer.
        vocabulary: Number of tokens.
        max_tokens: Number of tokens that prompts are padded to; the family's own if not given.
        shift: Shift of the sampler's time steps.
        seed: Seed of the weights; the same seed writes the same bytes.
    """
    if family not in ("wan", "ltx"):
        raise VideoAlignError(f"family {family!r} is unknown; choose wan or ltx")
    if hidden % heads or (hidden // heads) % 2 or hidden // heads < 12:
        raise VideoAlignError(f"hidden is {hidden}: it must be {heads} heads of an even size, 12 at least")
    tokenizer = _tokenizer((corpus or CORPUS) * 4, vocabulary)
    tokenizer.model_max_length = max_tokens or tokenizer.model_max_length
    text = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = {"wan": _wan, "ltx": _ltx}[family](tokenizer, text, hidden, layers, heads, shift)
    with new_folder(folder) as out:
        pipeline.save_pretrained(out)


def _wan(
    tokenizer: PreTrainedTokenizerFast, text: dict[str, int], hidden: int, layers: int, heads: int, shift: float
) -> WanPipeline:
    """A pipeline of Wan2.2's kind."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=torch.linspace(-0.2, 0.2, 16).tolist(),
        latents_std=torch.linspace(0.8, 1.2, 16).tolist(),
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=3 * hidden,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    encoder, scheduler = UMT5EncoderModel(UMT5Config(**text)), FlowMatchEulerDiscreteScheduler(shift=shift)
    return WanPipeline(tokenizer, encoder, vae, scheduler, transformer)


def _ltx(
    tokenizer: PreTrainedTokenizerFast, text: dict[str, int], hidden: int, layers: int, heads: int, shift: float
) -> LTXPipeline:
    """A pipeline of LTX-Video's kind."""
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
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        cross_attention_dim=hidden,
        num_layers=layers,
        caption_channels=32,
    )
    encoder, scheduler = T5EncoderModel(T5Config(**text)), FlowMatchEulerDiscreteScheduler(shift=shift)
    return LTXPipeline(scheduler, vae, encoder, tokenizer, transformer)
