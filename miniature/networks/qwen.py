"""Miniature Qwen-VL folders: random weights in transformers' own format, for laptops, tests and the demo.

They are ordinary model folders: the code that loads them is the code that loads the real ones.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from ... import VideoAlignError
from ...models.backbone import FAMILIES
from ...models.files import new_folder
from ...models.template import Template

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_WORDS = "system\nYou are a helpful assistant.\nuser\nassistant\n yes no"


def _tokenizer(corpus: list[str], vocabulary: int) -> Qwen2TokenizerFast:
    """A byte-level BPE of the corpus with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return Qwen2TokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[1:])


def make_qwen(
    folder: str | Path,
    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] = "qwen2_vl",
    corpus: list[str] | None = None,
    hidden: int = 64,
    layers: int = 4,
    vision_layers: int = 2,
    heads: int = 4,
    patch: int = 8,
    vocabulary: int = 480,
    initializer_range: float = 0.08,
    seed: int = 0,
) -> None:
    """Write a small random video-language model with its tokenizer and preprocessing.

    Args:
        folder: Folder to write.
        family: Architecture of the model: ``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``.
        corpus: Texts whose words the tokenizer should know.
        hidden: Width of both towers.
        layers: Depth of the language model.
        vision_layers: Depth of the vision tower.
        heads: Attention heads of both towers; the language model has two heads of keys and values.
        patch: Side of a vision patch in pixels; frames are cut in multiples of twice this.
        vocabulary: Number of tokens.
        initializer_range: Standard deviation of the weights; transformers' 0.02 is too small for models of this width.
        seed: Seed of the weights; the same seed writes the same bytes.
    """
    if family not in FAMILIES:
        raise VideoAlignError(f"family {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if hidden < 4 * heads or hidden % (4 * heads):
        raise VideoAlignError(
            f"hidden is {hidden}, but rotary positions need a multiple of {4 * heads} with {heads} heads"
        )
    corpus = (corpus or []) * 4 + [CHAT_WORDS] * 8 + [Template.load("plain").text] * 8
    tokenizer = _tokenizer(corpus, vocabulary)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    config = AutoConfig.for_model(
        family,
        text_config=_text_config(len(tokenizer), hidden, layers, heads, initializer_range),
        vision_config=_vision_config(family, hidden, vision_layers, heads, patch, initializer_range),
        tie_word_embeddings=True,
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    with new_folder(folder) as out:
        model.save_pretrained(out)
        _processor(family, tokenizer, patch).save_pretrained(out)


def _processor(family: str, tokenizer: Qwen2TokenizerFast, patch: int) -> Qwen2VLProcessor | Qwen3VLProcessor:
    """Preprocessing of videos, images and texts."""
    third = family == "qwen3_vl"
    common = {
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": 448 * 448},
    }
    frames = (Qwen3VLVideoProcessor if third else Qwen2VLVideoProcessor)(
        **common, do_sample_frames=False, cap_pixels_per_frame=False
    )
    images = Qwen2VLImageProcessor(**common, image_mean=frames.image_mean, image_std=frames.image_std)
    return (Qwen3VLProcessor if third else Qwen2VLProcessor)(
        image_processor=images, tokenizer=tokenizer, video_processor=frames, chat_template=CHAT
    )


def _text_config(vocabulary: int, hidden: int, layers: int, heads: int, initializer_range: float) -> dict[str, Any]:
    """Configuration of the language model."""
    half = hidden // heads // 2
    section = half * 3 // 8
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [half - 2 * section, section, section],
        },
        "initializer_range": initializer_range,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _vision_config(
    family: str, hidden: int, layers: int, heads: int, patch: int, initializer_range: float
) -> dict[str, Any]:
    """Configuration of the vision tower, whose names differ between families."""
    later = {"hidden_size": hidden, "out_hidden_size": hidden, "intermediate_size": 2 * hidden}
    own = {
        "qwen2_vl": {"embed_dim": hidden, "hidden_size": hidden, "mlp_ratio": 2},
        "qwen2_5_vl": {**later, "fullatt_block_indexes": [layers - 1], "window_size": 4 * patch},
        "qwen3_vl": {**later, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    }[family]
    return {
        "depth": layers,
        "patch_size": patch,
        "num_heads": heads,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": initializer_range,
        **own,
    }
